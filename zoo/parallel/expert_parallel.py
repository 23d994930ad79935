"""Expert parallelism: tokens travel to the ranks that hold their experts, and the weighted results travel back.

A token is sent once to each rank that holds any of its experts, however many of them that rank holds, and comes back
as one row, already weighted and summed. That is at most ``most_destinations`` rows a token, which is how node-limited
routing (arXiv 2405.04434, section 2.2.3) limits the traffic: experts of a group are neighbours, so they share ranks.

Where the expert ranks span nodes, it crosses the network once to each node that has any of its experts, to the rank
there with the same place in its node, and goes on from there over the links within the node (arXiv 2412.19437, section
3.2.2); the results are summed within the node before they cross back.

Shapes: T tokens, D model, E experts, K top-k, M expert ranks, Q received rows, N routed rows here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from zoo.config import MoEConfig
from zoo.layers.sequence import SequenceLayout
from zoo.moe.experts import StackedExperts
from zoo.moe.layer import MoE
from zoo.moe.router import RouterOutput
from zoo.parallel.collectives import Traffic, gather_tokens, slice_tokens
from zoo.parallel.hop import Hop
from zoo.parallel.rows import copy_rows, weighted_sum_rows


def most_destinations(moe: MoEConfig, expert_ranks: int) -> int:
    """Rows that one token can cost at most each way: the ranks over which its K experts can be spread."""
    if expert_ranks % moe.num_groups == 0:
        reach = moe.top_k_groups * (expert_ranks // moe.num_groups)
    elif moe.num_groups % expert_ranks == 0:
        reach = moe.top_k_groups
    else:
        reach = expert_ranks
    return min(moe.top_k, expert_ranks, reach)


@dataclass(frozen=True, eq=False)
class Flight:
    """Tokens under way."""

    hops: list[Hop]
    """The first is under way."""
    tokens: int
    """T, tokens of all tensor ranks."""


@dataclass(frozen=True, eq=False)
class Sorted:
    """What was made of received rows."""

    weights: Tensor
    """[N]"""
    row: Tensor
    """[N], which received row each expert row is a copy of."""
    received: int
    """Q."""


def sort_by_expert(rows: Tensor, weights: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Sorted]:
    """Received rows → (rows [N, D] sorted by expert, counts [num_experts], where they came from).

    Args:
        rows: [Q, D].
        weights: [Q, K].
        experts: [Q, K] int64, numbers of this rank's experts; ``num_experts`` stands for one elsewhere.
        num_experts: E / M, of this rank.
    """
    ids = experts.flatten()
    counts = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    # Experts elsewhere have the highest number: they are sorted to the end, and cut off.
    order = ids.argsort(stable=True)[: int(counts.sum())]
    row = order // experts.shape[1]
    return copy_rows(rows, row), counts, Sorted(weights.flatten().index_select(0, order), row, len(rows))


class ExchangeDispatcher(ABC):
    """A ``zoo.moe.dispatch.Dispatcher`` between ranks, in two steps, so that something may be computed between them.

    Args:
        traffic: Where the bytes are counted.
        tensor_group: Ranks that hold the same tokens; each dispatches its share of them.
    """

    def __init__(self, traffic: Traffic, tensor_group: dist.ProcessGroup | None = None) -> None:
        self.traffic, self.tensor_group = traffic, tensor_group

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
    """Uneven exchanges, no token dropped. The host waits for the sizes of each.

    Args:
        groups: The hops: of one group, the ranks that hold the experts, in order: rank m has experts m · E / M to
            (m + 1) · E / M. Of two, the ranks with this one's place in every node, then the ranks of its node.
        traffic: Where the bytes are counted.
        tensor_group: Ranks that hold the same tokens.
    """

    def __init__(
        self, groups: Sequence[dist.ProcessGroup], traffic: Traffic, tensor_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(traffic, tensor_group)
        self.groups = groups

    def start(self, x: Tensor, routing: RouterOutput) -> Flight:
        """See ``ExchangeDispatcher``."""
        experts, num_experts = self.share(routing.destinations), routing.scores.shape[-1]
        hops: list[Hop] = []
        for group in self.groups:
            hops.append(Hop(experts, num_experts, group, self.traffic))
            experts, num_experts = hops[-1].experts, hops[-1].num_experts
        hops[0].start(self.share(x), self.share(routing.weights))
        return Flight(hops, len(x))

    def finish(self, flight: Flight) -> tuple[Tensor, Tensor, tuple[Flight, Sorted]]:
        """See ``ExchangeDispatcher``."""
        *_, last = flight.hops
        rows, weights = flight.hops[0].wait()
        for hop in flight.hops[1:]:
            hop.start(rows, weights)
            rows, weights = hop.wait()
        rows, counts, order = sort_by_expert(rows, weights, last.experts, last.num_experts)
        return rows, counts, (flight, order)

    def combine(self, rows: Tensor, state: tuple[Flight, Sorted]) -> Tensor:
        """See ``ExchangeDispatcher``. Sums are taken in fp32 at least, and rounded before each hop."""
        flight, order = state
        rows = weighted_sum_rows(rows, order.weights, order.row, order.received)
        for hop in reversed(flight.hops):
            rows = hop.back(rows)
        return self.unshare(rows, flight.tokens)


def forward_local_experts(experts: StackedExperts, rows: Tensor, counts: Tensor) -> Tensor:
    """``StackedExperts.forward`` where the parameters are DTensors, of which this rank computes its own experts."""
    weights = [cast(DTensor, parameter).to_local() for parameter in experts.weights]
    if len(rows) == 0:
        # No token came: sums without terms, so that all ranks agree that there are gradients (of zero).
        return rows + sum(weight.flatten()[0] for weight in weights)
    return experts.compute(rows, counts, *weights)


def forward_overlapped(moe: MoE, x: Tensor, layout: SequenceLayout | None = None) -> tuple[Tensor, RouterOutput]:
    """``MoE.forward`` with the shared experts computed while the tokens travel. x [B, S, D]."""
    dispatcher, shared_experts = moe.dispatcher, moe.shared_experts
    assert isinstance(dispatcher, ExchangeDispatcher) and shared_experts is not None
    tokens = x.flatten(0, 1)
    tokens, routing = moe.route(tokens, layout)
    flight = dispatcher.start(tokens, routing)
    shared = shared_experts(x)
    if moe.shared_expert_gate is not None:
        shared = shared * moe.shared_expert_gate(x).sigmoid()
    rows, counts, state = dispatcher.finish(flight)
    return dispatcher.combine(moe.experts(rows, counts), state).view_as(x) + shared, routing
