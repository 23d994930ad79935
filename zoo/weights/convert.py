"""Conversion between published checkpoints and zoo checkpoints, streaming and strict both ways."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.config import CONFIG_FILE, save_spec
from zoo.encoder_decoder_config import AnyConfig, AnySpec, EncoderDecoderConfig, load_any_spec
from zoo.families import exporting_family
from zoo.registry import published_spec, read_json
from zoo.weights.hub import download, is_hub_id
from zoo.weights.ops import Copies, Op, Shape, source_shapes
from zoo.weights.quantized import published_source
from zoo.weights.source import TensorSource, check_copy, check_tensors, refuse_pickle
from zoo.weights.stream import Export, Named, Stream, tracked
from zoo.weights.target import ADAPTER_FILE, MAX_SHARD_BYTES, copy_tokenizer, new_directory, write_tensors

if TYPE_CHECKING:
    import torch

    from zoo.encoder_decoder import EncoderDecoder
    from zoo.model import Decoder

PUBLISHED_HEAD = "lm_head.weight"
"""Stored by some checkpoints although it is tied to the embedding."""

TIED = "config.json ties them; set tie_word_embeddings to false there"
SHARED = "the model has one for both; give a checkpoint in which they are equal"


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    spec: AnySpec
    directory: Path
    parameters: int
    """Elements written, buffers included."""
    left_out: tuple[str, ...]
    """Source tensors that the family declares as not part of the model."""

    def as_json(self) -> str:
        """One JSON object for scripts."""
        return json.dumps(
            {
                "name": self.spec.name,
                "family": self.spec.family,
                "directory": str(self.directory),
                "parameters": self.parameters,
                "left_out": list(self.left_out),
            }
        )

    def as_text(self) -> str:
        """What a person reads at the end, with what was left out in plain sight."""
        lines = [f"{self.spec.name} ({self.spec.family}, {self.parameters:,} parameters): written to {self.directory}"]
        if self.left_out:
            names = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
            lines.append(f"left out, as not part of the model ({len(self.left_out)} in all): {names}")
        return "\n".join(lines)


def skeleton(config: AnyConfig) -> Decoder | EncoderDecoder:
    """The model that ``config`` describes, without memory for its parameters (on the meta device)."""
    import torch

    from zoo.encoder_decoder import EncoderDecoder
    from zoo.model import Decoder

    with torch.device("meta"):
        return EncoderDecoder(config) if isinstance(config, EncoderDecoderConfig) else Decoder(config)


def parameter_shapes(config: AnyConfig) -> dict[str, Shape]:
    """Name → shape of every tensor of the model's state, without allocating any."""
    return dict(_state(config)[0])


def shapes_of(model: Decoder | EncoderDecoder) -> dict[str, Shape]:
    """``parameter_shapes`` of a model that is there."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def buffer_names(config: AnyConfig) -> frozenset[str]:
    """Names of the tensors of the model's state that are no parameters, which keep their dtype when those change."""
    return _state(config)[1]


@lru_cache(maxsize=4)
def _state(config: AnyConfig) -> tuple[dict[str, Shape], frozenset[str]]:
    """Shapes and names of buffers; asked for several times of a model that is read or written."""
    model = skeleton(config)
    return shapes_of(model), frozenset(name for name, _ in model.named_buffers())


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> Conversion:
    """Convert a published checkpoint into the zoo checkpoint directory ``out``.

    Args:
        source: directory with ``config.json`` and safetensors, or a hub id.
        out: directory to make.
        dtype: of the parameters; by default that of the source, and bf16 for those that are quantised there.
        max_shard_bytes: size of the files written.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: a field of the config or a tensor that the zoo does not have, a tensor missing or of another
            shape, a number that ``dtype`` cannot express, a damaged file, a tokenizer larger than the embedding, or an
            ``out`` that exists.
        OSError: ``out`` cannot be written.
    """
    directory = published_directory(source)
    with open_published(directory, dtype) as (spec, tensors), new_directory(Path(out)) as aside:
        if is_hub_id(str(source)):
            spec = dataclasses.replace(spec, name=str(source).split("/")[1], source=str(source))
        copy_tokenizer(directory, aside, spec.model.vocab_size)
        write_tensors(aside, tracked(tensors, "importing", progress), max_shard_bytes)
        save_spec(spec, aside / CONFIG_FILE)
    return Conversion(spec, Path(out), _elements(spec.model), tensors.left_out)


