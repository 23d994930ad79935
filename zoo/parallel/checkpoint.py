"""Sharded training checkpoints: written by all ranks, whole or not there at all, and read in any other layout.

A checkpoint is a directory: torch.distributed.checkpoint's files with the tensors ``model.NAME`` and
``optimizer.NAME.KEY`` (NAME of a parameter, KEY of its optimizer state) and ``meta.pt`` with everything else.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from zoo.files import replacing, sync
from zoo.parallel.torch_private import local_slices

META_FILE = "meta.pt"
MODEL, OPTIMIZER = "model.", "optimizer."
PARTIAL = ".{}.partial"
"""Name of a checkpoint that is being written or removed."""

Tensors = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------


def save(path: Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    """Write a checkpoint beside ``path``, sync it to disk, then rename it. Every rank calls it.

    A rank that is killed meanwhile leaves ``path`` and all other checkpoints as they were.

    Raises:
        OSError: on every rank, where one of them cannot write.
    """
    aside = path.with_name(PARTIAL.format(path.name))
    try:
        on_first_rank(lambda: _prepare(aside))
        # Its own steps are collective: it returns once every rank has synced its files, and raises on all or none.
        dcp.save(tensors, storage_writer=FileSystemWriter(aside))
        on_first_rank(lambda: _complete(aside, path, meta))
    except (OSError, RuntimeError, CheckpointException) as error:
        on_first_rank(lambda: shutil.rmtree(aside, ignore_errors=True))
        raise unwritable(path, error) from error


def unwritable(path: Path, error: BaseException) -> OSError:
    """``error`` as one line that says what is still there and what to do."""
    return OSError(
        f"{path}: cannot write the checkpoint: {_cause(error)}; earlier checkpoints are intact: make room and run the "
        "same command again to go on from the latest"
    )


def _cause(error: BaseException) -> str:
    """The operating system's reason where there is one, below whatever a library made of it."""
    if isinstance(error, CheckpointException):
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_cause(failure)}"
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return " ".join(str(error).split())


def on_first_rank(function: Callable[[], None]) -> None:
    """Let rank 0 call ``function``; all ranks wait for it, and raise what it raises. Every rank calls this."""
    outcome: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            function()
        except (OSError, RuntimeError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]


def _prepare(aside: Path) -> None:
    for left_by_a_kill in aside.parent.glob(PARTIAL.format("*")):
        _delete(left_by_a_kill)
    aside.mkdir(parents=True)


