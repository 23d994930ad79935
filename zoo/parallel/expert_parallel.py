"""Expert parallelism: tokens travel to the ranks that hold their experts, and the weighted results travel back.

A token is sent once to each rank that holds any of its experts, however many of them that rank holds, and comes back
as one row, already weighted and summed. That is at most ``most_destinations`` rows a token, which is how node-limited
routing (arXiv 2405.04434, section 2.2.3) limits the traffic: experts of a group are neighbours, so they share ranks.

Shapes: T tokens, D model, E experts, K top-k, M expert ranks, R rows sent, Q rows received, N routed rows here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from zoo.config import MoEConfig
from zoo.moe.experts import Experts, experts_grouped, experts_split, grouped_applies
from zoo.moe.layer import MoE
from zoo.moe.router import RouterOutput
from zoo.parallel.collectives import Exchange, Traffic, exchange_sizes, gather_tokens, slice_tokens


def most_destinations(moe: MoEConfig, expert_ranks: int) -> int:
    """Rows that one token can cost at most each way: the ranks over which its K experts can be spread."""
    if expert_ranks % moe.num_groups == 0:
        reach = moe.top_k_groups * (expert_ranks // moe.num_groups)
    elif moe.num_groups % expert_ranks == 0:
        reach = moe.top_k_groups
    else:
        reach = expert_ranks
    return min(moe.top_k, expert_ranks, reach)


@dataclass(frozen=True, eq=False, kw_only=True)
class Flight:
    """An exchange under way."""

    rows: Tensor
    """Link to the rows [Q, D]."""
    exchange: Exchange
    weights: Tensor
    """Link to the weights [Q, K]."""
    weight_exchange: Exchange
    experts: Tensor
    """[Q, K], experts of this rank, numbered from 0; ``local_experts`` stands for an expert elsewhere."""
    local_experts: int
    """E / M."""
    token: Tensor
    """[R], which token each sent row is."""
    slice_size: int
    """Tokens of this rank."""
    tokens: int
    """T, tokens of all tensor ranks."""


@dataclass(frozen=True, eq=False)
class Arrived:
    """What ``combine`` needs to undo a dispatch."""

    flight: Flight
    weights: Tensor
    """[N]"""
    row: Tensor
    """[N], which received row each expert row is a copy of."""


class ExchangeDispatcher(ABC):
    """A ``zoo.moe.dispatch.Dispatcher`` between ranks, in two steps, so that something may be computed between them.

    Args:
        expert_group: Ranks that hold the experts, in order: rank m has experts m·E/M to (m + 1)·E/M.
        tensor_group: Ranks that hold the same tokens; each dispatches its share of them.
    """

    def __init__(self, expert_group: dist.ProcessGroup, tensor_group: dist.ProcessGroup | None = None) -> None:
        self.expert_group, self.tensor_group = expert_group, tensor_group
        self.ranks = dist.get_world_size(expert_group)
        self.traffic = Traffic()

    @abstractmethod
    def start(self, x: Tensor, routing: RouterOutput) -> Any:
        """Send tokens x [T, D] on their way."""

    @abstractmethod
    def finish(self, flight: Any) -> tuple[Tensor, Tensor, Any]:
        """Await the tokens and sort them: (rows [N, D] sorted by expert, counts [E / M], state of ``combine``)."""

    @abstractmethod
    def combine(self, rows: Tensor, state: Any) -> Tensor:
        """rows [N, D] → [T, D], each token's sum over its experts of weight · row."""

    def dispatch(self, x: Tensor, routing: RouterOutput) -> tuple[Tensor, Tensor, Any]:
        """Both steps at once; rows and counts are those of the experts of this rank."""
        return self.finish(self.start(x, routing))

    def share(self, x: Tensor) -> Tensor:
        """This tensor rank's share of x [T, ...]."""
        return x if self.tensor_group is None else slice_tokens(x, self.tensor_group)

    def unshare(self, part: Tensor, tokens: int) -> Tensor:
        """The shares of all tensor ranks → [T, ...]."""
        return part if self.tensor_group is None else gather_tokens(part, tokens, self.tensor_group)


