"""Moving tokens to their experts and back.

Where an expert lives is known to the ``Dispatcher`` alone: another place is another one of these.

Shapes: T tokens, D model, E experts, K top-k, N routed rows: T·K, less those that no expert takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.moe.router import RouterOutput


class Dispatcher(Protocol):
    """Brings the rows of each expert together, and sums an expert's results back into its tokens."""

    def dispatch(self, x: Tensor, routing: RouterOutput) -> tuple[Tensor, Tensor, Any]:
        """x [T, D] → (rows [N, D] sorted by expert, counts [E] int64 rows of each expert, what ``combine`` needs)."""
        ...

    def combine(self, rows: Tensor, state: Any) -> Tensor:
        """rows [N, D] → [T, D], each token's sum over its experts of weight · row."""
        ...


@dataclass(frozen=True, eq=False)
class _Sorted:
    weights: Tensor
    """[T, K]"""
    place: Tensor
    """[N] row that assignment t·K + k was sorted to."""


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which token each routed row is a copy of, and what its result is multiplied with; rows are sorted by expert."""

    token: Tensor
    """[N] int64"""
    weight: Tensor
    """[N]"""
    counts: Tensor
    """[E] int64, rows of each expert."""


def assign(routing: RouterOutput) -> Assignment:
    """The rows of all T tokens, in the order of ``LocalDispatcher``."""
    experts, order = routing.destinations.flatten().sort(stable=True)
    counts = run_lengths(experts, routing.scores.shape[-1])
    if routing.kept is not None:
        # What no expert takes has the highest number: it is sorted to the end, and cut off.
        order = order[: int(counts.sum())]
    weight = routing.weights.flatten().index_select(0, order)
    return Assignment(order // routing.experts.shape[-1], weight, counts)


@dataclass(frozen=True, eq=False)
class _Kept:
    assignment: Assignment
    tokens: int
    """T"""


class KeptDispatcher:
    """All experts at hand, and rows of the kept assignments only; a token without any comes back as zeros."""

    def dispatch(self, x: Tensor, routing: RouterOutput) -> tuple[Tensor, Tensor, _Kept]:
        """See ``Dispatcher``."""
        assignment = assign(routing)
        return x.index_select(0, assignment.token), assignment.counts, _Kept(assignment, len(x))

    def combine(self, rows: Tensor, state: _Kept) -> Tensor:
        """See ``Dispatcher``. Sums are taken in the weights' fp32, also under autocast, and cast once."""
        weight = state.assignment.weight.unsqueeze(1)
        out = weight.new_zeros(state.tokens, rows.shape[1])
        return out.index_add(0, state.assignment.token, rows.to(weight.dtype) * weight).to(rows.dtype)


class LocalDispatcher:
    """All experts at hand: one stable sort by expert, no token dropped."""

    def dispatch(self, x: Tensor, routing: RouterOutput) -> tuple[Tensor, Tensor, _Sorted]:
        """See ``Dispatcher``."""
        experts, order = routing.experts.flatten().sort(stable=True)
        counts = run_lengths(experts, routing.scores.shape[-1])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        rows: Tensor = _Gather.apply(x, order, place, routing.experts.shape[-1])
        return rows, counts, _Sorted(routing.weights, place)

    def combine(self, rows: Tensor, state: _Sorted) -> Tensor:
        """See ``Dispatcher``."""
        chosen: Tensor = _Permute.apply(rows, state.place)
        return weighted_sum(state.weights, chosen.view(*state.weights.shape, rows.shape[1]))


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """weights [T, K], rows [T, K, D] → [T, D], summed in the weights' fp32, also under autocast, and cast once."""
    with torch.autocast(rows.device.type, enabled=False):
        return torch.bmm(weights.unsqueeze(1), rows.to(weights.dtype)).squeeze(1).to(rows.dtype)


def run_lengths(experts: Tensor, num_experts: int) -> Tensor:
    """experts [N] int64 in ascending order → [num_experts] int64, how often each is there; higher ones do not count.

    ``torch.bincount``, in one call on the CPU; on a GPU it would wait to be told the largest.
    """
    if experts.device.type == "cpu":
        return torch.bincount(experts, minlength=num_experts)[:num_experts]
    numbers = torch.arange(num_experts, device=experts.device)
    return torch.searchsorted(experts, numbers, right=True).diff(prepend=experts.new_zeros(1))


class _Gather(torch.autograd.Function):
    """rows[i] = x[order[i] // K]. The backward is a gather and a sum over K, where autograd's would scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        return grads[0].index_select(0, place).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """out[i] = rows[place[i]] for a permutation ``place``: the backward writes each row once and adds nothing."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return rows.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return torch.empty_like(grads[0]).index_copy_(0, place, grads[0]), None
