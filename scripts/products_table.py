#!/usr/bin/env python
"""How fast products of the sizes of experts are, which is what bounds a layer on a CPU, and which way is the fastest.

    python scripts/products_table.py --threads 1

First, of each layer of `zoo bench layer`, GFLOP/s of the products of its experts over 2,048 tokens evenly routed, one
after the other, and of one product of a dense layer as wide as what a token goes through, by each library. Second, how
many times as long they take as those of some experts at a time. Third, how many times as long a product of few rows
takes in torch's own way as in columns and by oneDNN: what `zoo.layers.linear` decides by. Medians of rounds in turn.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import get_args

import torch
from torch import Tensor

from zoo.bench.layer import MANY, SHAPES, Shape
from zoo.bench.timing import interleaved
from zoo.layers.linear import Way, libraries, onednn_products, product, product_by, products_by, uses_onednn

TOGETHER = 8
"""About as many as are in a block of fine experts."""

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tables = (("GFLOP/s", speeds, "dense"), ("time over that of some together", together, ""))
    for title, measured, last in tables:
        for library in libraries():
            print(f"{title}, {library}")
            print(f"                    forward        backward                              {last:>6}".rstrip())
            print(
                "              rows     up    down     d inner   d down     d up      d x"
                + ("        up" if last else "")
            )
            with products_by(library):
                for name, shape in SHAPES.items():
                    print(f"{name:12} {rows_of(shape):5} " + " ".join(measured(shape, args.rounds)))
            print()
    sizes = [(s.hidden_size, 2 * s.width) for s in SHAPES.values()] + [
        (s.width, s.hidden_size) for s in SHAPES.values()
    ]
    ways = [way for way in get_args(Way) if way != "onednn" or way in libraries()]
    ratios = {size: {rows: few(*size, rows, ways, args.rounds) for rows in ROWS} for size in sizes}
    for way in ways[1:]:
        print(f"time over that of {way}, by rows")
        print(f"{'matrix':>12} " + " ".join(f"{rows:6}" for rows in ROWS))
        for (inputs, outputs), by_rows in ratios.items():
            print(f"{inputs:>6}→{outputs:<5} " + " ".join(f"{by_rows[rows][way]:6.2f}" for rows in ROWS))
        print()


def rows_of(shape: Shape) -> int:
    """An expert's."""
    return MANY * shape.top_k // shape.num_experts


def factors(shape: Shape) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """x [E, n, I], weights [E, O, I] and memory for the results [E, n, O] of two products forward, four backward."""
    count, rows, hidden, width = shape.num_experts, rows_of(shape), shape.hidden_size, shape.width
    x, both, inner = (torch.randn(count, rows, size) for size in (hidden, 2 * width, width))
    up, down = torch.randn(count, 2 * width, hidden), torch.randn(count, hidden, width)
    return {
        "up": (x, up, both),
        "down": (inner, down, torch.empty_like(x)),
        "d inner": (x, down.mT, torch.empty_like(inner)),
        "d down": (x.mT, inner.mT, torch.empty_like(down)),
        "d up": (both.mT, x.mT, torch.empty_like(up)),
        "d x": (both, up.mT, torch.empty_like(x)),
    }


def speeds(shape: Shape, rounds: int) -> Iterator[str]:
    """GFLOP/s of the products, and of the first of the dense layer."""
    made = factors(shape)
    dense, active = torch.randn(MANY, shape.hidden_size), torch.randn(2 * shape.active_width, shape.hidden_size)
    made["dense"] = (dense[None], active[None], torch.empty(1, MANY, 2 * shape.active_width))
    seconds = interleaved({name: _each(*of) for name, of in made.items()}, rounds)
    for name, times in seconds.items():
        x, weights, _ = made[name]
        flops = 2 * x.numel() * weights.shape[1]
        yield f"{flops / statistics.median(times) / 1e9:8.0f}"


def together(shape: Shape, rounds: int) -> Iterator[str]:
    """Time of the products one after the other over that of those of ``TOGETHER`` experts at a time."""
    for of in factors(shape).values():
        seconds = interleaved({"each": _each(*of), "some": _some(*of)}, rounds)
        ratio = statistics.median(a / b for a, b in zip(seconds["each"], seconds["some"], strict=True))
        yield f"{ratio:8.2f}"


def _each(x: Tensor, weights: Tensor, out: Tensor) -> Callable[[], None]:
    def call() -> None:
        for of_x, weight, of_out in zip(x, weights, out, strict=True):
            product(of_x, weight, of_out)

    return call


def _some(x: Tensor, weights: Tensor, out: Tensor) -> Callable[[], None]:
    def call() -> None:
        with onednn_products if uses_onednn() else nullcontext():
            for of_x, some, of_out in zip(*(tensor.split(TOGETHER) for tensor in (x, weights, out)), strict=True):
                torch.bmm(of_x, some.mT, out=of_out)

    return call


def few(inputs: int, outputs: int, rows: int, ways: Sequence[Way], rounds: int) -> dict[Way, float]:
    """Time of torch's own way over that of each way, with matrices that take turns."""
    count = max(8, 10**7 // (inputs * outputs))
    weights, x = torch.randn(count, outputs, inputs).unbind(), torch.randn(count, rows, inputs).unbind()

    def by(way: Way) -> Callable[[], None]:
        def call() -> None:
            for of_x, weight in zip(x, weights, strict=True):
                product_by(way, of_x, weight).contiguous()

        return call

    seconds = interleaved({way: by(way) for way in ways}, rounds)
    return {
        way: statistics.median(a / b for a, b in zip(seconds["rows"], times, strict=True))
        for way, times in seconds.items()
    }


if __name__ == "__main__":
    main()
