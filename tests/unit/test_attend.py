"""Attention over a layout against a softmax written out, and flash-attn against that on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from zoo.layers.attend import MANY_QUERIES, attend, attend_softcapped, attend_with_sinks, flash_available
from zoo.layers.linear import libraries, products_by
from zoo.layers.sequence import SequenceLayout, sequence_layout

SCALE = 0.3


def written_out(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, softcap: float | None = None) -> Tensor:
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    mask = layout.mask
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    scores = q @ k.mT * SCALE
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def layouts(device: str) -> list[SequenceLayout]:
    ids = torch.zeros(2, 12, dtype=torch.long, device=device)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12], device=device)
    left = torch.tensor([[0] * 4 + [1] * 8, [1] * 12], device=device)
    cases = [
        {"attention_mask": None, "document_ids": None},
        {"attention_mask": None, "document_ids": documents},
        {"attention_mask": left, "document_ids": None},
        {"attention_mask": left.flip(1), "document_ids": documents},
        {"attention_mask": None, "document_ids": None},
    ]
    windows = [None, None, None, 3, 4]
    return [
        sequence_layout(ids, past=0, past_valid=None, **case).within(window)
        for case, window in zip(cases, windows, strict=True)
    ]


def qkv(device: str, dtype: torch.dtype, v_size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((4, 16), (2, 16), (2, v_size))
    q, k, v = (torch.randn(2, heads, 12, size, device=device, dtype=dtype) for heads, size in sizes)
    return q, k, v


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("v_size", [16, 8])
def test_attend_equals_the_softmax_written_out(case: int, v_size: int) -> None:
    layout = layouts("cpu")[case]
    q, k, v = qkv("cpu", torch.float64, v_size)
    torch.testing.assert_close(attend(q, k, v, layout, SCALE), written_out(q, k, v, layout))


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("v_size", [16, 8])
def test_row_18_the_cap_comes_before_the_mask(case: int, v_size: int) -> None:
    layout = layouts("cpu")[case]
    q, k, v = qkv("cpu", torch.float64, v_size)
    torch.testing.assert_close(attend_softcapped(q, k, v, layout, SCALE, 0.5), written_out(q, k, v, layout, 0.5))


@pytest.mark.parametrize("case", range(5))
def test_a_sink_takes_its_share_and_gives_nothing(case: int) -> None:
    """As one more key with the sink for its score and a value of zero."""
    layout = layouts("cpu")[case]
    q, k, v = qkv("cpu", torch.float64)
    sinks = torch.randn(4).double()
    scores = (q @ k.repeat_interleave(2, dim=1).mT * SCALE).masked_fill(~layout.visible, float("-inf"))
    share = scores.exp().sum(-1, keepdim=True) / (scores.exp().sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    expected = written_out(q, k, v, layout) * share.transpose(1, 2)
    torch.testing.assert_close(attend_with_sinks(q, k, v, layout, SCALE, sinks), expected)


class Precisions(TorchDispatchMode):
    """What products of fp32 may be taken from while torch's kernel runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "flash_attention_for_cpu" in str(func):
            self.seen.append(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("onednn" not in libraries(), reason="oneDNN is not there, or rounds to bf16")
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("case", ["causal", "packed", "window"])
@pytest.mark.parametrize("v_size", [16, 8])
def test_many_queries_by_onednn_and_their_gradients_are_those_of_fp64(v_size: int, case: str, again: bool) -> None:
    """In fp32 throughout: rounded to bf16, errors would be a thousand times as large."""
    length = MANY_QUERIES + 7
    documents = (torch.arange(length) >= 300).long().expand(2, -1) if case == "packed" else None
    ids = torch.zeros(2, length, dtype=torch.long)
    layout = sequence_layout(ids, past=0, past_valid=None, attention_mask=None, document_ids=documents)
    layout = layout.within(100 if case == "window" else None)
    leaves = [torch.randn(2, heads, length, n, requires_grad=True) for heads, n in ((4, 16), (2, 16), (2, v_size))]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    gradient = torch.randn(2, length, 4, v_size)
    expected = written_out(*exact, layout)
    gradients = torch.autograd.grad(expected, exact, gradient.double())
    with products_by("onednn"), Precisions() as precisions:
        if again:
            out = checkpoint(attend, *leaves, layout, SCALE, use_reentrant=False)
        else:
            out = attend(*leaves, layout, SCALE)
        found = torch.autograd.grad(out, leaves, gradient)
        assert precisions.seen == ["bf16"] * (3 if again else 2)
        with torch.no_grad():
            attend(*leaves, layout, SCALE)
    assert precisions.seen[-1] == torch.backends.mkldnn.matmul.fp32_precision == "none"  # type: ignore[attr-defined]
    assert (out - expected).abs().max() < 1e-5
    for one, other in zip(found, gradients, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.skipif("onednn" not in libraries(), reason="oneDNN is not there, or rounds to bf16")
def test_many_queries_of_other_strides_are_the_same() -> None:
    """torch's CPU kernel reads the numbers of a head one after the other, whatever their stride."""
    ids = torch.zeros(1, MANY_QUERIES, dtype=torch.long)
    layout = sequence_layout(ids, past=0, past_valid=None, attention_mask=None, document_ids=None)
    q, k, v = (torch.randn(1, 2, 16, MANY_QUERIES, requires_grad=True).mT for _ in range(3))
    with products_by("onednn"):
        out = attend(q, k, v, layout, SCALE)
    assert (out - written_out(q.double(), k.double(), v.double(), layout)).abs().max() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("case", range(5))
def test_flash_equals_the_softmax_written_out(case: int) -> None:
    assert flash_available(), "install the gpu extra"
    layout = layouts("cuda")[case]
    q, k, v = qkv("cuda", torch.bfloat16)
    expected = written_out(q.float(), k.float(), v.float(), layout)
    assert (attend(q, k, v, layout, SCALE).float() - expected).abs().max() < 0.02
