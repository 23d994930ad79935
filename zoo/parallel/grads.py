"""Gradients of a model whose parameters live on different meshes: sums, norm, clipping, accumulation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from zoo.parallel.mesh import Meshes


def sum_over_data(value: Tensor, meshes: Meshes) -> Tensor:
    """Sum of ``value`` over the ranks with different batches, the same on all ranks.

    For label counts, logged losses, and the expert counts of loss-free balancing and of a balance loss over the global
    batch (``zoo.moe.balance``): tensor ranks route the same tokens, and are not summed over.
    """
    total = value.detach().clone()
    if meshes.sizes.data > 1:
        dist.all_reduce(total, group=meshes.data.get_group())
    return total


@torch.no_grad()
def global_norm(parameters: Iterable[nn.Parameter], pipeline: DeviceMesh | None = None) -> Tensor:
    """2-norm of all gradients together, each parameter counted once however it is sharded; fp32 at least.

    Where ``parameters`` are those of one stage, ``pipeline`` is the mesh of the stages (``Meshes.pipeline``).
    Every rank calls it; the result is a scalar that is equal on all ranks that hold the same data, up to a gradient
    that is not finite on some rank only (see ``all_finite``).
    """
    # By ranks, not by process group: DTensor remembers the result of an operation by the value of its mesh. Where a
    # process has used several layouts it may return an equal mesh with other groups, and not so on every rank.
    parts: dict[tuple[tuple[int, ...], ...], list[Tensor]] = defaultdict(list)
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            mesh, placements = gradient.device_mesh, gradient.placements
            # Not `is_shard`: FSDP over tensor parallelism has a placement of its own.
            split = [mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate()]
            over = [tuple(dist.get_process_group_ranks(group)) for group in split]
            groups = dict(zip(over, split, strict=True)) | groups
            parts[tuple(over)].append(gradient.to_local())
        elif gradient is not None:
            parts[()].append(gradient)
    total = torch.zeros(())
    for ranks, gradients in parts.items():
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        square = torch.nn.utils.get_total_norm([g.to(wide) for g in gradients]).square()
        for together in ranks:
            dist.all_reduce(square, group=groups[together])
        total = total.to(square) + square
    if pipeline is not None:
        dist.all_reduce(total, group=pipeline.get_group())
    return total.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients so that their global norm, which is ``norm`` now, is at most ``max_norm``."""
    for group in _by_mesh(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)


def all_finite(values: Tensor) -> Tensor:
    """Which of ``values`` are finite on every rank of the world: the same answer on all, so that all skip or none."""
    finite = torch.isfinite(values.detach()).to(torch.int32)
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return finite.bool()


def set_last_micro_batch(model: nn.Module, last: bool) -> None:
    """Reduce gradients in the next backward pass (``last``), or keep them on this rank: call it before each.

    Before the last micro-batch of a step nothing is reduced over data ranks: gradients stay as large as the gathered
    parameters until then. On one rank there is nothing to reduce.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[Sequence[nn.Parameter]]:
    """Parameters with a gradient, grouped by the mesh they live on: torch's functions take one mesh at a time."""
    groups: dict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return list(groups.values())
