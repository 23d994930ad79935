"""What makes a router's logits differ from those that it would have by itself: noise, jitter, temperature.

Random numbers are of torch's default generator and of training only, so that recomputed activations and resumed runs
draw the same ones.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config_routing import TemperatureConfig
from zoo.layers.linear import linear


class Jitter(nn.Module):
    """x ⊙ u with each element of u drawn from 1 ± ``size`` while training (arXiv 2101.03961, appendix C)."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] → [T, D]."""
        return x * torch.empty_like(x).uniform_(1 - self.size, 1 + self.size) if self.training else x


class NoisyLogits(nn.Module):
    """logits + N(0, 1) · softplus(W x) while training (noisy top-k gating, arXiv 1701.06538, equation 4)."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, logits: Tensor, x: Tensor) -> Tensor:
        """logits [T, E] and the x [T, D] that they are of → [T, E]."""
        if not self.training:
            return logits
        return logits + torch.randn_like(logits) * F.softplus(linear(x, self.weight.to(x.dtype)))


class Temperature(nn.Module):
    """logits / τ(step), where the step is that of the model's training: ``set_step`` sets it, a checkpoint keeps it."""

    step: Tensor

    def __init__(self, config: TemperatureConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("step", torch.zeros((), dtype=torch.float32))

    def forward(self, logits: Tensor) -> Tensor:
        """logits [T, E] → [T, E]."""
        c = self.config
        progress = (self.step.to(logits.dtype) / c.steps).clamp(max=1)
        return logits / (c.start + (c.end - c.start) * progress)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Temperature:
        """Casting the model leaves the step in fp32: bf16 has no 257."""
        step = self.step
        super()._apply(fn, recurse)
        if self.step.dtype != step.dtype:
            self.step = step.to(self.step.device)
        return self


def set_step(model: nn.Module, step: int) -> None:
    """Tell every ``Temperature`` in ``model`` how many optimizer steps were taken."""
    for module in model.modules():
        if isinstance(module, Temperature):
            module.step.fill_(step)
