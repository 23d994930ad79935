"""Attention that knows positions by a bias of its scores (arXiv 1910.10683, section 2.1; arXiv 2112.06905, section 4).

Shapes: B batch, Q asking tokens, H query heads, G key/value heads, d head size, L key slots.
"""

from __future__ import annotations

from torch import Tensor

from zoo.config import ModelConfig
from zoo.layers.attend import attend_with_bias
from zoo.layers.attention import PositionlessAttention
from zoo.layers.relative_position import RelativePositionBias
from zoo.layers.sequence import SequenceLayout


class RelativeAttention(PositionlessAttention):
    """softmax(q kᵀ / √d + b + mask) v, with a learned b for every head and bucket of distances in this layer.

    Queries and keys themselves know no positions; distances are those within a document, padding left out.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        attention = config.attention
        assert attention is not None and attention.relative_positions is not None
        positions = attention.relative_positions
        self.position_bias = RelativePositionBias(
            positions.num_buckets, positions.max_distance, attention.num_heads, bidirectional=False
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        """See ``Attention``."""
        bias = self.position_bias.between(layout.positions, layout.key_positions)
        return attend_with_bias(q, k, v, layout, self.scale, bias)
