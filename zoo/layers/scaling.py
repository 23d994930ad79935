"""Scaling of what enters the first block and of what leaves the last.

Shapes: B batch, S sequence, D model.
"""

from __future__ import annotations

from torch import Tensor, nn


class ScaledEmbedding(nn.Embedding):
    """Embeddings times a constant (arXiv 1706.03762, section 3.4: √D)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, multiplier: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.multiplier = multiplier

    def forward(self, input: Tensor) -> Tensor:
        """Ids [B, S] → [B, S, D]."""
        return super().forward(input) * self.multiplier


class Scale(nn.Module):
    """x times a constant: the logits of a wide model, made independent of its width (arXiv 2203.03466, table 3)."""

    def __init__(self, multiplier: float) -> None:
        super().__init__()
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape → the same."""
        return x * self.multiplier


class SoftCap(nn.Module):
    """c·tanh(x / c): as good as x where it is small, never beyond ± c (arXiv 2408.00118, section 2)."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape → the same."""
        return self.cap * (x / self.cap).tanh()
