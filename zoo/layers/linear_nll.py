"""Likelihood of labels under a linear output head, without the logits of all tokens at once.

Shapes: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.layers.linear import add_product, product

IGNORED = -100
"""Label of a token that has none."""

CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Logits that are there at a time: as many as stay in a core's cache, or as fill a GPU; 512 MiB in fp32 there."""
MIN_CHUNK_TOKENS = 128
"""Fewer make the products slow, however large the vocabulary."""
WHOLE_LOGITS = 1 << 24
"""Up to so many logits a GPU makes at once: 64 MiB in fp32, and less than half the time of one chunk's many kernels
(docs/performance.md, "Cross-entropy on a GPU")."""


def linear_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, multiplier: float = 1.0, cap: float | None = None
) -> Tensor:
    """Sum over the labels of −ln softmax(logits), where logits = cap · tanh(multiplier · hidden · weightᵀ / cap).

    Logits are made of one chunk of tokens after the other and turned into their gradients at once, so that memory holds
    one chunk in place of three or four tensors [T, V], and nothing is computed twice. What waits for the backward pass
    are the gradients of ``hidden`` and ``weight``, those that are needed. Products are in the dtype of autocast, or of
    ``hidden``; all else, and the sum of the chunks' gradients, in fp32 at least.

    Args:
        hidden: [T, D].
        weight: [V, D].
        labels: [T] int64, ``IGNORED`` where there is none.
        multiplier: Of the logits.
        cap: Soft bound on them (``zoo.layers.scaling.SoftCap``); by default none.

    Returns:
        Nats; scalar in fp32, or in fp64 of fp64. Differentiable once.
    """
    if hidden.is_cuda and len(hidden) * len(weight) <= WHOLE_LOGITS:
        return whole_nll(hidden, weight, labels, multiplier=multiplier, cap=cap)
    out: Tensor = _LinearNLL.apply(hidden, weight, labels, multiplier, cap, torch.is_grad_enabled())
    return out


def whole_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, multiplier: float = 1.0, cap: float | None = None
) -> Tensor:
    """Arguments and result as ``linear_nll``, by torch's own loss on all logits at once."""
    dtype = _product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype)).to(torch.promote_types(dtype, torch.float32))
        if multiplier != 1:
            logits = logits * multiplier
        if cap is not None:
            logits = cap * (logits / cap).tanh()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """That of autocast, or of ``hidden``."""
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    # Many probabilities of a large vocabulary are below the least of fp16.
    return torch.float32 if dtype == torch.float16 else dtype


def chunk_tokens(vocab_size: int, device: str) -> int:
    """Tokens whose logits are there at a time, on a type of device."""
    return max(MIN_CHUNK_TOKENS, CHUNK_LOGITS["cpu" if device == "cpu" else "cuda"] // vocab_size)


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        multiplier: float,
        cap: float | None,
        with_grad: bool,  # grad mode is off in here, and needs_input_grad does not know of it
    ) -> Tensor:
        device = hidden.device.type
        dtype = _product_dtype(hidden)
        wide = torch.promote_types(dtype, torch.float32)
        of_hidden, of_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if of_weight else None
        total = hidden.new_zeros((), dtype=wide)
        tokens = chunk_tokens(len(weight), device)
        with torch.autocast(device, enabled=False):
            head = weight.to(dtype)
            products = hidden.new_empty(min(tokens, len(hidden)), len(weight), dtype=dtype)
            logits = products if dtype == wide else torch.empty_like(products, dtype=wide)
            for start in range(0, len(hidden), tokens):
                chunk = slice(start, start + tokens)
                x = hidden[chunk].to(dtype)
                made, out = products[: len(x)], logits[: len(x)]
                product(x, head, made)
                if dtype != wide:
                    out.copy_(made)
                nll, grad = _chunk(out, labels[chunk].unsqueeze(1), multiplier, cap, of_hidden or of_weight)
                total += nll
                if grad is not None:
                    grad = grad if dtype == wide else made.copy_(grad)
                    if grad_hidden is not None:
                        grad_hidden[chunk] = product(grad, head.t())
                    if grad_weight is not None:
                        _add_product(grad_weight, grad.t(), x)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second tensor of the weight's size would be the largest thing here.
        hidden, weight = (None if grad is None else grad.mul_(grads[0]) for grad in ctx.saved_tensors)
        return hidden, None if weight is None else weight.to(ctx.dtype), None, None, None, None


def _chunk(
    logits: Tensor, labels: Tensor, multiplier: float, cap: float | None, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(sum of −ln p, its gradient with respect to the products), in place of the products ``logits`` [T, V]."""
    kept = labels != IGNORED
    labels = labels.masked_fill(~kept, 0)
    if multiplier != 1:
        logits *= multiplier
    bent = None
    if cap is not None:
        bent = logits.div_(cap).tanh_()
        logits = bent * cap
    logits -= logits.amax(1, keepdim=True)
    chosen = logits.gather(1, labels)
    exponentials = logits.exp_()
    normaliser = exponentials.sum(1, keepdim=True)
    nll = (normaliser.log() - chosen).where(kept, 0).sum()
    if not with_grad:
        return nll, None
    scale = kept.to(logits.dtype) * multiplier
    grad = exponentials.mul_(scale / normaliser)
    grad.scatter_(1, labels, grad.gather(1, labels) - scale)
    if bent is not None:
        grad *= bent.square_().neg_().add_(1)
    return nll, grad


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b, without rounding the product to the dtype of ``a`` where a kernel can do so."""
    if a.dtype == total.dtype:
        add_product(total, a, b.t())
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
