#!/usr/bin/env python
"""How fast products of the sizes of experts are, which is what bounds a layer of fine ones on a CPU.

    python scripts/products_table.py

First, of each layer of `zoo bench layer`, GFLOP/s of the products of its experts over 2,048 tokens evenly routed, and
of one product of a dense layer as wide as what a token goes through. Second, the time of a product of few rows over the
time of the same made transposed, which `zoo.moe.blocked` decides by. Medians of rounds in turn.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from zoo.bench.layer import MANY, SHAPES, Shape
from zoo.bench.timing import interleaved

ROWS = (4, 8, 12, 16, 24, 32, 48, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("GFLOP/s                forward        backward                               dense")
    print("              rows     up    down     d inner   d down     d up      d x        up")
    for name, shape in SHAPES.items():
        speeds = " ".join(f"{speed:8.0f}" for speed in products(shape, args.rounds))
        print(f"{name:12} {MANY * shape.top_k // shape.num_experts:5} {speeds}")
    print("\ntime over that of the transposed product, by rows")
    print(f"{'matrix':>12} " + " ".join(f"{rows:6}" for rows in ROWS))
    for shape in SHAPES.values():
        for inputs, outputs in ((shape.hidden_size, 2 * shape.width), (shape.width, shape.hidden_size)):
            ratios = " ".join(f"{transposed(inputs, outputs, rows, args.rounds):6.2f}" for rows in ROWS)
            print(f"{inputs:>6}→{outputs:<5} {ratios}")


def products(shape: Shape, rounds: int) -> Iterator[float]:
    """GFLOP/s of the two products forward, the four backward, and the first of the dense layer."""
    count, rows = shape.num_experts, MANY * shape.top_k // shape.num_experts
    hidden, width = shape.hidden_size, shape.width
    x, both, inner = (torch.randn(count, rows, size).unbind() for size in (hidden, 2 * width, width))
    up, down = torch.randn(count, 2 * width, hidden).unbind(), torch.randn(count, hidden, width).unbind()
    of_up, of_down = torch.empty(count, 2 * width, hidden).unbind(), torch.empty(count, hidden, width).unbind()
    dense, active = torch.randn(MANY, hidden), torch.randn(2 * shape.active_width, hidden)
    ways: dict[str, Callable[[], object]] = {
        "up": lambda: _each(x, [w.t() for w in up], both),
        "down": lambda: _each(inner, [w.t() for w in down], x),
        "d inner": lambda: _each(x, down, inner),
        "d down": lambda: _each([r.t() for r in x], inner, of_down),
        "d up": lambda: _each([r.t() for r in both], x, of_up),
        "d x": lambda: _each(both, up, x),
        "dense": lambda: torch.mm(dense, active.t()),
    }
    twice = {"up": 2, "d up": 2, "d x": 2}
    seconds = interleaved(ways, rounds)
    for name, times in seconds.items():
        flops = 2 * count * rows * hidden * width * twice.get(name, 1)
        if name == "dense":
            flops = 2 * MANY * hidden * 2 * shape.active_width
        yield flops / statistics.median(times) / 1e9


def _each(left: Sequence[Tensor], right: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    for a, b, c in zip(left, right, out, strict=True):
        torch.mm(a, b, out=c)


def transposed(inputs: int, outputs: int, rows: int, rounds: int) -> float:
    """Time of rows · Wᵀ over that of (W · rowsᵀ)ᵀ and its copy, each with matrices that take turns."""
    count = max(8, 10**7 // (inputs * outputs))
    weights, x = torch.randn(count, outputs, inputs).unbind(), torch.randn(count, rows, inputs).unbind()
    out = torch.empty(count, rows, outputs).unbind()

    def turned() -> None:
        for w, r, o in zip(weights, x, out, strict=True):
            o.copy_(torch.mm(w, r.t()).t())

    ways = {"plain": lambda: _each(x, [w.t() for w in weights], out), "turned": turned}
    seconds = interleaved(ways, rounds)
    return statistics.median(a / b for a, b in zip(seconds["plain"], seconds["turned"], strict=True))


if __name__ == "__main__":
    main()
