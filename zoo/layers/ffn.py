"""Feed-forward networks, by what they compute.

Shapes: D model, F FFN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.linear import Linear
from zoo.layers.ungated_ffn import ReLUFFN

Activation = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))) (arXiv 1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202, equation 6)."""

    activation: Activation = staticmethod(F.silu)

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D]."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class GEGLU(SwiGLU):
    """down(gelu(gate(x)) · up(x)) (arXiv 2002.05202, equation 5), with the tanh form of GELU."""

    activation = staticmethod(gelu_tanh)


FFNS: dict[str, type[SwiGLU] | type[ReLUFFN]] = {"swiglu": SwiGLU, "geglu": GEGLU, "relu": ReLUFFN}
"""``ModelConfig.ffn`` → FFN."""
