"""Copies and sums of rows that keep nothing for the backward pass but indices, and what a product needs.

``Tensor.index_add`` keeps the rows that it added, for their shape alone; here they are freed. Sums are taken in fp32 at
least, forward and backward, and rounded once.

Shapes: N and R numbers of rows, D model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def copy_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows [R, D], index [N] → [N, D]: row i is row index[i] of ``rows``."""
    out: Tensor = _Copy.apply(rows, index)
    return out


def sum_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """rows [N, D], index [N] → [size, D]: row i is the sum of the rows whose index is i."""
    out: Tensor = _Sum.apply(rows, index, size)
    return out


def weighted_sum_rows(rows: Tensor, weights: Tensor, index: Tensor, size: int) -> Tensor:
    """As ``sum_rows``, of weights [N] times rows; of both, what came in is kept, and not what they were widened to."""
    out: Tensor = _WeightedSum.apply(rows, weights, index, size)
    return out


def _sum(rows: Tensor, index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_zeros((size, rows.shape[1]), dtype=wide).index_add_(0, index, rows.to(wide)).to(dtype)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _sum(grads[0], index, ctx.size, grads[0].dtype), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        return _sum(rows, index, size, rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grads[0].index_select(0, index), None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(rows, weights, index)
        return _sum(rows * weights.unsqueeze(1), index, size, rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, index = ctx.saved_tensors
        gradient = grads[0].index_select(0, index)
        of_rows = (gradient * weights.unsqueeze(1)).to(rows.dtype)
        of_weights = torch.linalg.vecdot(gradient.to(weights.dtype), rows.to(weights.dtype))
        return of_rows, of_weights, None, None
