#!/usr/bin/env python
"""How fast products of the sizes of experts are, which is what bounds a layer on a CPU, and which way is the fastest.

    python scripts/products_table.py --threads 1

First, of each layer of `zoo bench layer`, GFLOP/s of the products of its experts over 2,048 tokens evenly routed, and
of one product of a dense layer as wide as what a token goes through, by each library. Second, how many times as long a
product of few rows takes in torch's own way as in columns and by oneDNN: what `zoo.layers.linear` decides by. Medians
of rounds in turn.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import torch
from torch import Tensor

from zoo.bench.layer import MANY, SHAPES, Shape
from zoo.bench.timing import interleaved
from zoo.layers.linear import Way, libraries, product, product_by, products_by

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for library in libraries():
        print(f"GFLOP/s, {library:10}      forward        backward                               dense")
        print("              rows     up    down     d inner   d down     d up      d x        up")
        with products_by(library):
            for name, shape in SHAPES.items():
                speeds = " ".join(f"{speed:8.0f}" for speed in products(shape, args.rounds))
                print(f"{name:12} {MANY * shape.top_k // shape.num_experts:5} {speeds}")
        print()
    sizes = [(s.hidden_size, 2 * s.width) for s in SHAPES.values()] + [
        (s.width, s.hidden_size) for s in SHAPES.values()
    ]
    ratios = {size: {rows: few(*size, rows, args.rounds) for rows in ROWS} for size in sizes}
    for way in ("columns", "onednn"):
        print(f"time over that of {way}, by rows")
        print(f"{'matrix':>12} " + " ".join(f"{rows:6}" for rows in ROWS))
        for (inputs, outputs), by_rows in ratios.items():
            print(f"{inputs:>6}→{outputs:<5} " + " ".join(f"{by_rows[rows][way]:6.2f}" for rows in ROWS))
        print()


def products(shape: Shape, rounds: int) -> Iterator[float]:
    """GFLOP/s of the two products forward, the four backward, and the first of the dense layer."""
    count, rows = shape.num_experts, MANY * shape.top_k // shape.num_experts
    hidden, width = shape.hidden_size, shape.width
    x, both, inner = (torch.randn(count, rows, size).unbind() for size in (hidden, 2 * width, width))
    up, down = torch.randn(count, 2 * width, hidden).unbind(), torch.randn(count, hidden, width).unbind()
    of_up, of_down = torch.empty(count, 2 * width, hidden).unbind(), torch.empty(count, hidden, width).unbind()
    dense, active = torch.randn(MANY, hidden), torch.randn(2 * shape.active_width, hidden)
    made = torch.empty(MANY, 2 * shape.active_width)
    ways: dict[str, Callable[[], object]] = {
        "up": lambda: _each(x, up, both),
        "down": lambda: _each(inner, down, x),
        "d inner": lambda: _each(x, [w.t() for w in down], inner),
        "d down": lambda: _each([r.t() for r in x], [r.t() for r in inner], of_down),
        "d up": lambda: _each([r.t() for r in both], [r.t() for r in x], of_up),
        "d x": lambda: _each(both, [w.t() for w in up], x),
        "dense": lambda: product(dense, active, made),
    }
    twice = {"up": 2, "d up": 2, "d x": 2}
    seconds = interleaved(ways, rounds)
    for name, times in seconds.items():
        flops = 2 * count * rows * hidden * width * twice.get(name, 1)
        if name == "dense":
            flops = 2 * MANY * hidden * 2 * shape.active_width
        yield flops / statistics.median(times) / 1e9


def _each(x: Sequence[Tensor], weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    for of_x, weight, of_out in zip(x, weights, out, strict=True):
        product(of_x, weight, of_out)


def few(inputs: int, outputs: int, rows: int, rounds: int) -> dict[Way, float]:
    """Time of torch's own way over that of each way, with matrices that take turns."""
    count = max(8, 10**7 // (inputs * outputs))
    weights, x = torch.randn(count, outputs, inputs).unbind(), torch.randn(count, rows, inputs).unbind()

    def by(way: Way) -> Callable[[], None]:
        def call() -> None:
            for of_x, weight in zip(x, weights, strict=True):
                product_by(way, of_x, weight).contiguous()

        return call

    seconds = interleaved({way: by(way) for way in get_args(Way)}, rounds)
    return {
        way: statistics.median(a / b for a, b in zip(seconds["rows"], times, strict=True))
        for way, times in seconds.items()
    }


if __name__ == "__main__":
    main()
