"""The chunked loss against ``F.cross_entropy`` on whole logits, in values and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.bench.memory import peak_bytes
from zoo.layers import linear_nll as module
from zoo.layers.linear_nll import linear_nll, whole_nll

T, D, V = 50, 16, 33


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 tokens: 7 chunks, the last one of two."""
    monkeypatch.setattr(module, "chunk_tokens", lambda vocab_size, device: 8)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, *, multiplier: float = 1.0, cap: float | None = None) -> Any:
    logits = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32)) * multiplier
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    return F.cross_entropy(logits, labels, reduction="sum")


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (T,), generator=generator)


def gradients(loss: Callable[..., Tensor], *args: Any, **more: Any) -> tuple[Tensor, ...]:
    value = loss(*args, **more)
    return value.detach(), *torch.autograd.grad(3 * value, args[:2])


@pytest.mark.parametrize("ignored", [[], [0, 7, 8, 49], range(8, 16), range(T)], ids=["none", "few", "chunk", "all"])
@pytest.mark.parametrize("scaling", [{}, {"cap": 2.0}, {"multiplier": 0.3}, {"cap": 5.0, "multiplier": 3.0}])
@pytest.mark.parametrize("loss", [linear_nll, whole_nll])
def test_equals_cross_entropy(loss: Callable[..., Tensor], ignored: list[int], scaling: dict[str, float]) -> None:
    hidden, weight, labels = inputs()
    labels[list(ignored)] = -100
    found, expected = (gradients(way, hidden, weight, labels, **scaling) for way in (loss, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_large_logits_stay_finite() -> None:
    hidden, weight, labels = inputs(torch.float32)
    for a, b in zip(*(gradients(f, hidden, weight, labels, multiplier=1e4) for f in (linear_nll, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", [linear_nll, whole_nll])
def test_rounding_is_that_of_the_dtype(
    loss: Callable[..., Tensor], dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    exact = gradients(plain, *inputs())
    hidden, weight, labels = inputs(dtype)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        found = gradients(loss, hidden, weight, labels)
        theirs = gradients(plain, hidden, weight, labels)
    assert found[0].dtype == torch.float32
    for a, b, c in zip(found, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - c).norm() <= 1.2 * (b - c).norm() + 1e-6 * c.norm()


def test_what_is_frozen_gets_no_gradient() -> None:
    hidden, weight, labels = inputs()
    _, of_hidden, of_weight = gradients(linear_nll, hidden, weight, labels)
    linear_nll(hidden, weight.detach(), labels).backward()
    linear_nll(hidden.detach(), weight, labels).backward()
    torch.testing.assert_close(3 * hidden.grad, of_hidden)
    torch.testing.assert_close(3 * weight.grad, of_weight)


def test_memory_is_one_chunk_and_the_gradients_that_are_needed() -> None:
    hidden, weight = torch.randn(64, 8), torch.randn(4000, 8)
    labels = torch.randint(4000, (64,))
    chunk, of_weight = 8 * 4000 * 4, 4000 * 8 * 4

    def peak(hidden_grad: bool, weight_grad: bool) -> int:
        hidden.requires_grad_(hidden_grad), weight.requires_grad_(weight_grad)
        return peak_bytes(lambda: linear_nll(hidden, weight, labels))

    for needed in (True, False):
        assert chunk <= peak(needed, False) < 1.1 * chunk
    assert chunk + of_weight <= peak(True, True) < 1.1 * (chunk + of_weight)
    with torch.no_grad():
        assert peak(True, True) < 1.1 * chunk
    hidden.requires_grad_(), weight.requires_grad_()
    whole = peak_bytes(lambda: linear_nll(hidden, weight, labels).backward())
    assert whole < 1.1 * (chunk + of_weight)


def test_works_without_grad_mode() -> None:
    hidden, weight, labels = inputs()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = linear_nll(hidden, weight, labels)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, plain(hidden, weight, labels).detach())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    hidden, weight, labels = inputs()

    def recomputed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
        return checkpoint(
            lambda h, w: linear_nll(h.tanh(), w, labels, cap=2.0), hidden, weight, use_reentrant=use_reentrant
        )

    expected = gradients(lambda h, w, y: plain(h.tanh(), w, y, cap=2.0), hidden, weight, labels)
    value = recomputed(hidden, weight, labels)
    (3 * value).backward()
    for a, b in zip((value.detach(), hidden.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_of_micro_batches_add_up_and_repeat() -> None:
    hidden, weight, labels = inputs(torch.float32)
    once = gradients(linear_nll, hidden, weight, labels)
    assert all(torch.equal(a, b) for a, b in zip(once, gradients(linear_nll, hidden, weight, labels), strict=True))
    for part in (slice(0, 24), slice(24, T)):
        (3 * linear_nll(hidden[part], weight, labels[part])).backward()
    torch.testing.assert_close(weight.grad, once[2])
    torch.testing.assert_close(hidden.grad, once[1])


def test_a_second_backward_pass_is_refused() -> None:
    """The first one scales in place what the forward pass has computed."""
    loss = linear_nll(*inputs())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("label", [V, -1])
def test_a_label_outside_the_vocabulary_is_refused(label: int) -> None:
    hidden, weight, labels = inputs()
    labels[3] = label
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_nll(hidden, weight, labels)
