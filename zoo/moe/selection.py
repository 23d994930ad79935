"""Ways of choosing who goes where, and who is left out, as functions of scores; none has a gradient.

Shapes: B batch, S sequence, T = B·S tokens, E experts, K top-k.
"""

from __future__ import annotations

from fractions import Fraction
from typing import overload

import torch
from torch import Tensor

SINKHORN_ITERATIONS = 20
"""Enough for loads within a percent of each other, of logits within a few units."""

GOLDEN = -7046029254386353131
"""2⁶⁴ / φ as a signed number, the multiplier of Fibonacci hashing (Knuth, volume 3, section 6.4)."""


@overload
def capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int: ...
@overload
def capacity(tokens: Tensor, top_k: int, num_experts: int, factor: float) -> Tensor: ...
def capacity(tokens: int | Tensor, top_k: int, num_experts: int, factor: float) -> int | Tensor:
    """ceil(K · tokens · factor / E), the most tokens that an expert takes (arXiv 2202.08906).

    In whole numbers: floating-point ones would round 1.1 · 10 / 11 up to 2.
    """
    ratio = Fraction(str(factor)) * top_k / num_experts
    return -(-tokens * ratio.numerator // ratio.denominator)


def within_capacity(experts: Tensor, num_experts: int, capacity: int | Tensor, counted: Tensor | None) -> Tensor:
    """Which assignments find a place, in the order in which they stand in their sequence.

    From left to right, so that no token takes the place of an earlier one: a priority by score would leak the future,
    and so would the second choices of all tokens after the first choices of all (arXiv 2006.16668, algorithm 1).

    Args:
        experts: [B, N] int64, the experts that the tokens of each sequence chose.
        num_experts: E.
        capacity: assignments of one sequence that an expert takes; one number, or [B, 1].
        counted: [B, N] bool, False for what takes no place and has none, such as padding.

    Returns:
        [B, N] bool.
    """
    rows = torch.arange(len(experts), device=experts.device).unsqueeze(1) * num_experts
    key = (rows + experts).flatten()
    if counted is not None:
        key = key.where(counted.flatten(), len(experts) * num_experts)
    # As many places as assignments before it: those of equal keys are neighbours after a stable sort.
    ordered, order = key.sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    kept = place.view_as(experts) < capacity
    return kept if counted is None else kept & counted


def use_second(weights: Tensor, threshold: float) -> Tensor:
    """weights [T, 2] → [T, 2] bool: always the first, the second with probability min(1, weight / threshold).

    arXiv 2006.16668 (algorithm 1) with threshold 0.5, ST-MoE (arXiv 2202.08906) with 0.2.
    """
    used = torch.rand_like(weights) * threshold < weights
    used[:, 0] = True
    return used


def expert_choice(scores: Tensor, top_k: int, valid: Tensor | None) -> Tensor:
    """scores [B, S, E] → [B, S, E] bool, the K·S/E tokens of each sequence that every expert chooses.

    Expert choice (arXiv 2202.09368, equation 1), with the mean number K of experts of a token for its capacity factor
    c, rounded up. ``valid`` [B, S] is False for padding, which is neither chosen nor counted in S.
    """
    if valid is None:
        valid = torch.ones_like(scores[..., 0], dtype=torch.bool)
    order = scores.masked_fill(~valid.unsqueeze(-1), -torch.inf).argsort(dim=1, descending=True, stable=True)
    most = capacity(valid.sum(dim=1), top_k, scores.shape[-1], 1.0)
    return (order.argsort(dim=1) < most[:, None, None]) & valid.unsqueeze(-1)


def sinkhorn(logits: Tensor, valid: Tensor | None) -> Tensor:
    """logits [T, E] → [T, E], how much of each token goes to each expert, if all experts are to get equally much.

    The plan with the largest Σ p·logits + entropy(p) whose rows sum to 1 and columns to T/E (Sinkhorn's algorithm, in
    logarithms): what BASE layers (arXiv 2103.16716) solve as an assignment, smoothed (arXiv 2202.01169).
    ``valid`` [T] is False for padding, which weighs nothing.
    """
    plan = logits.log_softmax(dim=-1)
    outside = None if valid is None else ~valid.unsqueeze(-1)
    for _ in range(SINKHORN_ITERATIONS):
        column = (plan if outside is None else plan.masked_fill(outside, -torch.inf)).logsumexp(dim=0)
        plan = (plan - column).log_softmax(dim=-1)
    return plan.exp()


def hash_experts(ids: Tensor, num_experts: int, top_k: int) -> Tensor:
    """ids [T] int64 → [T, K], experts that depend on a token's id alone (Hash Layers, arXiv 2106.04426).

    Neighbouring ids are spread by Fibonacci hashing; the further experts are those that follow the first.
    """
    first = (ids * GOLDEN >> 40) & 0xFFFFFF
    return (first.unsqueeze(-1) + torch.arange(top_k, device=ids.device)) % num_experts
