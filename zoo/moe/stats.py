"""What the routing of one layer looks like, as numbers to log and plot.

Shapes: B batch, S sequence, T = B·S tokens, E experts, K top-k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.moe.router import RouterOutput

DEAD = 0.1
"""An expert with less than this part of an equal share of the assignments is dead."""

DECIDABLE = 20
"""Assignments that an expert must get on average before any is called dead. Of a fair share of 20 an expert gets less
than 2 by chance once in ten million times."""


def expert_counts(output: RouterOutput, token_mask: Tensor | None = None) -> Tensor:
    """[E] int64, assignments to each expert; tokens whose ``token_mask`` [B, S] is False are left out.

    Those that the router chose, before any was dropped for want of capacity, as Switch's balance loss counts them
    (arXiv 2101.03961, equation 5).
    """
    ones = torch.ones_like(output.experts) if output.chosen is None else output.chosen.to(output.experts.dtype)
    if token_mask is not None:
        ones = ones * token_mask.flatten().unsqueeze(-1)
    # Unlike torch.bincount this does not wait for a GPU to tell the largest.
    counts = output.experts.new_zeros(output.scores.shape[-1])
    return counts.scatter_add_(0, output.experts.flatten(), ones.flatten())


def dropped_fraction(output: RouterOutput, token_mask: Tensor | None = None) -> Tensor:
    """Fraction of the assignments that found no place in their expert, fp32 scalar; 0 without a limit.

    ``token_mask`` as ``expert_counts``.
    """
    if output.kept is None:
        return output.scores.new_zeros(())
    kept = output.kept if token_mask is None else output.kept & token_mask.view(-1, 1)
    return 1 - kept.sum() / expert_counts(output, token_mask).sum().clamp(min=1)


def expert_load(counts: Tensor) -> Tensor:
    """counts [..., E] → fraction of the assignments that each expert got, [..., E] fp32; sums to 1."""
    counts = counts.float()
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)


def load_entropy(load: Tensor) -> Tensor:
    """load [..., E] → [...], entropy over its maximum ln E: 1 is uniform, 0 is all on one expert."""
    if load.shape[-1] == 1:
        return torch.ones_like(load[..., 0])
    return torch.special.entr(load).sum(dim=-1) / math.log(load.shape[-1])


def max_over_mean(load: Tensor) -> Tensor:
    """load [..., E] → [...], the busiest expert's load over the mean: 1 is balanced, E is collapsed."""
    return load.amax(dim=-1) * load.shape[-1]


def effective_experts(load: Tensor) -> Tensor:
    """load [..., E] → [...], exp of its entropy: E where it is uniform, n where n experts share it equally."""
    return torch.special.entr(load).sum(dim=-1).exp()


def dead_experts(counts: Tensor) -> list[int] | None:
    """counts [E] → the experts with less than ``DEAD`` of an equal share; ``None``: too few assignments to tell."""
    mean = counts.double().mean()
    if mean < DECIDABLE:
        return None
    dead: list[int] = (counts < DEAD * mean).nonzero().flatten().tolist()
    return dead