def _complete(aside: Path, path: Path, meta: dict[str, Any]) -> None:
    with replacing(aside / META_FILE) as file:
        torch.save(meta, file)
    sync(aside)
    if path.exists():
        remove(path)
    os.replace(aside, path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint, of one process or of several; killed meanwhile, it is there in full or not at all."""
    gone = path.with_name(PARTIAL.format(f"{path.name}.removed"))
    os.replace(path, gone)
    _delete(gone)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Any]:
    """``optimizer.state_dict()`` with names in place of numbers: ``state`` NAME.KEY → tensor, and ``param_groups``."""
    return {
        "state": {
            f"{names[parameter]}.{key}": value
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        },
        "param_groups": [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups],
    }


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load(path: Path, model: Tensors, optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> Any:
    """Fill ``model`` and ``optimizer`` from a checkpoint of any layout, and return the rest of it. Every rank calls it.

    Args:
        path: directory of ``save``, or file of a run in one process.
        model: state dict of this rank's shards.
        optimizer: over the same parameters in the same groups.
        names: of the optimizer's parameters.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    if path.is_file():
        return _load_file(path, model, optimizer, names)
    reader = _Reader(path)
    stored = _stored(reader)
    _check_names(path, {key.removeprefix(MODEL) for key in stored if key.startswith(MODEL)}, model)
    parameters = {name: parameter for parameter, name in names.items()}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, entry in stored.items():
        if key.startswith(OPTIMIZER):
            name, _, kind = key.removeprefix(OPTIMIZER).rpartition(".")
            states[name][kind] = _like(parameters[name], entry)
    tensors = {f"{MODEL}{name}": tensor for name, tensor in model.items()}
    tensors |= {f"{OPTIMIZER}{name}.{kind}": t for name, state in states.items() for kind, t in state.items()}
    dcp.load(tensors, storage_reader=reader)
    meta = torch.load(path / META_FILE, map_location="cpu", weights_only=True)
    for name, state in states.items():
        optimizer.state[parameters[name]] = state
    _set_groups(optimizer, meta["optimizer_states"])
    return meta


def load_alone(path: Path) -> dict[str, Any]:
    """The checkpoint in ``path`` as the one dict that one process would have saved."""
    reader = _Reader(path)
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in _stored(reader).items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    checkpoint: dict[str, Any] = torch.load(path / META_FILE, map_location="cpu", weights_only=True)
    checkpoint["state_dict"] = {k.removeprefix(MODEL): t for k, t in tensors.items() if k.startswith(MODEL)}
    (saved,) = checkpoint["optimizer_states"]
    order = [name for group in saved["param_groups"] for name in group["params"]]
    state: dict[int, Tensors] = {}
    for key, tensor in tensors.items():
        if key.startswith(OPTIMIZER):
            name, _, kind = key.removeprefix(OPTIMIZER).rpartition(".")
            state.setdefault(order.index(name), {})[kind] = tensor
    groups = [{**group, "params": [order.index(name) for name in group["params"]]} for group in saved["param_groups"]]
    checkpoint["optimizer_states"] = [{"state": state, "param_groups": groups}]
    return checkpoint


def _load_file(path: Path, model: Tensors, optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> Any:
    """From a checkpoint of one process; memory-mapped, so that each rank reads what it keeps."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    _check_names(path, checkpoint["state_dict"].keys(), model)
    for name, whole in checkpoint["state_dict"].items():
        _copy_slice(model[name], whole)
    (saved,) = checkpoint["optimizer_states"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in saved["state"].items():
        parameter = parameters[index]
        optimizer.state[parameter] = {
            key: _copy_slice(torch.empty_like(parameter) if value.shape == parameter.shape else value.clone(), value)
            for key, value in state.items()
        }
    _set_groups(optimizer, [saved])
    return checkpoint


def _copy_slice(target: Tensor, whole: Tensor) -> Tensor:
    if isinstance(target, DTensor):
        target.to_local().copy_(whole[local_slices(target)])
    else:
        target.copy_(whole)
    return target


def _like(parameter: Tensor, entry: TensorStorageMetadata) -> Tensor:
    """Memory for a moment, sharded as its parameter, or for a number such as the step."""
    dtype = entry.properties.dtype
    if entry.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype)
    return torch.empty(entry.size, dtype=dtype, device=parameter.device)


def _set_groups(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    for group, before in zip(optimizer.param_groups, saved[0]["param_groups"], strict=True):
        group.update({key: value for key, value in before.items() if key != "params"})


def _check_names(path: Path, found: Iterable[str], model: Tensors) -> None:
    different = sorted(set(found) ^ model.keys())
    if different:
        raise ValueError(f"{path}: tensor {different[0]!r} is in the checkpoint or in the model, but not in both")


def _stored(reader: FileSystemReader) -> dict[str, TensorStorageMetadata]:
    entries = reader.read_metadata().state_dict_metadata
    return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


class _Reader(FileSystemReader):
    """torch's, except that its index, which is a pickle, can hold nothing but descriptions of tensors."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            ValueError: it names a file outside the checkpoint, or holds anything that an index does not.
        """
        metadata = _IndexUnpickler((Path(self.path) / ".metadata").read_bytes()).load()
        for info in metadata.storage_data.values():
            if not re.fullmatch(r"__\d+_\d+\.distcp", info.relative_path):
                raise ValueError(f"{self.path}: names {info.relative_path!r} as a file of its own; it is not one")
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    _CLASSES = frozenset(
        {
            *(
                f"torch.distributed.checkpoint.metadata.{name}"
                for name in (
                    *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
                    *("TensorProperties", "_MEM_FORMAT_ENCODING"),
                )
            ),
            "torch.distributed.checkpoint.filesystem._StorageInfo",
            "torch.serialization._get_layout",
            "torch.Size",
            "pathlib.PosixPath",
        }
    )

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        """Look up one of the few names that an index needs."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if f"{module}.{name}" not in self._CLASSES and not is_dtype:
            raise ValueError(f"the checkpoint's index holds {module}.{name}; it was not written by zoo fit")
        return super().find_class(module, name)
