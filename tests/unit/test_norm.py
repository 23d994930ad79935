"""RMSNorm with a backward pass written by hand, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.layers.norm import MANY_NUMBERS, RMSNorm, fused_applies, fused_rms_norm


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return x.requires_grad_(), torch.randn(shape[-1], generator=generator, dtype=dtype).requires_grad_(), gradient


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=0, max_size=3), st.integers(1, 9), st.sampled_from([0.0, 1e-6, 0.5]))
def test_values_and_gradients_are_torchs(batch: list[int], size: int, eps: float) -> None:
    x, weight, gradient = inputs((*batch, size))
    out, expected = fused_rms_norm(x, weight, eps), F.rms_norm(x, (size,), weight, eps)
    got, want = (torch.autograd.grad(y, (x, weight), gradient) for y in (out, expected))
    for ours, theirs in zip((out, *got), (expected, *want), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert torch.equal(fused_rms_norm(x, weight, eps), out)


def test_a_vector_of_zeros_has_a_finite_gradient() -> None:
    x, weight, gradient = inputs((3, 8))
    with torch.no_grad():
        x[1] = 0
    (got,) = torch.autograd.grad(fused_rms_norm(x, weight, 1e-6), x, gradient)
    assert got.isfinite().all()
    torch.testing.assert_close(got[1], (gradient[1] * weight / 1e-3).detach())


def test_what_is_frozen_gets_no_gradient_and_the_other_the_same() -> None:
    x, weight, gradient = inputs((4, 8))
    both = torch.autograd.grad(fused_rms_norm(x, weight, 1e-6), (x, weight), gradient)
    (of_x,) = torch.autograd.grad(fused_rms_norm(x, weight.detach(), 1e-6), x, gradient)
    (of_weight,) = torch.autograd.grad(fused_rms_norm(x.detach(), weight, 1e-6), weight, gradient)
    assert torch.equal(of_x, both[0]) and torch.equal(of_weight, both[1])


def test_a_gradient_that_is_no_block_of_memory_is_taken() -> None:
    x, weight, gradient = inputs((4, 6, 8))
    spread = gradient.transpose(0, 1).contiguous().transpose(0, 1)
    first, second = (torch.autograd.grad(fused_rms_norm(x, weight, 1e-6), x, g)[0] for g in (gradient, spread))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_computes_the_same_on_both_sides_of_the_bound(dtype: torch.dtype) -> None:
    norm = RMSNorm(64, 1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(MANY_NUMBERS // 64, 64).to(dtype)
    assert fused_applies(x, norm.weight) == (dtype == torch.float32)
    assert not fused_applies(x[1:], norm.weight)
    torch.testing.assert_close(norm(x)[1:], norm(x[1:]))
    with torch.no_grad():
        assert fused_applies(x[1:], norm.weight) == (dtype == torch.float32)
        torch.testing.assert_close(norm(x[1:]), F.rms_norm(x[1:], (64,), norm.weight, 1e-6))
