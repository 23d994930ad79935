"""FFNs and experts with weights of 8 bits, for decoding on a CPU: there reading the weights is what takes the time.

Attention, router, embedding and output head stay as they are.

Shapes: T tokens, N routed rows, E experts, D model, F FFN; o rows and i columns of a matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.model import Decoder
from zoo.moe.clamped import ClampedExperts
from zoo.moe.dispatch import assign
from zoo.moe.experts import Experts, StackedExperts
from zoo.moe.layer import MoE
from zoo.moe.router import RouterOutput

FEW_ROWS = 8
"""torch's product with 8-bit weights is the faster up to so many rows; beyond, the weights are widened first."""


@torch.no_grad()
def quantize_int8(model: Decoder) -> None:
    """Replace the FFNs and experts of ``model`` by ``Int8Linear`` and ``Int8Experts``, layer by layer and in place.

    Raises:
        ValueError: the model is not on a CPU, or its experts have biases, an adapter or no gate.
    """
    device = model.embed_tokens.weight.device
    if device.type != "cpu":
        raise ValueError(f"int8 on {device}: only a CPU gains from it; use device cpu, or dtype bfloat16")
    experts = [block.ffn.experts for block in model.layers if isinstance(block.ffn, MoE)]
    if not all(isinstance(stack, StackedExperts) for stack in experts):
        raise ValueError("int8: experts with an adapter are not supported; merge it, or use dtype bfloat16")
    if any(isinstance(stack, ClampedExperts) or not isinstance(stack, Experts) for stack in experts):
        raise ValueError("int8: experts with biases and a clamp, or without a gate, are not supported; use bfloat16")
    children = [child for block in model.layers for child in block.named_children()]
    for ffn in [module for name, module in children if name in ("ffn", "dense_ffn")]:
        if isinstance(ffn, MoE):
            assert isinstance(ffn.experts, Experts)
            ffn.register_module("experts", Int8Experts(ffn.experts))
        for name, module in list(ffn.named_modules()):
            if isinstance(module, nn.Linear) and module.out_features > 1:
                ffn.set_submodule(name, Int8Linear(module))


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., o, i] → ([..., o, i] int8, [..., o] bf16): symmetric, one scale a row, the largest weight 127."""
    scale = (weight.abs().amax(dim=-1) / 127).clamp(min=1e-30).to(torch.bfloat16)
    return (weight / scale.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scale


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [N, i], weight [o, i] int8, scale [o] bf16 → [N, o] in the dtype of x."""
    if len(x) > FEW_ROWS:
        return F.linear(x, weight.to(x.dtype) * scale.to(x.dtype).unsqueeze(-1))
    return torch._weight_int8pack_mm(x.to(torch.bfloat16).contiguous(), weight, scale).to(x.dtype)


class Int8Linear(nn.Module):
    """x Wᵀ with W in 8 bits."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        for name, tensor in zip(("weight", "scale"), quantized(linear.weight), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., i] → [..., o]."""
        return linear_int8(x.flatten(0, -2), self.weight, self.scale).unflatten(0, x.shape[:-1])


class Int8Experts(nn.Module):
    """``Experts`` with weights in 8 bits: ``gate_up`` [E, 2·F, D] and ``down`` [E, D, F]."""

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.activation = experts.activation
        for name, weight in (("gate_up", experts.gate_up.flatten(1, 2)), ("down", experts.down)):
            values, scale = quantized(weight)
            self.register_buffer(name, values)
            self.register_buffer(f"{name}_scale", scale)

    def mixes(self, x: Tensor) -> bool:
        """See ``Experts``: always."""
        return True

    def forward(self, x: Tensor, routing: RouterOutput) -> Tensor:
        """x [T, D] → [T, D], each token's sum over its experts of weight · row."""
        assignment, out = assign(routing), torch.zeros_like(x)
        start = 0
        for expert, count in enumerate(assignment.counts.tolist()):
            if count:
                token = assignment.token[start : start + count]
                pre = linear_int8(x.index_select(0, token), self.gate_up[expert], self.gate_up_scale[expert])
                gate, up = pre.chunk(2, dim=-1)
                rows = linear_int8(self.activation(gate) * up, self.down[expert], self.down_scale[expert])
                weighted = rows * assignment.weight[start : start + count].unsqueeze(-1)
                out.index_add_(0, token, weighted.to(x.dtype))
                start += count
        return out
