"""What the routing of some tokens looks like, as pure functions of router outputs and of counts.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.moe.router import RouterOutput


def choices(output: RouterOutput, token_mask: Tensor | None = None) -> Tensor:
    """[T, E] int64, 1 where the router chose the expert for the token; rows of 0 where ``token_mask`` [B, S] is False.

    As ``expert_counts``: whether or not the expert had room.
    """
    table = torch.zeros_like(output.scores, dtype=torch.int64)
    table.scatter_add_(1, output.experts, _chosen(output).long())
    return table if token_mask is None else table * token_mask.flatten().unsqueeze(-1)


def chosen_experts(output: RouterOutput) -> Tensor:
    """[T, K] int64, the numbers of the experts that the router chose for each token, and -1 in other places."""
    return output.experts.where(_chosen(output), -1)


def _chosen(output: RouterOutput) -> Tensor:
    return torch.ones_like(output.experts, dtype=torch.bool) if output.chosen is None else output.chosen


def co_activations(table: Tensor) -> Tensor:
    """``choices`` [T, E] → [E, E] int64: tokens that go to both experts; on the diagonal those that go to the one."""
    # In fp64, which counts exactly to 2^53: integer matrix products are slow, and not there on every device.
    exact = table.double()
    return (exact.T @ exact).long()


def routing_entropy(output: RouterOutput) -> Tensor:
    """[T] fp32, entropy of the token's scores (normalised over all E) over its maximum ln E: 0 is certain."""
    scores = output.scores.float()
    probs = scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    if probs.shape[-1] == 1:
        return torch.zeros_like(probs[:, 0])
    return torch.special.entr(probs).sum(dim=-1) / math.log(probs.shape[-1])


def router_z(output: RouterOutput) -> Tensor:
    """[T] fp32, logsumexp(logits)², the mean of which is the router z-loss (ST-MoE, arXiv 2202.08906, equation 5)."""
    return output.logits.logsumexp(dim=-1).square()


def jaccard(one: Tensor, other: Tensor) -> Tensor:
    """[T] fp32, |A ∩ B| / |A ∪ B| of each token's two sets of experts [T, K] and [T, K'], as ``chosen_experts`` gives
    them; two empty sets are equal."""
    common = ((one.unsqueeze(-1) == other.unsqueeze(-2)) & (one >= 0).unsqueeze(-1)).sum(dim=(-2, -1))
    either = (one >= 0).sum(dim=-1) + (other >= 0).sum(dim=-1) - common
    return torch.where(either > 0, common / either.clamp(min=1), 1.0)


def expected_co_activations(pairs: Tensor) -> Tensor:
    """Tokens that would go to both of two experts if only how often each is one of a pair decided who goes together.

    Quasi-independence (Goodman, 1968): m_ij = a_i a_j off the diagonal, which no token can be on, with the row sums of
    ``pairs``. Independence itself would expect too many: a uniform choice of 2 of 8 has 4/7 of the pairs that it has.

    Args:
        pairs: [E, E] of ``co_activations``; its diagonal is not read.

    Returns:
        [E, E] fp64, 0 on the diagonal.
    """
    rows = (pairs.sum(dim=-1) - pairs.diagonal()).double()
    factors = rows / rows.sum().clamp(min=1).sqrt()
    for _ in range(2000):
        # Proportional fitting of a symmetric table; the root keeps it from swinging.
        fitted = factors * (factors.sum() - factors)
        ratio = torch.where(rows > 0, rows / fitted.clamp(min=1e-300), 1.0)
        factors = factors * ratio.sqrt()
        if (ratio - 1).abs().max() < 1e-10:
            break
    return torch.outer(factors, factors).fill_diagonal_(0.0)
