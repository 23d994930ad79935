"""Time the ways of computing experts, side by side in one process, against a dense FFN of equal active size.

    python scripts/benchmark_experts.py --threads 2

Rounds are interleaved and medians printed, because absolute times on a shared machine drift. ``dense`` is one SwiGLU
of width K·F: the same arithmetic without routing, so the limit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from zoo.config import MoEConfig
from zoo.layers.ffn import SwiGLU
from zoo.moe.dispatch import LocalDispatcher
from zoo.moe.experts import Experts, experts_grouped, experts_loop, experts_split
from zoo.moe.router import Router

SHAPES = {"coarse": (512, 1792, 8, 2), "fine": (512, 224, 64, 6), "tiny": (128, 128, 8, 2)}
"""name → D, F, E, K"""
TOKENS = 2048


def candidates(hidden: int, ffn: int, num_experts: int, top_k: int) -> dict[str, Callable[[], Tensor]]:
    """Name → one forward over ``TOKENS`` tokens: routing, dispatch, experts, combine."""
    router = Router(
        hidden,
        MoEConfig(
            num_experts=num_experts,
            top_k=top_k,
            moe_intermediate_size=ffn,
            score_func="softmax",
            norm_topk_prob=True,
        ),
    )
    experts, dense = Experts(num_experts, hidden, ffn), SwiGLU(hidden, ffn * top_k)
    for parameter in [*router.parameters(), *experts.parameters(), *dense.parameters()]:
        torch.nn.init.normal_(parameter, std=0.05)
    x, dispatcher = torch.randn(TOKENS, hidden, requires_grad=True), LocalDispatcher()

    def moe(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        rows, counts, state = dispatcher.dispatch(x, router(x))
        return dispatcher.combine(function(rows, counts, experts.gate_up, experts.down), state)

    return {
        "loop": lambda: moe(experts_loop),
        "split": lambda: moe(experts_split),
        "grouped": lambda: moe(experts_grouped),
        "dense": lambda: dense(x),
    }


def measure(forwards: dict[str, Callable[[], Tensor]], backward: bool, rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in forwards}
    for round_number in range(rounds + 1):
        for name, forward in forwards.items():
            start = time.perf_counter()
            if backward:
                out = forward()
                out.backward(torch.ones_like(out))
            else:
                with torch.no_grad():
                    forward()
            if round_number:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: round(statistics.median(t), 1) for name, t in times.items()}


def main() -> None:
    """Print one line a shape and mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {args.threads} threads"
    results = [
        {"shape": name, "mode": mode, **measure(candidates(*shape), mode == "forward + backward", args.rounds)}
        for name, shape in SHAPES.items()
        for mode in ("forward", "forward + backward")
    ]
    if args.json:
        print(json.dumps({"machine": machine, "date": str(datetime.date.today()), "ms": results}, indent=2))
        return
    print(f"{machine}, {datetime.date.today()}; T = {TOKENS}, median ms of {args.rounds}")
    for row in results:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
