"""Multi-head and grouped-query attention (arXiv 1706.03762, arXiv 2305.13245).

Shapes: B batch, S sequence, D model, H query heads, Q asking tokens, G key/value heads, d head
size, L key slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.cache import LayerCache
from zoo.config import ModelConfig
from zoo.layers.attend import attend, attend_softcapped, attend_with_sinks
from zoo.layers.linear import Linear
from zoo.layers.norm import RMSNorm, RMSNormAcrossHeads
from zoo.layers.rope import rotary_of_last, rotate
from zoo.layers.sequence import SequenceLayout, tail


class Attention(nn.Module):
    """o(softmax(q kᵀ / √d + mask) v) with rotary q and k; optional biases and optional RMSNorm of q and k."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        attention = config.attention
        assert attention is not None
        self.window = attention.window(layer)
        self.rope = config.rope
        self.head_dim = attention.head_dim
        self.num_kv_heads = attention.num_kv_heads
        self.scale = (attention.query_scale_dim or attention.head_dim) ** -0.5
        width, kv_width = attention.num_heads * self.head_dim, attention.num_kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, width, bias=attention.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=attention.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=attention.qkv_bias)
        self.o_proj = Linear(width, config.hidden_size, bias=attention.output_bias)
        self.q_norm = _qk_norm(config, width)
        self.k_norm = _qk_norm(config, kv_width)

    def forward(
        self,
        x: Tensor,
        layout: SequenceLayout,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        last: int | None = None,
    ) -> Tensor:
        """x [B, S, D], rotary cos and sin [B, S, 1, d/2] → [B, S, D]; appends k and v to ``cache`` where given.

        With ``last`` only so many tokens, the last, ask: [B, last, D].
        """
        asking = layout.last(last)
        q, k, v = self.project(x, last)
        q, k = self.place(q, k, asking, rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layout.past, k, v)
        return self.o_proj(self.attend(q, k, v, asking.within(self.window)).flatten(-2))

    def project(self, x: Tensor, last: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] → q [B, S or last, H, d], k and v [B, S, G, d], normalised where they are."""
        asking = tail(x, last)
        q = self.q_proj(asking).view(*asking.shape[:2], -1, self.head_dim)
        heads = (*x.shape[:2], -1, self.head_dim)
        k, v = self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        return self.q_norm(q), self.k_norm(k), v

    def place(
        self, q: Tensor, k: Tensor, layout: SequenceLayout, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """q [B, Q, H, d] of the last tokens and k [B, S, G, d] → the same, knowing their positions.

        ``layout`` is that of the Q tokens, ``rotary`` of all.
        """
        assert self.rope is not None
        of_queries = rotary_of_last(rotary, q.shape[1])
        return rotate(q, *of_queries, self.rope.layout), rotate(k, *rotary, self.rope.layout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        """q [B, H, Q, d], k and v [B, G, L, d] → [B, Q, H, d]; ``layout`` is that of the Q tokens."""
        return attend(q, k, v, layout, self.scale)

    def new_cache(self, batch_size: int, max_length: int) -> LayerCache:
        """Empty k and v, each [B, G, L, d]."""
        weight = self.k_proj.weight
        shape = (batch_size, self.num_kv_heads, max_length, self.head_dim)
        return LayerCache([torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2)])


class PositionlessAttention(Attention):
    """Attention that tells tokens apart by what they are and by who sees them only (arXiv 2305.19466)."""

    def place(
        self, q: Tensor, k: Tensor, layout: SequenceLayout, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See ``Attention``: q and k as they are."""
        return q, k


class SoftcappedAttention(Attention):
    """Attention whose scores saturate at ± ``logit_softcap`` (arXiv 2408.00118, section 2)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert config.attention is not None and config.attention.logit_softcap is not None
        self.softcap = config.attention.logit_softcap

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        """See ``Attention``."""
        return attend_softcapped(q, k, v, layout, self.scale, self.softcap)


class SinkAttention(Attention):
    """Attention that may attend to nothing: every head has a sink in its softmax (arXiv 2309.17453, equation 2)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert config.attention is not None
        self.sinks = nn.Parameter(torch.empty(config.attention.num_heads))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        """See ``Attention``."""
        return attend_with_sinks(q, k, v, layout, self.scale, self.sinks)


class ClampedAttention(Attention):
    """Attention whose queries, keys and values stay within ± ``clip_qkv`` (MPT and DBRX, published code)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        assert config.attention is not None and config.attention.clip_qkv is not None
        self.bound = config.attention.clip_qkv

    def project(self, x: Tensor, last: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Attention``."""
        q, k, v = (tensor.clamp(-self.bound, self.bound) for tensor in super().project(x, last))
        return q, k, v


def _qk_norm(config: ModelConfig, width: int) -> nn.Module:
    """The norm of ``width // d`` heads [B, S, heads, d]."""
    attention = config.attention
    assert attention is not None
    if attention.qk_norm is None:
        return nn.Identity()
    across = attention.qk_norm == "projection"
    return RMSNormAcrossHeads(width, config.norm_eps) if across else RMSNorm(attention.head_dim, config.norm_eps)
