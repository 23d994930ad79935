#!/usr/bin/env python
"""The figures of docs/performance.md on torch.compile: compiled beside eager, in turn, on one thread.

    python scripts/compile_table.py decode
    python scripts/compile_table.py train

One line a model: seconds to compile, medians of both, and the median of the ratios within a round. Delete what
TORCHINDUCTOR_CACHE_DIR names for the time of a first compilation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch._dynamo.utils import counters

from zoo.bench import generate as decoding
from zoo.bench import train as training
from zoo.bench.rows import Options
from zoo.bench.timing import interleaved
from zoo.compiled import CompiledStep
from zoo.generation import generate
from zoo.model import Decoder, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=("decode", "train"))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    (decode if args.subject == "decode" else train)(args.rounds)


def decode(rounds: int) -> None:
    """Greedy tokens of one prompt, as ``zoo bench generate`` makes them."""
    for name, spec in decoding._specs().items():
        model = build(spec.model).eval()
        ids = torch.randint(model.config.vocab_size, (1, decoding.PROMPT))
        start = time.perf_counter()
        step = CompiledStep(model)
        seconds = time.perf_counter() - start
        eager = partial(generate, model, ids, max_new_tokens=decoding.NEW)
        ways = {"eager": eager, "compiled": partial(eager, step=step)}
        assert ways["eager"]() == ways["compiled"](), name
        show(name, seconds, ways, rounds, decoding.NEW)


def train(rounds: int) -> None:
    """Steps of ``zoo bench train``'s models, blocks compiled as ``parallel.compile_backend: inductor`` has them."""
    options = Options(rounds=rounds)
    for spec in (training.mixtral(), training.deepseek(), training.qwen()):
        tokens = torch.randint(spec.model.vocab_size, (8, 257))
        ways: dict[str, Callable[[], None]] = {"eager": training._zoo(spec, tokens, options).step}
        learner = training._zoo(spec, tokens, options)
        assert isinstance(learner.model, Decoder)
        for block in learner.model.layers:
            block.compile(backend="inductor")
        start = time.perf_counter()
        learner.step()
        seconds = time.perf_counter() - start
        ways["compiled"] = learner.step
        before = counters["stats"]["unique_graphs"]
        show(spec.name, seconds, ways, rounds, 8 * 256)
        again = counters["stats"]["unique_graphs"] - before
        reasons = ", ".join(sorted({str(reason).partition("\n")[0] for reason in counters["graph_break"]}))
        print(f"  compiled again in later steps: {again}; graph breaks: {reasons or 'none'}", flush=True)


def show(name: str, seconds: float, ways: dict[str, Callable[[], object]], rounds: int, tokens: int) -> None:
    times = interleaved(ways, rounds)
    ratio = statistics.median(a / b for a, b in zip(times["eager"], times["compiled"], strict=True))
    eager, compiled = (tokens / statistics.median(times[way]) for way in ways)
    print(
        f"{name}: compile {seconds:.0f} s, tokens/s {eager:.0f} eager, {compiled:.0f} compiled: {ratio:.2f}", flush=True
    )


if __name__ == "__main__":
    main()
