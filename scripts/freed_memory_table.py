#!/usr/bin/env python
"""What `zoo fit` and `zoo eval` gain on a CPU by keeping freed memory (`zoo.training.memory`).

    python scripts/freed_memory_table.py

Steps of `zoo bench train`'s models and forwards of as many tokens as are scored at a time, with freed memory kept and
without, in fresh processes that take turns; one line a model: medians of a step's time, its page faults and the peak of
the resident set without, the same with, and the median of the ratios of times within a round.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from zoo.bench import train
from zoo.bench.rows import Options
from zoo.model import build
from zoo.registry import find_spec
from zoo.training.memory import freed_memory_kept

CASES = ("cost, 8 experts", "cost, 64 experts", "scoring, llama-tiny", "scoring, mixtral-tiny")
SCORED = (32, 128)
"""Texts and tokens of each."""
WARMUPS, STEPS = 3, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(steps(args.case, args.keep, args.threads)))
        return
    for case in CASES:
        rounds = [[child(case, keep, args.threads) for keep in (False, True)] for _ in range(args.rounds)]
        ratio = statistics.median(without["seconds"] / kept["seconds"] for without, kept in rounds)
        texts = [
            f"{of['seconds'] * 1e3:5.0f} ms, {of['faults']:6.0f} faults, {of['peak'] / 2**20:5.0f} MiB"
            for of in (medians(way) for way in zip(*rounds, strict=True))
        ]
        print(f"{case:42} {texts[0]} | kept: {texts[1]} | {ratio:.2f}", flush=True)


def child(case: str, keep: bool, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", case, "--threads", str(threads), *(["--keep"] if keep else [])]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def medians(found: tuple[dict[str, float], ...]) -> dict[str, float]:
    return {key: statistics.median(of[key] for of in found) for key in found[0]}


def training(name: str, threads: int) -> Callable[[], object]:
    case = next(case for case in train.cases() if case.name == name)
    tokens = torch.randint(case.spec.model.vocab_size, (case.batch, case.length + 1))
    return train._zoo(case.spec, tokens, Options(threads=threads)).step


def scoring(name: str) -> Callable[[], object]:
    model = build(find_spec(name.removeprefix("scoring, ")).model).eval()
    ids = torch.randint(model.config.vocab_size, SCORED)
    return torch.inference_mode()(lambda: model(ids, logits_to_keep=None).hidden)


def steps(name: str, keep: bool, threads: int) -> dict[str, float]:
    """Of one case: seconds and page faults of a step, and the peak of the resident set in bytes."""
    torch.set_num_threads(threads)
    step = scoring(name) if name.startswith("scoring") else training(name, threads)
    context: Any = freed_memory_kept() if keep else nullcontext()
    seconds = []
    with context:
        for number in range(WARMUPS + STEPS):
            if number == WARMUPS:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": statistics.median(seconds[WARMUPS:]),
        "faults": (usage.ru_minflt - before) / STEPS,
        "peak": usage.ru_maxrss * 1024.0,
    }


if __name__ == "__main__":
    main()
