"""Small published checkpoints, to be damaged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.config import ModelSpec
from zoo.families import get_family
from zoo.model import build
from zoo.registry import find_spec
from zoo.weights.source import INDEX_FILE, SINGLE_FILE

Tensors = dict[str, Tensor]


def small(name: str) -> ModelSpec:
    """A config of the zoo, cut down to two layers and a small vocabulary."""
    spec = find_spec(name)
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, num_layers=2, vocab_size=600))


def published(spec: ModelSpec, directory: Path, **config: object) -> Path:
    """Random weights of ``spec`` in its published layout; ``config`` is added to config.json."""
    model, ops = build(spec.model), get_family(spec.family).weight_map(spec.model)
    state = model.state_dict()
    directory.mkdir(parents=True)
    tensors = {name: t.clone() for op in ops for name, t in op.to_published(lambda name: state[name])}
    save_file(tensors, directory / SINGLE_FILE)
    (directory / "config.json").write_text(json.dumps(get_family(spec.family).to_hf(spec.model) | config))
    return directory


def rewrite(directory: Path, change: Callable[[Tensors], object]) -> None:
    """Apply ``change`` to the tensors of a single-file checkpoint."""
    tensors = load_file(directory / SINGLE_FILE)
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE)


def sharded(directory: Path) -> dict[str, str]:
    """Split a single-file checkpoint into two shards; returns the index's weight_map."""
    tensors = load_file(directory / SINGLE_FILE)
    (directory / SINGLE_FILE).unlink()
    weight_map = {}
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
