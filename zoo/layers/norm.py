"""Normalisation of vectors to equal size.

Shapes: D numbers of a vector.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MANY_NUMBERS = 1 << 14
"""From so many on ``fused_rms_norm`` is the faster in training as well; with fewer its calls take as long."""


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
        weight = self.weight
        if fused_applies(x, weight):
            return fused_rms_norm(x, weight, self.eps)
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, self.eps).to(x.dtype)


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


def fused_applies(x: Tensor, weight: Tensor) -> bool:
    """Whether ``fused_rms_norm`` is the way: on a CPU, in fp32 or fp64 throughout, eagerly, by no subclass; with
    gradients of many numbers only."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and (x.numel() >= MANY_NUMBERS or not torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
    )


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``F.rms_norm`` with a third of the passes over memory and half of the calls, of which torch's makes a dozen.

    Args:
        x: [..., D]. weight: [D] of the same dtype. eps: added to the mean square.

    Returns:
        [..., D]. Differentiable once.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _RMSNorm.apply(x, weight, eps)
        return out
    return (x * _inverse_size(x, eps)).mul_(weight)


def _inverse_size(x: Tensor, eps: float) -> Tensor:
    """[..., D] → [..., 1], 1 / sqrt(mean(x²) + eps)."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_number(eps, x.dtype), size, size, value=1 / x.shape[-1]).rsqrt_()


@cache
@torch.inference_mode(False)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """[] on the CPU."""
    return torch.tensor(value, dtype=dtype, device="cpu")


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x²) + eps) and the gradient g: dx = r·g·w − x·(r³/D)·Σ g·x·w, and dw = Σ r·g·x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse_size(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        size = x.shape[-1]
        products = (gradient * x).reshape(-1, size)
        d_weight = torch.mv(products.t(), inverse.flatten()) if of_weight else None
        if not of_x:
            return None, d_weight, None
        along = torch.mv(products, weight).view_as(inverse).mul_(inverse.pow(3)).div_(-size)
        return (gradient * weight).mul_(inverse).addcmul_(x, along), d_weight, None
