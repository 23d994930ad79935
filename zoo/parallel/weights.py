"""Weights of a parallelized model from checkpoints, and checkpoints from it; no rank ever holds the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from zoo.config import CONFIG_FILE, ModelConfig, ModelSpec, load_spec
from zoo.encoder_decoder_config import decoder_spec
from zoo.families import exporting_family
from zoo.model import Decoder
from zoo.parallel.torch_private import gathered, local_slices
from zoo.weights.convert import open_published, open_zoo, parameter_shapes, write_published
from zoo.weights.loading import checkpoint_directory, write_zoo
from zoo.weights.ops import Region, Shape
from zoo.weights.target import MAX_SHARD_BYTES

Named = Iterator[tuple[str, Tensor]]


@torch.no_grad()
def load_weights(model: Decoder, source: str | Path) -> None:
    """Fill ``model`` from a checkpoint, in place. Each rank reads its own slices only; there is no communication.

    Args:
        model: parallelized, with memory.
        source: as for ``zoo.load``: a zoo checkpoint, a directory in a published layout, a name or a hub id.

    Raises:
        ValueError: nothing to load under that name, or a checkpoint of another architecture.
    """
    directory = checkpoint_directory(source)
    if (directory / CONFIG_FILE).is_file():
        _check_config(load_spec(directory / CONFIG_FILE).model, model, source)
        with open_zoo(directory, parameter_shapes(model.config)) as tensors:
            _fill(model, lambda name, region, shape: tensors.read_region(name, region))
    else:
        with open_published(directory, next(model.parameters()).dtype) as (spec, stream):
            _check_config(decoder_spec(spec).model, model, source)
            _fill(model, stream.read_region)


def _check_config(config: ModelConfig, model: Decoder, source: str | Path) -> None:
    if config != model.config:
        raise ValueError(f"{source}: holds another architecture than the model's; give a checkpoint of this model")


def _fill(model: Decoder, read: Callable[[str, Region, Shape], Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.numel():
            local.copy_(read(name, local_slices(tensor), tuple(tensor.shape)))


def save_model(
    model: Decoder,
    spec: ModelSpec,
    directory: str | Path,
    tokenizer_dir: str | Path | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """``zoo.weights.save_model`` from any layout, byte for byte. Every rank calls it; rank 0 writes.

    Raises:
        ValueError, OSError: on every rank; what was in ``directory`` is as it was.
    """

    def write(tensors: Named) -> None:
        write_zoo(tensors, spec, directory, tokenizer_dir, max_shard_bytes=max_shard_bytes)

    _check_config(spec.model, model, f"spec {spec.name!r}")
    _write_on_first_rank(((name, _whole(tensor)) for name, tensor in model.state_dict().items()), write)


def export(
    model: Decoder,
    spec: ModelSpec,
    hf_dir: str | Path,
    tokenizer_dir: str | Path | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """``zoo.weights.export_checkpoint`` from any layout, byte for byte. Every rank calls it; rank 0 writes.

    Tensors are gathered one group of the family's weight map at a time. Rank 0 holds a group and a file's worth.

    Raises:
        ValueError, OSError: on every rank; nothing is left in ``hf_dir``.
    """
    _check_config(spec.model, model, f"spec {spec.name!r}")
    state = model.state_dict()
    ops = exporting_family(spec).weight_map(spec.model)
    tensors = (pair for op in ops for pair in op.to_published(lambda name: _whole(state[name])))
    dtype = str(state["embed_tokens.weight"].dtype).removeprefix("torch.")
    tokenizer = None if tokenizer_dir is None else Path(tokenizer_dir)

    def write(tensors: Named) -> None:
        write_published(tensors, spec, hf_dir, dtype, tokenizer, max_shard_bytes=max_shard_bytes)

    _write_on_first_rank(tensors, write)


def _whole(tensor: Tensor) -> Tensor:
    """[...] on the CPU; every rank of the tensor's mesh calls it."""
    return (gathered(tensor) if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _write_on_first_rank(tensors: Named, write: Callable[[Named], None]) -> None:
    """Rank 0 writes what all ranks gather together, and all raise what rank 0 raises."""
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            write(tensors)
        except (ValueError, OSError) as error:
            failure = error
    for _ in tensors:  # on the other ranks; and on the first after a failure, so that none waits for it
        pass
    outcome = [failure]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]