class AllToAllDispatcher(ExchangeDispatcher):
    """Uneven exchanges, no token dropped. The host waits for the sizes of each."""

    def start(self, x: Tensor, routing: RouterOutput) -> Flight:
        """See ``ExchangeDispatcher``."""
        tokens, local_experts = len(x), routing.scores.shape[-1] // self.ranks
        x, weights, experts = (self.share(t) for t in (x, routing.weights, routing.experts))
        destination = experts // local_experts
        wanted = torch.zeros(len(x), self.ranks, dtype=torch.bool, device=x.device).scatter_(1, destination, True)
        rank, token = wanted.t().nonzero(as_tuple=True)
        send, receive = exchange_sizes(wanted.sum(0), self.expert_group)
        there = destination[token] == rank.unsqueeze(1)
        ids = torch.where(there, experts[token] - rank.unsqueeze(1) * local_experts, local_experts).to(torch.int32)
        id_exchange, weight_exchange, exchange = (
            Exchange(send, receive, self.expert_group, self.traffic) for _ in range(3)
        )
        received_ids = id_exchange.wait(id_exchange.start(ids))
        sent_weights = weight_exchange.start(weights[token] * there)
        rows = exchange.start(x.index_select(0, token))
        return Flight(
            rows=rows,
            exchange=exchange,
            weights=sent_weights,
            weight_exchange=weight_exchange,
            experts=received_ids,
            local_experts=local_experts,
            token=token,
            slice_size=len(x),
            tokens=tokens,
        )

    def finish(self, flight: Flight) -> tuple[Tensor, Tensor, Arrived]:
        """See ``ExchangeDispatcher``."""
        weights = flight.weight_exchange.wait(flight.weights)
        rows = flight.exchange.wait(flight.rows)
        ids = flight.experts.flatten()
        counts = torch.bincount(ids, minlength=flight.local_experts + 1)[: flight.local_experts]
        # Experts elsewhere have the highest number: they are sorted to the end, and cut off.
        order = ids.argsort(stable=True)[: int(counts.sum())]
        row = order // flight.experts.shape[1]
        return rows.index_select(0, row), counts, Arrived(flight, weights.flatten().index_select(0, order), row)

    def combine(self, rows: Tensor, state: Arrived) -> Tensor:
        """See ``ExchangeDispatcher``. Both sums are taken in the dtype of the weights, fp32 at least."""
        flight, weights = state.flight, state.weights
        there = rows.new_zeros((len(flight.experts), rows.shape[1]), dtype=weights.dtype)
        there = there.index_add(0, state.row, rows.to(weights.dtype) * weights.unsqueeze(1))
        back = Exchange(flight.exchange.receive, flight.exchange.send, self.expert_group, self.traffic)
        returned = back.wait(back.start(there.to(rows.dtype)))
        out = returned.new_zeros((flight.slice_size, rows.shape[1]), dtype=weights.dtype)
        out = out.index_add(0, flight.token, returned.to(weights.dtype)).to(rows.dtype)
        return self.unshare(out, flight.tokens)


def forward_local_experts(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    """``Experts.forward`` where the parameters are DTensors, of which this rank computes its own experts."""
    assert isinstance(experts.gate_up, DTensor) and isinstance(experts.down, DTensor)
    gate_up, down = experts.gate_up.to_local(), experts.down.to_local()
    if len(rows) == 0:
        # No token came: products without rows, so that all ranks agree that there are gradients (of zero).
        return rows @ gate_up[0, 0].T @ down[0].T
    if grouped_applies(rows):
        return experts_grouped(rows, counts, gate_up, down)
    return experts_split(rows, counts, gate_up, down)


def forward_overlapped(moe: MoE, x: Tensor) -> tuple[Tensor, RouterOutput]:
    """``MoE.forward`` with the shared experts computed while the tokens travel. x [B, S, D]."""
    dispatcher, shared_experts = moe.dispatcher, moe.shared_experts
    assert isinstance(dispatcher, ExchangeDispatcher) and shared_experts is not None
    tokens = x.flatten(0, 1)
    routing = moe.router(tokens)
    flight = dispatcher.start(tokens, routing)
    shared = shared_experts(x)
    if moe.shared_expert_gate is not None:
        shared = shared * moe.shared_expert_gate(x).sigmoid()
    rows, counts, state = dispatcher.finish(flight)
    return dispatcher.combine(moe.experts(rows, counts), state).view_as(x) + shared, routing
