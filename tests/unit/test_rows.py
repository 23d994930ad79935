"""Copies and sums of rows, against autograd's own, in results, gradients and bytes kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zoo.parallel.rows import copy_rows, sum_rows, weighted_sum_rows

R, N, D, SIZE = 7, 10, 4, 5


def zeros(dtype: torch.dtype) -> Tensor:
    return torch.zeros(SIZE, D, dtype=torch.promote_types(dtype, torch.float32))


def oracle_copy(rows: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    return rows[index]


def oracle_sum(rows: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    out = zeros(rows.dtype)
    return out.index_add(0, index, rows.to(out.dtype)).to(rows.dtype)


def oracle_weighted(rows: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    out = zeros(rows.dtype)
    return out.index_add(0, index, rows.to(out.dtype) * weights.unsqueeze(1)).to(rows.dtype)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "copy": (lambda rows, weights, index: copy_rows(rows, index), oracle_copy),
    "sum": (lambda rows, weights, index: sum_rows(rows, index, SIZE), oracle_sum),
    "weighted": (lambda rows, weights, index: weighted_sum_rows(rows, weights, index, SIZE), oracle_weighted),
}


def run(function: Callable[..., Tensor], count: int, dtype: torch.dtype) -> tuple[list[Tensor], int]:
    """(result and gradients, bytes kept for the backward pass)."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, D, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(count, generator=generator, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    index = torch.randint(min(SIZE, max(count, 1)), (count,), generator=generator)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(rows, weights, index)
    (out.float() * torch.arange(out.numel()).view_as(out)).sum().backward()
    gradients = [t.grad for t in (rows, weights) if t.grad is not None]
    return [out.detach(), *gradients], sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [0, R, N])
@pytest.mark.parametrize("name", CASES)
def test_rows_and_gradients(name: str, count: int, dtype: torch.dtype) -> None:
    ours, oracle = CASES[name]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    for got, expected in zip(run(ours, count, dtype)[0], run(oracle, count, dtype)[0], strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "kept"), [("copy", 8 * N), ("sum", 8 * N), ("weighted", (8 + 4 + 2 * D) * N)])
def test_only_indices_and_the_factors_of_a_product_are_kept(name: str, kept: int) -> None:
    """In bf16: an index of 8 bytes a row, its fp32 weight, and the row as it came in."""
    ours, oracle = CASES[name]
    assert run(ours, N, torch.bfloat16)[1] == kept
    assert name == "copy" or run(oracle, N, torch.bfloat16)[1] > kept
