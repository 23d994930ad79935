#!/usr/bin/env python
"""Where the time goes of what `zoo bench` measures: decoding and few tokens by module, training by operation.

    python scripts/profile_table.py --threads 1

First, one token of the models of `zoo bench generate` after up to 64, and of fine layers of `zoo bench layer`: the time
of a step, that of reading the weights which it needs, and the shares of each class of module without modules that it
calls. Clocks in every module would make a step of a tiny model longer: its time is taken without them. Second, a
training step of three models of `zoo bench train`: the operations that take the most, by torch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from zoo.accounting import count_parameters
from zoo.bench import generate, layer, train
from zoo.bench.rows import LIMIT, OURS, Options
from zoo.bench.timing import interleaved, reading
from zoo.generation import decode_step
from zoo.model import Decoder, build

STEPS = 64
"""Tokens in a round."""
TRAINED = ("mixtral", "deepseek-v3", "qwen3-moe")
OPERATIONS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = Options(rounds=args.rounds, threads=args.threads)
    for name, spec in generate._specs().items():
        model = build(spec.model).eval()
        for batch in generate.BATCHES:
            decoding(f"{name}, batch {batch}", model, batch, args.rounds)
    for name in ("fine-64", "fine-128"):
        few(f"{name}, forward, T 1", layer.SHAPES[name], options)
    for case in train.cases():
        if case.name in {f"{name}, sequence 256, vocabulary 2,048" for name in TRAINED}:
            training(case, options)


def decoding(name: str, model: Decoder, batch: int, rounds: int) -> None:
    """Print where a step of greedy decoding goes."""
    first = torch.randint(model.config.vocab_size, (batch, 1), generator=torch.Generator().manual_seed(0))
    parameters = count_parameters(model.config)
    needed, size = parameters.active_without_embedding, model.embed_tokens.weight.element_size()
    read = reading(size * needed, size * parameters.total, "cpu")

    def steps() -> None:
        cache, last = model.new_cache(batch, STEPS), first
        for _ in range(STEPS):
            last = decode_step(model, last, cache).argmax(-1, keepdim=True)

    by_module(name, model, torch.inference_mode()(steps), read if batch == 1 else None, rounds)


def few(name: str, shape: layer.Shape, options: Options) -> None:
    """Print where a layer goes with one token."""
    moe, _ = layer.one_layer(shape, options)
    inputs = torch.randn(layer.INPUTS, 1, 1, shape.hidden_size)
    touched = 4 * layer._touched(moe, inputs, shape.matrices)
    read = reading(touched, 4 * sum(p.numel() for p in moe.parameters()), "cpu")

    def calls() -> None:
        for step in range(STEPS):
            moe(inputs[step % len(inputs)])

    by_module(name, moe, torch.inference_mode()(calls), read, options.rounds)


def by_module(
    name: str, module: nn.Module, steps: Callable[[], None], read: Callable[[], object] | None, rounds: int
) -> None:
    """Print the time of one of ``STEPS`` steps, and what each class of module takes of it by itself."""
    spent: dict[str, float] = defaultdict(float)

    def clocked() -> None:
        with exclusive_times(module, spent):
            steps()

    ways: dict[str, Callable[[], object]] = {OURS: steps, "clocked": clocked}
    if read is not None:
        ways[LIMIT] = partial(_repeated, read)
    seconds = {way: statistics.median(times) / STEPS for way, times in interleaved(ways, rounds).items()}
    total = sum(spent.values())
    shares = ", ".join(
        f"{kind} {100 * taken / total:.0f}%" for kind, taken in sorted(spent.items(), key=lambda item: -item[1])
    )
    limit = f", reading {seconds[LIMIT] * 1e6:,.0f} µs" if read is not None else ""
    print(f"{name}: {seconds[OURS] * 1e6:,.0f} µs{limit}; {shares}", flush=True)


def _repeated(call: Callable[[], object]) -> None:
    for _ in range(STEPS):
        call()


@contextmanager
def exclusive_times(root: nn.Module, spent: dict[str, float]) -> Iterator[None]:
    """Add to ``spent`` the seconds within each class of module of ``root``, without those within their children."""
    inner: list[list[float]] = []
    handles = []

    def enter(module: nn.Module, args: Any) -> None:
        inner.append([time.perf_counter(), 0.0])

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        start, of_children = inner.pop()
        whole = time.perf_counter() - start
        spent[type(module).__name__] += whole - of_children
        if inner:
            inner[-1][1] += whole

    for module in root.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def training(case: train.Case, options: Options) -> None:
    """Print which operations a training step goes to."""
    tokens = torch.randint(case.spec.model.vocab_size, (case.batch, case.length + 1))
    step = train._zoo(case.spec, tokens, options).step
    (times,) = interleaved({OURS: step}, options.rounds, warmups=2).values()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(options.rounds):
            step()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:OPERATIONS]
    shares = ", ".join(
        f"{event.key} {100 * event.self_cpu_time_total / total:.0f}% ({event.count // options.rounds} calls)"
        for event in largest
    )
    print(f"{case.name}: {statistics.median(times) * 1e3:,.0f} ms; {shares}", flush=True)


if __name__ == "__main__":
    main()
