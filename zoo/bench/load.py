"""Loading a sharded checkpoint, each time in a fresh process: from the published layout and from our own.

The checkpoint is in the style of Mixtral, a tensor an expert and matrix, in four shards; it is made once and kept. The
files are in the page cache. The limit is one copy of their bytes into memory. Memory is the growth of the process's
resident set to its peak (``zoo/bench/load_child.py``). Loading is timed without imports; the way from the start of a
process to its first token has them in it.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zoo.accounting import count_parameters, weight_bytes
from zoo.bench.peers import check_equal
from zoo.bench.rows import LIMIT, OURS, Options, Row
from zoo.config import AttentionConfig, ModelConfig, ModelSpec
from zoo.model import build
from zoo.registry import find_spec
from zoo.weights import export_checkpoint, save_model

PEER = "transformers"
LAYOUTS = {"published layout": "published", "own layout": "own"}
"""What ours loads → its directory; transformers loads the published one."""
LOADING, FIRST_TOKEN = "load", "start of a process to its first token"
SHARDS = 4
SMALL = 200_000_000
"""Below so many bytes the model is narrow, so that a checkpoint of a few megabytes has layers as well."""

Child = dict[str, Any]
"""What a process reports."""


def rows(options: Options) -> Iterator[Row]:
    """Seconds of loading, and to the first token, from each layout."""
    wanted = {
        layout: [what for what in (LOADING, FIRST_TOKEN) if options.wants(f"{layout}, {what}")] for layout in LAYOUTS
    }
    if not any(wanted.values()):
        return
    if sys.platform != "linux":
        raise ValueError("load: peak memory is read from /proc, which only Linux has; leave this subject out")
    importlib.import_module(PEER)  # where the extra is missing, no checkpoint is made
    checkpoint, size = made(options)
    for layout, whats in wanted.items():
        if LOADING in whats:
            yield _loading(layout, checkpoint, size, options)
        if FIRST_TOKEN in whats:
            yield _first_token(layout, checkpoint, options)


def made(options: Options) -> tuple[Path, int]:
    """Directory with the checkpoint in both layouts, ``published`` and ``own``, and bytes of its weights."""
    spec = sized(options.checkpoint_bytes, options.dtype.itemsize)
    size = weight_bytes(spec.model, options.dtype.itemsize)
    name = str(options.dtype).removeprefix("torch.")
    place = options.cache / f"mixtral-{spec.model.hidden_size}x{spec.model.num_layers}-{name}"
    own, published = place / "own", place / "published"
    if not own.is_dir():
        save_model(build(spec.model, dtype=options.dtype), spec, own, max_shard_bytes=size // SHARDS)
    if not published.is_dir():
        export_checkpoint(own, published, max_shard_bytes=size // SHARDS)
    return place, size


def sized(size: int, itemsize: int) -> ModelSpec:
    """A model in the style of Mixtral with as many layers as come near to ``size`` bytes."""
    width = 64 if size < SMALL else 512
    tiny = find_spec("mixtral-tiny")
    moe = tiny.model.moe
    assert moe is not None

    def with_layers(layers: int) -> ModelConfig:
        return replace(
            tiny.model,
            vocab_size=16 * width,
            hidden_size=width,
            num_layers=layers,
            intermediate_size=7 * width // 2,
            attention=AttentionConfig(num_heads=width // 64, num_kv_heads=max(1, width // 128), head_dim=64),
            moe=replace(moe, moe_intermediate_size=7 * width // 2),
        )

    one, two = (itemsize * count_parameters(with_layers(layers)).total for layers in (1, 2))
    return replace(tiny, model=with_layers(max(1, 1 + round((size - one) / (two - one)))))


def _loading(layout: str, checkpoint: Path, size: int, options: Options) -> Row:
    warm_up, _ = made(replace(options, checkpoint_bytes=1))
    ways = {
        OURS: partial(child, "zoo", checkpoint / LAYOUTS[layout], options, warm_up / LAYOUTS[layout]),
        PEER: partial(child, "transformers", checkpoint / "published", options, warm_up / "published"),
        LIMIT: partial(child, "read", checkpoint / LAYOUTS[layout], options),
    }
    rounds = _rounds(ways, options.rounds)
    _check(layout, rounds, options)
    seconds = {way: [one["seconds"] for one in children] for way, children in rounds.items()}
    peaks = {way: int(statistics.median(one["bytes"] for one in children)) for way, children in rounds.items()}
    shares = ", ".join(f"{way} {peak / size:.2f}" for way, peak in peaks.items() if way != LIMIT)
    notes = {"weight_bytes": size, "remark": f"peak over the weights: {shares}"}
    return Row("load", f"{layout}, {LOADING}", seconds, peaks, notes)


def _first_token(layout: str, checkpoint: Path, options: Options) -> Row:
    ways = {
        OURS: partial(child, "zoo", checkpoint / LAYOUTS[layout], options),
        PEER: partial(child, "transformers", checkpoint / "published", options),
    }
    rounds = _rounds(ways, options.rounds)
    _check(layout, rounds, options)
    seconds = {way: [one["first_token"] for one in children] for way, children in rounds.items()}
    return Row("load", f"{layout}, {FIRST_TOKEN}", seconds)


def _rounds(ways: Mapping[str, Callable[[], Child]], rounds: int) -> dict[str, list[Child]]:
    """What each way reports in each round, after one that brings the files into the page cache."""
    names = list(ways)
    found: dict[str, list[Child]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(ways[name]())
    return {name: children[1:] for name, children in found.items()}


def _check(layout: str, rounds: Mapping[str, list[Child]], options: Options) -> None:
    ours, theirs = (torch.tensor(rounds[way][0]["logits"]) for way in (OURS, PEER))
    check_equal(layout, PEER, ours, theirs, options.dtype)


def child(way: str, directory: Path, options: Options, warm_up: Path | None = None) -> Child:
    """What ``load_child`` reports; ``first_token`` in seconds from the start of the process.

    Raises:
        RuntimeError: the process failed; its last line on standard error says why.
    """
    dtype = str(options.dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "zoo.bench.load_child", way, str(directory), dtype, options.device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    start = time.time()
    done = subprocess.run(
        [*command, *([] if warm_up is None else [str(warm_up)])], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{way} could not load {directory}: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    result: Child = json.loads(done.stdout)
    return result | ({"first_token": result["first_token"] - start} if "first_token" in result else {})
