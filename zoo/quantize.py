"""FFNs and experts with weights of 8 or 4 bits, for a CPU: there reading the weights is what takes the time.

Attention, router, embedding, output head and MTP modules stay as they are.

Shapes: T tokens, N rows, E experts, D model, F FFN; o rows and i columns of a matrix, G groups of columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.model import Decoder
from zoo.moe.clamped import ClampedExperts
from zoo.moe.dispatch import assign
from zoo.moe.experts import Experts, StackedExperts
from zoo.moe.layer import MoE
from zoo.moe.router import RouterOutput
from zoo.weights.precision import native_bf16

TINY = 1e-30
"""Least scale: that of a row of zeros."""
CACHED_ROWS = 128
"""Whose sums of integers are still in the cache when they are scaled."""


class QuantizedWeight(nn.Module, ABC):
    """A stack of matrices [E, o, i] held in few bits, and the product of rows with one of them."""

    fill: tuple[int, int]
    """What o and i of the held matrices are multiples of, filled up with zeros, because torch's products ask for it."""
    few_rows: int
    """torch's product with the held weights is the faster up to so many rows; beyond, they are widened first."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        o, i = weight.shape[1:]
        self.rows, self.missing = o, -i % self.fill[1]
        self.hold(F.pad(weight.float(), (0, self.missing, 0, -o % self.fill[0])))

    def product(self, x: Tensor, index: int = 0) -> Tensor:
        """x [N, i] → x Wᵀ [N, o] in the dtype of x, with W number ``index``."""
        if self.missing:
            x = F.pad(x, (0, self.missing))
        out = (self.few if len(x) <= self.few_rows else self.many)(x, index)
        return out if out.shape[1] == self.rows else out[:, : self.rows]

    @abstractmethod
    def hold(self, weight: Tensor) -> None:
        """Register the buffers that stand for ``weight`` [E, o, i] in fp32, filled up."""

    @abstractmethod
    def few(self, x: Tensor, index: int) -> Tensor:
        """``product`` by torch's product with the held weights; x is filled up."""

    @abstractmethod
    def many(self, x: Tensor, index: int) -> Tensor:
        """``product`` for many rows; x is filled up."""