def export_checkpoint(
    source: str | Path,
    hf_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> Conversion:
    """Convert the zoo checkpoint directory ``source`` into the layout its family is published in.

    ``config.json`` is written in the spelling that transformers 4 and 5 read. Parameters keep their dtype unless
    another ``dtype`` is asked for.

    Raises:
        ValueError: ``source`` is not a whole zoo checkpoint, its family cannot express the model, ``dtype`` cannot
            express a number, or ``hf_dir`` exists.
        OSError: ``hf_dir`` cannot be written.
    """
    directory = Path(source)
    if not (directory / CONFIG_FILE).is_file():
        raise ValueError(f"{directory}: no {CONFIG_FILE} in it; give a zoo checkpoint directory")
    if (directory / ADAPTER_FILE).is_file():
        raise ValueError(f"{directory}: its adapter cannot be merged, and no published layout has a place for it")
    spec = load_any_spec(directory / CONFIG_FILE)
    ops = exporting_family(spec).weight_map(spec.model)
    with open_zoo(directory, parameter_shapes(spec.model)) as tensors:
        outward = Export(ops, tensors, dtype=dtype, kept=buffer_names(spec.model))
        declared = str(dtype).removeprefix("torch.") if dtype else tensors.dtype("embed_tokens.weight")
        converted = tracked(outward, "exporting", progress)
        write_published(converted, spec, hf_dir, declared, directory, max_shard_bytes=max_shard_bytes)
    return Conversion(spec, Path(hf_dir), _elements(spec.model), ())


def write_published(
    tensors: Named, spec: AnySpec, hf_dir: str | Path, dtype: str, tokenizer_dir: Path | None, *, max_shard_bytes: int
) -> None:
    """Write a directory in the layout that the family of ``spec`` is published in.

    Args:
        tensors: in the order of the family's weight map, under published names.
        spec: of the model.
        hf_dir: directory to make.
        dtype: name of torch's dtype that config.json declares.
        tokenizer_dir: where tokenizer files are copied from, if there are any.
        max_shard_bytes: size of the files written.

    Raises:
        ValueError: the family cannot express the model, or ``hf_dir`` exists.
        OSError: ``hf_dir`` cannot be written.
    """
    published = exporting_family(spec).to_hf(spec.model)
    with new_directory(Path(hf_dir)) as aside:
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, aside, spec.model.vocab_size)
        write_tensors(aside, tensors, max_shard_bytes)
        published |= _special_ids(aside) | {"torch_dtype": dtype}
        (aside / "config.json").write_text(json.dumps(published, indent=2) + "\n", encoding="utf-8")


def published_directory(source: str | Path) -> Path:
    """Local directory of a published checkpoint; a hub id is downloaded.

    Raises:
        ValueError: there is no such directory, or a file, perhaps a pickle, is given instead.
    """
    if is_hub_id(str(source)):
        return download(str(source))
    path = Path(source)
    refuse_pickle(path)
    if not path.is_dir():
        kind = "is a file" if path.exists() else "no such directory"
        raise ValueError(f"{path}: {kind}; give a directory with config.json and safetensors, or a hub id")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: no config.json in it; give a directory in the published layout")
    return path


@dataclass(frozen=True)
class PublishedTensors:
    """What a published directory holds, by its config.json."""

    ops: list[Op]
    shapes: dict[str, Shape]
    """Name → shape of every tensor that must be there."""
    ignored: tuple[str, ...]
    """Regular expressions of those that may be there besides."""
    copies: tuple[str, ...]
    """Names under which the embedding is stored again: an output head tied to it, for example."""

    def repeated(self) -> Iterator[tuple[str, str, str]]:
        """(copy, original, what is to be said where they differ) of tensors that must be another one again."""
        for op in self.ops:
            if op.targets == ("embed_tokens.weight",):
                yield from ((copy, op.sources[0], TIED) for copy in self.copies)
            if isinstance(op, Copies):
                yield from ((copy, op.sources[0], SHARED) for copy in op.sources[1:])


def published_tensors(spec: AnySpec, hf: Mapping[str, Any], names: Collection[str]) -> PublishedTensors:
    """What the family of ``spec`` maps to; ``names``, of the tensors that are there, tell the layout."""
    family = exporting_family(spec)
    larger = family.larger(hf)
    fused = any(name.endswith(".experts.gate_up_proj") for name in names)
    ops = family.weight_map(spec.model, "fused" if fused else "per_expert")
    copies = family.embedding_copies + (PUBLISHED_HEAD,) * spec.model.tie_word_embeddings
    copies = tuple(name for name in copies if name in names)
    return PublishedTensors(
        ops=ops,
        shapes=source_shapes(ops, parameter_shapes(spec.model)),
        ignored=(*family.ignored(hf), *(larger.ignored if larger else ()), *map(re.escape, copies)),
        copies=copies,
    )


@contextmanager
def open_published(directory: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[AnySpec, Stream]]:
    """The model in a published directory and its tensors under our names, checked but not read yet.

    ``dtype`` is what parameters become where they are read whole; by default they stay as stored, and those in FP8
    become bf16.
    """
    spec = published_spec(directory)
    hf = read_json(directory / "config.json")
    with published_source(directory, hf, dtype) as source:
        published = published_tensors(spec, hf, source.entries)
        # In the order in which a model is saved, so that the same tensors make the same file.
        order = {name: i for i, name in enumerate(parameter_shapes(spec.model))}
        ops = sorted(published.ops, key=lambda op: order[op.targets[0]])
        left_out = check_tensors(source, published.shapes, ops, published.ignored)
        for copy, original, why in published.repeated():
            check_copy(source, copy, original, why)
        kept = buffer_names(spec.model) if dtype else ()
        shapes = parameter_shapes(spec.model)
        yield spec, Stream(ops, source, shapes, dtype=dtype, kept=kept, left_out=left_out)


@contextmanager
def open_zoo(directory: Path, shapes: Mapping[str, Shape]) -> Iterator[TensorSource]:
    """The tensors of a zoo checkpoint, checked against those of its model but not read yet."""
    with TensorSource(directory) as source:
        check_tensors(source, shapes, ())
        yield source


def _special_ids(directory: Path) -> dict[str, Any]:
    """Ids of transformers' config.json; null where there is no tokenizer, rather than the defaults of its classes."""
    from zoo.tokenizer import Tokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return {"bos_token_id": None, "eos_token_id": None}
    tokenizer = Tokenizer.load(directory)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _elements(config: AnyConfig) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())
