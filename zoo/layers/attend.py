"""Scaled dot-product attention over a SequenceLayout, with the fastest kernel that the device offers.

Shapes: B batch, S new tokens, L key slots, H query heads, G key/value heads, d size of a key head, v of a value head.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.layers.linear import onednn_products, onednn_takes
from zoo.layers.sequence import SequenceLayout

MANY_QUERIES = 1024
"""In so many torch's CPU kernel takes 1.7 times as long with MKL's products as with oneDNN's on a Zen 5, forward and
backward; in 256 it is as fast with either, for its blocks are smaller there."""

_cpu_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """softmax(scale · q kᵀ + mask) v.

    Args:
        q: [B, H, S, d]. k: [B, G, L, d]. v: [B, G, L, v]; G divides H.

    Returns:
        [B, S, H, v].
    """
    if _flash_applies(q, v, layout):
        return _flash(q, k, v, layout, scale)
    if q.shape[2] == 1:
        # The heads of a group become rows of one query matrix: keys and values are read once for all of them.
        rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=layout.mask, scale=scale).flatten(1, 2).unsqueeze(1)
    size = v.shape[-1]
    if size < q.shape[-1] and q.device.type == "cpu" and torch.backends.cuda.flash_sdp_enabled():
        # The CPU's kernel that never writes out the scores takes values of the keys' size only.
        v = F.pad(v, (0, q.shape[-1] - size))
    if _by_onednn(q, k, v):
        out: Tensor = _ByOneDNN.apply(q, k, v, layout.mask, layout.is_causal, scale)
        return out[..., :size].transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=layout.mask, is_causal=layout.is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[..., :size].transpose(1, 2)


def _by_onednn(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's CPU kernel computes this, is differentiated, and is faster with oneDNN's products."""
    return (
        q.shape[2] >= MANY_QUERIES
        and not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in (q, k, v))
        and q.shape[-1] == v.shape[-1]
        and all(x.stride(-1) == 1 for x in (q, k, v))
        and torch.backends.cuda.flash_sdp_enabled()
        and not torch.is_autocast_enabled("cpu")
        and onednn_takes(q, k)
        and onednn_takes(q, v)
    )


class _ByOneDNN(torch.autograd.Function):
    """``F.scaled_dot_product_attention`` on the CPU, its products and those of its gradients by oneDNN."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        added = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        with onednn_products:
            out: Tensor
            out, logsumexp = _cpu_kernel(q, k, v, 0.0, is_causal, attn_mask=added, scale=scale)
        ctx.save_for_backward(q, k, v, added, out, logsumexp)
        ctx.is_causal, ctx.scale = is_causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *forward, added, out, logsumexp = ctx.saved_tensors
        with onednn_products:
            gradients = _cpu_kernel_backward(
                gradient, *forward, out, logsumexp, 0.0, ctx.is_causal, attn_mask=added, scale=ctx.scale
            )
        return *gradients, None, None, None


def attend_softcapped(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float, softcap: float) -> Tensor:
    """softmax(c·tanh(scale · q kᵀ / c) + mask) v (arXiv 2408.00118, section 2), cap and softmax in fp32.

    Arguments and result as ``attend``, with c = ``softcap``. The scores [B, H, S, L] are written out.
    """
    scores = _grouped_scores(q, k, scale)
    capped = (softcap * (scores / softcap).tanh()).masked_fill(~layout.visible.unsqueeze(2), float("-inf"))
    return _weighted_values(capped.softmax(dim=-1), v)


def attend_with_sinks(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float, sinks: Tensor) -> Tensor:
    """Σ_j exp(s_j) v_j / (exp(sink) + Σ_j exp(s_j)) over visible scores s = scale · q kᵀ (arXiv 2309.17453), in fp32.

    Arguments and result as ``attend``, with ``sinks`` [H]. The scores [B, H, S, L] are written out.
    """
    scores = _grouped_scores(q, k, scale).masked_fill(~layout.visible.unsqueeze(2), float("-inf"))
    sink = sinks.to(scores.dtype).view(1, k.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
    return _weighted_values(torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1], v)


def attend_with_bias(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float, bias: Tensor) -> Tensor:
    """softmax(scale · q kᵀ + bias + mask) v (arXiv 1910.10683, section 2.1).

    Arguments and result as ``attend``, with ``bias`` [B or 1, H, S, L].
    """
    mask = bias.masked_fill(~layout.visible, float("-inf")).to(q.dtype)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa).transpose(1, 2)


def _grouped_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale · q kᵀ [B, G, H/G, S, L], in fp32 at least."""
    scores = q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).mT
    return scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale


def _weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """weights [B, G, H/G, S, L] · v [B, G, L, v] → [B, S, H, v]."""
    return (weights.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2).transpose(1, 2)


@cache
def flash_available() -> bool:
    """Whether the flash-attn package is installed (extra ``gpu``)."""
    return importlib.util.find_spec("flash_attn") is not None


def _flash_applies(q: Tensor, v: Tensor, layout: SequenceLayout) -> bool:
    """flash-attn computes half precision on CUDA with equal head sizes; a cached step stays with torch's kernel."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and layout.past == 0
        and q.shape[-1] == v.shape[-1]
        and flash_available()
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """Each run of equal segments is one sequence of a variable-length batch: no mask, no padding gathered out."""
    from flash_attn import flash_attn_varlen_func

    batch, _, new, _ = q.shape
    runs = layout.run_offsets
    longest = int((runs[1:] - runs[:-1]).max())
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    window = (-1, -1) if layout.window is None else (layout.window - 1, 0)
    out: Tensor = flash_attn_varlen_func(
        *flat, runs, runs, longest, longest, softmax_scale=scale, causal=True, window_size=window
    )
    return out.unflatten(0, (batch, new))