class Int8(QuantizedWeight):
    """8 bits a weight, symmetric, one scale a row: the largest weight of a row is 127."""

    values: Tensor
    """[E, o, i] int8"""
    scale: Tensor
    """[E, o] bf16"""
    fill = (1, 16)  # with another number of columns torch's product reads beyond the matrix
    few_rows = 16

    def hold(self, weight: Tensor) -> None:
        """See ``QuantizedWeight``."""
        scale = (weight.abs().amax(dim=-1) / 127).clamp(min=TINY).to(torch.bfloat16)
        self.register_buffer("values", (weight / scale.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)

    def few(self, x: Tensor, index: int) -> Tensor:
        """See ``QuantizedWeight``."""
        rows = x.to(torch.bfloat16).contiguous()
        return torch._weight_int8pack_mm(rows, self.values[index], self.scale[index]).to(x.dtype)

    def many(self, x: Tensor, index: int) -> Tensor:
        """See ``QuantizedWeight``. Whole numbers up to 127 are exact in bf16."""
        dtype = torch.bfloat16 if native_bf16(x.device) else x.dtype
        return F.linear(x.to(dtype), self.values[index].to(dtype)).to(x.dtype).mul_(self.scale[index].to(x.dtype))


class DynamicInt8(Int8):
    """As ``Int8``, and many rows are rounded to 8 bits as well, each with a scale of its own: products of integers."""

    few_rows = 4

    def many(self, x: Tensor, index: int) -> Tensor:
        """See ``QuantizedWeight``."""
        scale = (x.abs().amax(dim=-1, keepdim=True).float() / 127).clamp(min=TINY)
        rows, of_weight = (x / scale).round_().to(torch.int8).contiguous(), self.scale[index].float()
        out = x.new_empty(len(x), len(of_weight), dtype=torch.float32)
        for part, of_rows, result in zip(*(t.split(CACHED_ROWS) for t in (rows, scale, out)), strict=True):
            torch.mul(torch._int_mm(part, self.values[index].T), of_rows, out=result).mul_(of_weight)
        return out.to(x.dtype)


class Int4(QuantizedWeight):
    """4 bits a weight, and for each ``fill[1]`` columns of a row a scale and an offset of 16 bits: 5 bits in all."""

    packed: Tensor
    """[E, o, i / 2] uint8, in the order of torch's product, which differs between processors."""
    scales: Tensor
    """[E, G, o, 2] bf16: scale and offset. A weight is (value - 8) · scale + offset, with values from 0 to 15."""
    fill = (64, 32)
    few_rows = 96

    def hold(self, weight: Tensor) -> None:
        """See ``QuantizedWeight``."""
        values, scales = zip(*map(self._rounded, weight), strict=True)
        self.register_buffer("packed", torch.stack([torch._convert_weight_to_int4pack_for_cpu(v, 1) for v in values]))
        self.register_buffer("scales", torch.stack(scales))

    def few(self, x: Tensor, index: int) -> Tensor:
        """See ``QuantizedWeight``."""
        rows = x.to(torch.bfloat16).contiguous()
        return torch._weight_int4pack_mm_for_cpu(rows, self.packed[index], self.fill[1], self.scales[index]).to(x.dtype)

    def many(self, x: Tensor, index: int) -> Tensor:
        """See ``QuantizedWeight``."""
        if not _unpacks():
            return self.few(x, index)
        dtype = torch.bfloat16 if native_bf16(x.device) else x.dtype
        scale, offset = self.scales[index].to(dtype).unsqueeze(1).permute(3, 0, 1, 2).contiguous()  # [G, 1, o] each
        groups = unpacked(self.packed[index]).unflatten(0, (-1, self.fill[1])).to(dtype)
        weight = groups.sub_(8).mul_(scale).add_(offset).flatten(0, 1)
        return (x.to(dtype) @ weight).to(x.dtype)

    def _rounded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight [o, i] → (values [o, i] int32, scales [G, o, 2] bf16)."""
        groups = weight.unflatten(1, (-1, self.fill[1]))
        low, high = groups.aminmax(dim=-1)
        scale = ((high - low) / 15).clamp(min=TINY).to(torch.bfloat16)
        offset = (low + 8 * scale).to(torch.bfloat16)
        values = ((groups - offset.unsqueeze(-1)) / scale.unsqueeze(-1)).round_().add_(8).clamp_(0, 15)
        return values.flatten(1).int(), torch.stack((scale.T, offset.T), dim=-1)


def unpacked(packed: Tensor) -> Tensor:
    """packed [o, i / 2] as torch lays it out for AVX-512 → values [i, o] uint8.

    By blocks of 64 rows, column by column: the low halves of 32 bytes are the first 32 rows, the high ones the others.
    """
    blocks = packed.view(len(packed) // 64, -1, 32)
    return torch.cat((blocks & 15, blocks >> 4), dim=-1).transpose(0, 1).flatten(1)


@cache
def _unpacks() -> bool:
    """Whether ``unpacked`` gives back what torch packs on this processor."""
    values = torch.arange(128 * 32, dtype=torch.int32).view(128, 32) * 7 // 3 % 16
    return torch.equal(unpacked(torch._convert_weight_to_int4pack_for_cpu(values, 1)), values.T)


KINDS: dict[str, type[QuantizedWeight]] = {"int8": Int8, "int8-dynamic": DynamicInt8, "int4": Int4}
"""Names of ``zoo generate --quantize``."""


class QuantizedLinear(nn.Module):
    """x Wᵀ with W in few bits."""

    def __init__(self, linear: nn.Linear, kind: type[QuantizedWeight]) -> None:
        super().__init__()
        self.weight = kind(linear.weight.unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., i] → [..., o]."""
        return self.weight.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class QuantizedExperts(nn.Module):
    """``Experts`` with weights in few bits: ``gate_up`` of E matrices [2·F, D] and ``down`` of E [D, F]."""

    def __init__(self, experts: Experts, kind: type[QuantizedWeight]) -> None:
        super().__init__()
        self.activation = experts.activation
        self.gate_up = kind(experts.gate_up.flatten(1, 2))
        self.down = kind(experts.down)

    def mixes(self, x: Tensor) -> bool:
        """See ``Experts``: always."""
        return True

    def forward(self, x: Tensor, routing: RouterOutput) -> Tensor:
        """x [T, D] → [T, D], each token's sum over its experts of weight · row."""
        if len(x) == 1:
            return self._one(x, routing)
        assignment, out = assign(routing), torch.zeros_like(x)
        start = 0
        for expert, count in enumerate(assignment.counts.tolist()):
            if count:
                token = assignment.token[start : start + count]
                gate, up = self.gate_up.product(x.index_select(0, token), expert).chunk(2, dim=-1)
                rows = self.down.product(self.activation(gate) * up, expert)
                weighted = rows * assignment.weight[start : start + count].unsqueeze(-1)
                out.index_add_(0, token, weighted.to(x.dtype))
                start += count
        return out

    def _one(self, x: Tensor, routing: RouterOutput) -> Tensor:
        """``forward`` of a single token: nothing to sort."""
        experts, weights = routing.experts[0].tolist(), routing.weights
        gate, up = torch.cat([self.gate_up.product(x, expert) for expert in experts]).chunk(2, dim=-1)
        inner = (self.activation(gate) * up).split(1)
        rows = torch.cat([self.down.product(row, expert) for row, expert in zip(inner, experts, strict=True)])
        return torch.mm(weights, rows.to(weights.dtype)).to(x.dtype)


@torch.no_grad()
def quantize(model: Decoder, name: str) -> None:
    """Replace FFNs and experts of ``model`` by ``QuantizedLinear`` and ``QuantizedExperts``, one by one and in place.

    Args:
        model: on a CPU.
        name: one of ``KINDS``.

    Raises:
        ValueError: another name, the model is not on a CPU, or its experts have biases, an adapter or no gate.
    """
    if name not in KINDS:
        raise ValueError(f"quantize = {name!r}: give one of {', '.join(KINDS)}")
    kind, device = KINDS[name], model.embed_tokens.weight.device
    if device.type != "cpu":
        raise ValueError(f"{name} on {device}: only a CPU gains from it; use device cpu, or dtype bfloat16")
    experts = [block.ffn.experts for block in model.layers if isinstance(block.ffn, MoE)]
    if not all(isinstance(stack, StackedExperts) for stack in experts):
        raise ValueError(f"{name}: experts with an adapter are not supported; merge it, or use dtype bfloat16")
    if any(isinstance(stack, ClampedExperts) or not isinstance(stack, Experts) for stack in experts):
        raise ValueError(f"{name}: experts with biases and a clamp, or without a gate, are not supported; use bfloat16")
    children = [child for block in model.layers for child in block.named_children()]
    for ffn in [module for part, module in children if part in ("ffn", "dense_ffn")]:
        if isinstance(ffn, MoE):
            assert isinstance(ffn.experts, Experts)
            ffn.register_module("experts", QuantizedExperts(ffn.experts, kind))
        for path, module in list(ffn.named_modules()):
            if isinstance(module, nn.Linear) and module.out_features > 1:
                ffn.set_submodule(path, QuantizedLinear(module, kind))


def held_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of ``model``, what is shared once."""
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
