"""Which dispatcher carries tokens between the expert ranks: the one place that chooses it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from zoo.parallel.capacity import CapacityDispatcher
from zoo.parallel.collectives import Traffic
from zoo.parallel.deep_ep import DeepEPDispatcher, deep_ep_applies, make_buffer
from zoo.parallel.expert_parallel import AllToAllDispatcher, ExchangeDispatcher
from zoo.parallel.torch_private import unflatten


def choose_exchange(
    expert: DeviceMesh,
    tensor_group: dist.ProcessGroup | None,
    *,
    ranks_per_node: int,
    capacity_factor: float | None,
    dtype: torch.dtype,
    hidden_size: int,
) -> Callable[[], ExchangeDispatcher]:
    """What makes the dispatcher of one MoE layer after the other. Every rank calls it: groups may be made.

    Args:
        expert: The expert ranks, neighbours in the world.
        tensor_group: Ranks that hold the same tokens, if there are several.
        ranks_per_node: Neighbouring ranks of the world that share the fast network.
        capacity_factor: Bound on what an expert takes; by default nothing is dropped.
        dtype: Of the rows.
        hidden_size: Their length.

    Raises:
        ValueError: a number that makes no sense.
    """
    if ranks_per_node < 1:
        raise ValueError(f"ranks_per_node = {ranks_per_node}: give the number of processes that share fast links")
    if capacity_factor is not None:
        group, factor = expert.get_group(), capacity_factor
        return lambda: CapacityDispatcher(group, Traffic(ranks_per_node), tensor_group, factor=factor)
    if deep_ep_applies(expert.device_type, dtype, hidden_size, expert.size(), ranks_per_node):
        buffer = make_buffer(expert.get_group(), hidden_size)
        return lambda: DeepEPDispatcher(buffer, Traffic(ranks_per_node), tensor_group)
    groups = [expert.get_group()]
    if spans_nodes(expert.size(), ranks_per_node):
        grid = unflatten(expert, (expert.size() // ranks_per_node, ranks_per_node), ("expert_node", "expert_in_node"))
        groups = [grid.get_group("expert_node"), grid.get_group("expert_in_node")]
    return lambda: AllToAllDispatcher(groups, Traffic(ranks_per_node), tensor_group)


def spans_nodes(expert_ranks: int, ranks_per_node: int) -> bool:
    """Whether expert ranks fill several nodes of several ranks each, so that a second hop saves traffic."""
    return 1 < ranks_per_node < expert_ranks and expert_ranks % ranks_per_node == 0
