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
from zoo.parallel.apply import moe_layers, replace_forward


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
    """Steps of ``zoo bench train``'s models, blocks compiled as ``parallel.compile_backend: inductor`` has them.

    Then once more with MoE layers left out of the graphs, so that they are computed as without a compiler.
    """
    options = Options(rounds=rounds)
    for spec in (training.mixtral(), training.deepseek(), training.qwen()):
        tokens = torch.randint(spec.model.vocab_size, (8, 257))
        for part in ("whole blocks", "all but MoE layers"):
            learner = training._zoo(spec, tokens, options)
            assert isinstance(learner.model, Decoder)
            if part != "whole blocks":
                for _, moe in moe_layers(learner.model):
                    replace_forward(moe, torch.compiler.disable(moe.forward))
            for block in learner.model.layers:
                block.compile(backend="inductor")
            start = time.perf_counter()
            learner.step()
            seconds = time.perf_counter() - start
            graphs = counters["stats"]["unique_graphs"]
            ways = {"eager": training._zoo(spec, tokens, options).step, "compiled": learner.step}
            show(f"{spec.name}, {part}", seconds, ways, rounds, 8 * 256)
            print(f"  graphs compiled in later steps: {counters['stats']['unique_graphs'] - graphs}", flush=True)


def show(name: str, seconds: float, ways: dict[str, Callable[[], object]], rounds: int, tokens: int) -> None:
    times = interleaved(ways, rounds)
    ratio = statistics.median(a / b for a, b in zip(times["eager"], times["compiled"], strict=True))
    eager, compiled = (tokens / statistics.median(times[way]) for way in ways)
    print(
        f"{name}: compile {seconds:.0f} s, tokens/s {eager:.0f} eager, {compiled:.0f} compiled: {ratio:.2f}", flush=True
    )


if __name__ == "__main__":
    main()
