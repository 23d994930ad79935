"""Every call into torch that is not public API. torch is pinned; each function has its own test."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def unflatten(mesh: DeviceMesh, sizes: Sequence[int], names: Sequence[str]) -> DeviceMesh:
    """The ranks of a one-dimensional ``mesh`` seen as a grid, last name fastest.

    Two views of one mesh belong together: FSDP joins dimensions of one view with a parameter on another.
    """
    return mesh._unflatten(0, tuple(sizes), tuple(names))


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Where the local part of ``tensor`` lies in the whole; empty slices on a rank that holds nothing.

    A tensor that is not distributed is the whole.
    """
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def gathered(tensor: DTensor) -> Tensor:
    """The whole of ``tensor``; every rank of its mesh calls it.

    torch warns that splits along several mesh dimensions are gathered one after the other, once a process: that is so,
    and nothing that the user could change.
    """
    level = _REDISTRIBUTE_LOG.level
    _REDISTRIBUTE_LOG.setLevel(logging.ERROR)
    try:
        return tensor.full_tensor()
    finally:
        _REDISTRIBUTE_LOG.setLevel(level)


_REDISTRIBUTE_LOG = logging.getLogger("torch.distributed.tensor._redistribute")


def waited(tensor: Tensor) -> Tensor:
    """``tensor`` once the collective that makes it has ended.

    Recomputation stops as soon as it has what it wants: a result that nobody reads would never be waited for, and torch
    would keep it for ever.
    """
    result: Tensor = _Waited.apply(tensor) if isinstance(tensor, AsyncCollectiveTensor) else tensor
    return result


class _Waited(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: AsyncCollectiveTensor) -> Tensor:
        return tensor.wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def set_timeout(timeout: timedelta) -> None:
    """Let every collective fail that some rank does not join within ``timeout``, in all groups that there are now.

    A mesh makes its groups with the 30 minutes that are torch's own, whatever the world was given.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)


def collectives_begun() -> int:
    """How many collectives this process has begun, over all its groups; any thread may ask."""
    groups: list[Any] = list(distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)
