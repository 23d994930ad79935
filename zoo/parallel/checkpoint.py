"""Sharded training checkpoints: written by all ranks, whole or not there at all, and read in any other layout.

A checkpoint is a directory: torch.distributed.checkpoint's files with the tensors ``model.NAME`` and
``optimizer.NAME.KEY`` (NAME of a parameter, KEY of its optimizer state) and ``meta.pt`` with everything else.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from zoo.files import replacing, sync
from zoo.parallel.checkpoint_index import Reader
from zoo.parallel.torch_private import local_slices

META_FILE = "meta.pt"
MODEL, OPTIMIZER = "model.", "optimizer."
PARTIAL = ".{}.partial"
"""Name of a checkpoint that is being written or removed."""

Tensors = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------


class Saver:
    """Writes checkpoints, one at a time. Every rank makes one, and calls its methods in the same order.

    Args:
        timeout: After which a rank that does not join the others is an error; torch's own by default.
        background: Copy the tensors to host memory and write them in a thread while training goes on. Its collectives
            go through a group of its own: nothing says in which order they meet those of the training.
    """

    def __init__(self, timeout: timedelta | None, *, background: bool) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._background = background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._staged: Tensors = {}
        self._writing: Future[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether this rank's part in the last checkpoint is over, well or not."""
        return self._writing is None or self._writing.done()

    def save(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Write a checkpoint, or begin to; afterwards what is in it may change.

        Args:
            path: Directory to make.
            checkpoint: ``state_dict`` of this rank's shards, one ``optimizer_state`` in ``optimizer_states``, and
                anything else, of which rank 0's is kept.

        Raises:
            OSError: on every rank, where one could not write this one or, in the background, the one before.
        """
        self.wait()
        (optimizer,) = checkpoint["optimizer_states"]
        tensors = {f"{MODEL}{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
        tensors |= {f"{OPTIMIZER}{name}": tensor for name, tensor in optimizer["state"].items()}
        meta = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        packed = io.BytesIO()
        torch.save(meta | {"optimizer_states": [{"param_groups": optimizer["param_groups"]}]}, packed)
        if self._background:
            self._stage(tensors)
            self._writing = self._thread.submit(_write, path, self._staged, packed.getvalue(), self._group)
        else:
            _write(path, tensors, packed.getvalue(), self._group)

    def wait(self) -> None:
        """Return once no checkpoint is being written.

        Raises:
            OSError: on every rank, where one could not write the last one.
        """
        if self._writing is None:
            return
        error = self._writing.exception()
        self._writing = None
        if error is not None:
            raise error

    @torch.no_grad()
    def _stage(self, tensors: Tensors) -> None:
        """Copy ``tensors``, into the memory of the last copy where there is one."""
        for name, tensor in tensors.items():
            if name in self._staged:
                self._staged[name].copy_(tensor)
            else:
                self._staged[name] = tensor.detach().to("cpu", copy=True)


def _write(path: Path, tensors: Tensors, meta: bytes, group: dist.ProcessGroup) -> None:
    """Write beside ``path``, sync to disk, then rename.

    A rank that is killed meanwhile leaves ``path`` and all other checkpoints as they were.
    """
    aside = path.with_name(PARTIAL.format(path.name))
    # Staged tensors are in host memory already; without looking ahead torch does not touch a GPU from the thread.
    writer = FileSystemWriter(aside, per_thread_copy_ahead=0)
    try:
        _on_first_rank(lambda: _prepare(aside), group)
        # Its own steps are collective: it returns once every rank has synced its files, and raises on all or none.
        dcp.save(tensors, storage_writer=writer, process_group=group)
        _on_first_rank(lambda: _complete(aside, path, meta), group)
    except (OSError, CheckpointException) as error:
        _on_first_rank(lambda: shutil.rmtree(aside, ignore_errors=True), group)
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


def _on_first_rank(function: Callable[[], None], group: dist.ProcessGroup) -> None:
    """Let rank 0 call ``function``; all ranks wait for it, and raise the ``OSError`` that it raises."""
    outcome: list[OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            function()
        except OSError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise outcome[0]


def _prepare(aside: Path) -> None:
    for left_by_a_kill in aside.parent.glob(PARTIAL.format("*")):
        _delete(left_by_a_kill)
    aside.mkdir(parents=True)


def _complete(aside: Path, path: Path, meta: bytes) -> None:
    with replacing(aside / META_FILE) as file:
        file.write(meta)
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
        path: directory that a ``Saver`` wrote, or file of a run in one process.
        model: state dict of this rank's shards.
        optimizer: over the same parameters in the same groups.
        names: of the optimizer's parameters.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    if path.is_file():
        return _load_file(path, model, optimizer, names)
    reader = Reader(path)
    stored = reader.tensors()
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
    reader = Reader(path)
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in reader.tensors().items()}
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
