"""Attention over a memory, which may be another sequence or the queries' own (arXiv 1706.03762, section 3.2.3).

Shapes: B batch, S queries, L tokens of the memory, D model, H heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cache import LayerCache
from zoo.layers.linear import Linear


class MemoryAttention(nn.Module):
    """o(softmax(q kᵀ + bias) v), q from one sequence, k and v from a memory.

    Scores are not divided by √d: what q_proj is drawn with makes them small (arXiv 1910.10683, published code).
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        width = num_heads * head_dim
        self.q_proj = Linear(hidden_size, width, bias=False)
        self.k_proj = Linear(hidden_size, width, bias=False)
        self.v_proj = Linear(hidden_size, width, bias=False)
        self.o_proj = Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from x to a memory.

        Args:
            x: [B, S, D].
            k: and v, [B, H, L, d], from ``keys_values``.
            mask: [B or 1, H or 1, S or 1, L], bool with True where a query sees a key, or what is added to the scores.

        Returns:
            [B, S, D].
        """
        q = self._heads(self.q_proj(x))
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)  # under autocast q is narrower
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory [B, L, D] → k and v, each [B, H, L, d]."""
        return self._heads(self.k_proj(memory)), self._heads(self.v_proj(memory))

    def new_cache(self, batch_size: int, max_length: int) -> LayerCache:
        """Empty k and v for ``max_length`` tokens."""
        weight = self.k_proj.weight
        shape = (batch_size, self.num_heads, max_length, self.head_dim)
        return LayerCache([torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2)])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
