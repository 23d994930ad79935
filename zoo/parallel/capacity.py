"""Expert parallelism with a bounded capacity: every shape is known beforehand, and the host waits for nothing.

Shapes: T tokens of this rank, D model, E experts, K top-k, M expert ranks, C capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.moe.dispatch import weighted_sum
from zoo.moe.router import RouterOutput
from zoo.parallel.collectives import Exchange, Traffic
from zoo.parallel.expert_parallel import ExchangeDispatcher


@dataclass(frozen=True, eq=False)
class Slots:
    """Where each assignment went."""

    link: Tensor
    exchange: Exchange
    weights: Tensor
    """[T, K], 0 where the assignment was dropped."""
    slot: Tensor
    """[T·K] in a buffer [E, C]; E·C where it was dropped."""
    capacity: int
    """C."""
    tokens: int
    """Tokens of all tensor ranks."""


class CapacityDispatcher(ExchangeDispatcher):
    """Each rank sends at most C = ceil(K·T·factor / E) tokens to an expert (GShard, arXiv 2006.16668, section 3.2).

    What exceeds it is dropped in left-to-right order: a token's place depends on the tokens before it in the batch
    only, where a priority by score would leak the future. The block then passes a dropped token through its residual.
    Unused slots travel as zeros. Every rank must have equally many tokens in each step.

    Args:
        expert_group: Ranks that hold the experts, in order: rank m has experts m · E / M to (m + 1) · E / M.
        traffic: Where the bytes are counted.
        tensor_group: Ranks that hold the same tokens.
        factor: Capacity over the balanced load.
    """

    def __init__(
        self,
        expert_group: dist.ProcessGroup,
        traffic: Traffic,
        tensor_group: dist.ProcessGroup | None = None,
        *,
        factor: float,
    ) -> None:
        if not factor > 0:
            raise ValueError(f"capacity_factor = {factor}: give a positive number such as 1.25, or none for no limit")
        super().__init__(traffic, tensor_group)
        self.expert_group, self.ranks = expert_group, dist.get_world_size(expert_group)
        self.factor = factor

    def start(self, x: Tensor, routing: RouterOutput) -> Slots:
        """See ``ExchangeDispatcher``."""
        tokens, num_experts = len(x), routing.scores.shape[-1]
        top_k = routing.experts.shape[-1]
        x, weights, experts = (self.share(t) for t in (x, routing.weights, routing.experts))
        shares = 1 if self.tensor_group is None else dist.get_world_size(self.tensor_group)
        capacity = math.ceil(top_k * -(-tokens // shares) * self.factor / num_experts)
        place = places(experts.flatten(), num_experts)
        kept = place < capacity
        slot = torch.where(kept, experts.flatten() * capacity + place, num_experts * capacity)
        # The last row takes what is dropped, and is cut off.
        buffer = x.new_zeros((num_experts * capacity + 1, x.shape[1]))
        buffer = buffer.index_copy(0, slot, x.repeat_interleave(top_k, dim=0))[:-1]
        sizes = [num_experts // self.ranks * capacity] * self.ranks
        exchange = Exchange(sizes, sizes, self.expert_group, self.traffic)
        return Slots(exchange.start(buffer), exchange, weights * kept.view_as(weights), slot, capacity, tokens)

    def finish(self, flight: Slots) -> tuple[Tensor, Tensor, Slots]:
        """See ``ExchangeDispatcher``; an expert has M·C rows, whatever came."""
        arrived = flight.exchange.wait(flight.link)
        capacity = flight.capacity
        by_expert = arrived.view(self.ranks, -1, capacity, arrived.shape[1]).transpose(0, 1).flatten(0, 2)
        local_experts = len(arrived) // (self.ranks * capacity)
        counts = torch.full((local_experts,), self.ranks * capacity, device=arrived.device)
        return by_expert, counts, flight

    def combine(self, rows: Tensor, state: Slots) -> Tensor:
        """See ``ExchangeDispatcher``. The weighted sum is taken in the router's fp32 and cast once."""
        capacity = state.capacity
        by_rank = rows.view(-1, self.ranks, capacity, rows.shape[1]).transpose(0, 1).flatten(0, 2)
        back = Exchange(state.exchange.receive, state.exchange.send, self.expert_group, self.traffic)
        returned = back.wait(back.start(by_rank))
        padded = torch.cat((returned, returned.new_zeros((1, returned.shape[1]))))
        chosen = padded.index_select(0, state.slot).view(*state.weights.shape, -1)
        return self.unshare(weighted_sum(state.weights, chosen), state.tokens)


def places(experts: Tensor, num_experts: int) -> Tensor:
    """experts [N] → [N], how many times the same expert stands further left."""
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=num_experts)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - first[experts[order]]
    return place
