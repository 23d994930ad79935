#!/usr/bin/env python
"""What a token costs in training as experts are added at the same active parameters: the Mixtral-style model of
`zoo bench train`, ours alone.

    python scripts/cost_table.py

One line for each number of experts and of tokens in a step: milliseconds of the step, of AdamW's part of it, and the
cost of a token over that with the fewest experts, with AdamW and without; medians of rounds in which all take turns.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch

from zoo.accounting import count_parameters
from zoo.bench import train
from zoo.bench.rows import Options
from zoo.bench.timing import interleaved
from zoo.training.memory import freed_memory_kept

EXPERTS = (8, 16, 32, 64)
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], metavar="N", help="of a step")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with freed_memory_kept():
        for tokens in args.tokens:
            table(tokens, args.threads, args.rounds)


def table(tokens: int, threads: int, rounds: int) -> None:
    """Print the lines of one number of tokens."""
    ways = {}
    for experts in EXPERTS:
        spec = train.mixtral(num_experts=experts)
        ids = torch.randint(spec.model.vocab_size, (tokens // LENGTH, LENGTH + 1))
        learner = train._zoo(spec, ids, Options(threads=threads))
        ways[f"{experts} step"] = learner.step
        ways[f"{experts} gradients"] = partial(gradients, learner)
    seconds = interleaved(ways, rounds)
    for experts in EXPERTS:
        ratios = [
            statistics.median(
                a / b for a, b in zip(seconds[f"{experts} {of}"], seconds[f"{EXPERTS[0]} {of}"], strict=True)
            )
            for of in ("step", "gradients")
        ]
        step, of_gradients = (1e3 * statistics.median(seconds[f"{experts} {of}"]) for of in ("step", "gradients"))
        total = count_parameters(train.mixtral(num_experts=experts).model).total
        print(
            f"{tokens:6,} tokens, {experts:3} experts, {total / 1e6:4.0f}M parameters: step {step:5.0f} ms, AdamW "
            f"{step - of_gradients:4.0f} ms; a token {ratios[0]:.2f}, without AdamW {ratios[1]:.2f}",
            flush=True,
        )


def gradients(learner: train.Learner) -> None:
    """A step without the optimizer's part."""
    learner.loss().backward()
    learner.adamw.zero_grad()


if __name__ == "__main__":
    main()
