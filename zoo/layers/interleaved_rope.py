"""Attention in chunks with rotary positions, and attention to everything without them, in turn.

The first has positions and no long context, the second the reverse (Llama 4, published code).

Shapes: B batch, S sequence, H query heads, G key/value heads, d head size, L key slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import InterleavedRopeConfig, ModelConfig
from zoo.layers.attention import Attention
from zoo.layers.sequence import SequenceLayout


class ChunkedAttention(Attention):
    """Attention within chunks of neighbouring positions; q and k may be brought to one size after the rotation."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        rope = _interleaved(config)
        self.chunk_size, self.normalised, self.eps = rope.chunk_size, rope.qk_norm, config.norm_eps

    def place(
        self, q: Tensor, k: Tensor, layout: SequenceLayout, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See ``Attention``."""
        q, k = super().place(q, k, layout, rotary)
        if not self.normalised:
            return q, k
        return F.rms_norm(q, q.shape[-1:], None, self.eps), F.rms_norm(k, k.shape[-1:], None, self.eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        """See ``Attention``."""
        return super().attend(q, k, v, layout.in_chunks(self.chunk_size))


class UnplacedAttention(Attention):
    """Attention without rotary positions, whose queries grow with theirs (arXiv 2501.19399)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        rope = _interleaved(config)
        self.temperature_scale, self.temperature_floor = rope.temperature_scale, rope.temperature_floor

    def place(
        self, q: Tensor, k: Tensor, layout: SequenceLayout, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See ``Attention``."""
        steps = torch.floor((layout.positions.float() + 1) / self.temperature_floor)
        factor = 1 + self.temperature_scale * torch.log1p(steps)
        return (q * factor[..., None, None]).to(q.dtype), k


def _interleaved(config: ModelConfig) -> InterleavedRopeConfig:
    assert config.attention is not None and config.attention.interleaved_rope is not None
    return config.attention.interleaved_rope
