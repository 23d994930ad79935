"""Normalisation of vectors to equal size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32 (arXiv 1910.07467, equation 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] → the same shape and dtype."""
        # torch accumulates in fp32 for half precision and rounds once, at the end. Under autocast x may be narrower
        # than the weight: it is widened, not the weight rounded.
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)


class RMSNormAcrossHeads(RMSNorm):
    """RMSNorm over all heads of a projection together (OLMoE, arXiv 2409.02060, section 4.2.5)."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., heads, d] with heads · d = size → the same shape and dtype."""
        return super().forward(x.flatten(-2)).view_as(x)


class UnitOffsetRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · (1 + offset) over the last dimension, in fp32 (arXiv 2403.08295, published code)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.offset = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] → the same shape and dtype."""
        exact = torch.promote_types(self.offset.dtype, torch.float32)
        return F.rms_norm(x.to(exact), self.offset.shape, 1 + self.offset.to(exact), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) · weight over the last dimension (arXiv 1607.06450, equation 4), no bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] → the same shape and dtype."""
        return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, None, self.eps).to(x.dtype)
