"""Positions as a bias of the attention scores, by the distance of key and query (arXiv 1910.10683, section 2.1).

Shapes: B batch, S queries, L keys, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class RelativePositionBias(nn.Module):
    """A learned scalar for every head and bucket of distances, of one layer or of all."""

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int, bidirectional: bool) -> None:
        super().__init__()
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))

    def forward(self, past: int, new: int) -> Tensor:
        """Bias [1, H, S, L] of ``new`` queries that follow ``past`` tokens, over the L = past + new keys."""
        key = torch.arange(past + new, device=self.weight.device)[None]
        return self.between(key[:, past:], key)

    def between(self, query: Tensor, key: Tensor) -> Tensor:
        """Bias [B, H, S, L] of queries at positions [B, S] over keys at positions [B, L], both int64."""
        distance = key[:, None, :] - query[:, :, None]
        buckets = distance_buckets(distance, self.num_buckets, self.max_distance, self.bidirectional)
        return self.weight[buckets].permute(0, 3, 1, 2)


def distance_buckets(distance: Tensor, num_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """Bucket of each distance: one each up to half of the buckets, then logarithmically wider ones.

    Args:
        distance: int64, position of the key less that of the query.
        num_buckets: of all; where ``bidirectional``, half are for keys behind the query and half for later ones.
        max_distance: from which on all share the last bucket.
        bidirectional: whether queries see later keys; without, these are in the bucket of distance 0.

    Returns:
        int64 of the same shape, from 0 to num_buckets - 1.
    """
    first: Tensor | int = 0
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    # In fp32 and in this order: distances that lie on a border are in the bucket that published weights know.
    octaves = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    wide = (exact + (octaves * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, wide)
