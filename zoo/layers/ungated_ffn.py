"""Feed-forward network without a gate.

Shapes: D model.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.linear import Linear


class ReLUFFN(nn.Module):
    """down(max(0, up(x))) (arXiv 1706.03762, equation 2, without biases)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D]."""
        return self.down_proj(F.relu(self.up_proj(x)))
