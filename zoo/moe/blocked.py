"""Experts on the CPU, in blocks of sorted rows that stay in the cache, with a backward pass written by hand.

Rows are gathered, computed, weighted and summed back into their tokens block by block: of the [N, D] rows only those of
a block exist at a time, and kept for the backward pass are the input, the routing and, unless they are computed again,
the pre-activations [N, 2F].

A routing weight w multiplies an expert's inner activations h, which is the same as multiplying its output. Then its own
gradient needs no output of the expert: with g the gradient of the token, it is (downᵀ g) · h, and downᵀ g is there.

Shapes: T tokens, K top-k, N = T·K routed rows, E experts, D model, F FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.layers.ffn import Activation, gelu_tanh
from zoo.layers.linear import (
    products,
    products_apart,
    products_of_rows,
    rows_of_products,
    sum_of_products,
    uses_onednn,
)
from zoo.moe.dispatch import Assignment, assign
from zoo.moe.router import RouterOutput

BLOCK_NUMBERS = 2**20
"""Numbers in use of a block: enough rows for the cost of a call to vanish, few enough to stay in the cache."""

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Gate:
    """An activation and its derivative, written into memory that is there."""

    forward: Callable[[Tensor, Tensor], object]
    """(gate, out)"""
    backward: Callable[[Tensor, Tensor, Tensor], object]
    """(gradient, gate, out)"""


_GATES: dict[Activation, _Gate] = {
    F.silu: _Gate(
        lambda gate, out: _aten.silu.out(gate, out=out),
        lambda gradient, gate, out: _aten.silu_backward.grad_input(gradient, gate, grad_input=out),
    ),
    gelu_tanh: _Gate(
        lambda gate, out: _aten.gelu.out(gate, approximate="tanh", out=out),
        lambda gradient, gate, out: _aten.gelu_backward.grad_input(gradient, gate, approximate="tanh", grad_input=out),
    ),
}


def blocked_applies(x: Tensor, gate_up: Tensor, activation: Activation) -> bool:
    """Whether ``mix_blocked`` can compute this: on the CPU, in fp32 or fp64 throughout, eagerly."""
    return (
        x.device.type == "cpu"
        and x.dtype == gate_up.dtype
        and x.dtype in (torch.float32, torch.float64)
        and activation in _GATES
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def mix_one(x: Tensor, routing: RouterOutput, gate_up: Tensor, down: Tensor, activation: Activation = F.silu) -> Tensor:
    """``mix_blocked`` without a backward pass, of a single token, as in decoding: nothing to sort, and vectors only.

    Half of the calls of a block, which count beside the reading of a few experts' weights. Each product adds to the sum
    itself, but in bf16, whose sum would be rounded K times. x: [1, D] in the dtype of the experts, any.
    """
    weights, experts = routing.weights, routing.experts[0].tolist()
    up_weights, down_weights = (
        [of_all[expert] for expert in experts] for of_all in (gate_up.flatten(1, 2).mT, down.mT)
    )
    gate, up = torch.cat(products_of_rows([x] * len(experts), up_weights)).chunk(2, dim=1)
    inner = activation(gate).mul_(up)
    if weights.dtype != x.dtype:
        rows = products_of_rows(inner.split(1), down_weights)
        return torch.mm(weights, torch.cat(rows).to(weights.dtype)).to(x.dtype)
    return sum_of_products(inner.mul_(weights.mT).split(1), down_weights)


def one_applies(x: Tensor, gate_up: Tensor) -> bool:
    """Whether ``mix_one`` can compute this: a token on the CPU in the experts' dtype, eagerly, without gradients."""
    return (
        len(x) == 1
        and x.device.type == "cpu"
        and x.dtype == gate_up.dtype
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def mix_few(x: Tensor, routing: RouterOutput, gate_up: Tensor, down: Tensor, activation: Activation = F.silu) -> Tensor:
    """``mix_blocked`` without a backward pass, of few tokens: each product is of all experts, as calls count then."""
    assignment = assign(routing)
    ends = assignment.counts.cumsum(0).to(torch.int32)
    rows = x.index_select(0, assignment.token)
    gate, up = F.grouped_mm(rows, gate_up.flatten(1, 2).mT, offs=ends).chunk(2, dim=1)
    inner = activation(gate) * up * assignment.weight.unsqueeze(1)
    return torch.zeros_like(x).index_add_(0, assignment.token, F.grouped_mm(inner, down.mT, offs=ends))


def mix_blocked(
    x: Tensor,
    routing: RouterOutput,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation = F.silu,
    block_rows: int | None = None,
    keep: bool = True,
) -> Tensor:
    """Each token's sum of weight · expert(x) over its experts.

    Args:
        x: [T, D] fp32 or fp64. routing: of its tokens. gate_up: [E, 2, F, D]. down: [E, D, F].
        activation: of the gate, one that has its derivative here.
        block_rows: as ``blocks_of``'s limit; by default for ``BLOCK_NUMBERS``.
        keep: the pre-activations for the backward pass, which otherwise computes those of one block after the other.

    Returns:
        [T, D].
    """
    assignment = assign(routing)
    token, weight, counts = assignment.token, assignment.weight, assignment.counts.tolist()
    limit = block_rows or max(256, BLOCK_NUMBERS // (down.shape[1] + 3 * down.shape[2]))
    wanted = rows_of_products(counts, down[0], limit)
    if wanted != counts:
        token, weight = with_spare_rows(assignment, wanted)
    gate, blocks = _GATES[activation], blocks_of(wanted, limit)
    leaves = (x, weight, gate_up, down)
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
        mixed: Tensor = _Mix.apply(*leaves, token, blocks, gate, keep)
        return mixed
    return _forward(*leaves, token, blocks, gate, None)


def with_spare_rows(assignment: Assignment, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Give each expert so many rows, at least as many as it has; experts without any stay so.

    The rows that are added repeat the expert's last one with weight zero. So they add nothing to any sum or gradient,
    and what is not finite does not get to other experts or tokens.

    Returns:
        token [M], weight [M]
    """
    ends = assignment.counts.cumsum(0)
    wanted = torch.tensor(counts)
    expert = torch.repeat_interleave(wanted, output_size=sum(counts))
    spare = (wanted - assignment.counts).cumsum(0) - (wanted - assignment.counts)  # of the experts before
    place, last = torch.arange(len(expert)) - spare[expert], ends[expert] - 1
    row = torch.minimum(place, last)
    return assignment.token[row], assignment.weight[row].where(place <= last, 0)


@dataclass(frozen=True)
class Block:
    """The rows of some neighbouring experts."""

    rows: slice
    experts: list[int]
    """Those that have any rows, in order."""
    sizes: list[int]
    """How many each of them has."""

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def own(self, stack: Tensor) -> list[Tensor]:
        """[E, ...] → those of its experts."""
        first = self.experts[0]
        near = stack[first : self.experts[-1] + 1].unbind()
        return [near[expert - first] for expert in self.experts]


def blocks_of(counts: list[int], limit: int) -> list[Block]:
    """counts: [E] rows of each expert → blocks of at most ``limit`` rows, or of one expert that has more."""
    blocks: list[Block] = []
    experts: list[int] = []
    start = stop = 0
    for expert, count in enumerate(counts):
        if experts and stop + count - start > limit:
            blocks.append(Block(slice(start, stop), experts, [counts[e] for e in experts]))
            start, experts = stop, []
        if count:
            experts.append(expert)
            stop += count
    return [*blocks, Block(slice(start, stop), experts, [counts[e] for e in experts])] if experts else blocks


def _runs(block: Block) -> Iterator[tuple[slice, slice, int]]:
    """Neighbouring experts with as many rows each: (which experts, which rows of the block, how many of each)."""
    start = 0
    for rows, run in groupby(zip(block.experts, block.sizes, strict=True), key=itemgetter(1)):
        experts = [expert for expert, _ in run]
        for first, last in _consecutive(experts):
            stop = start + (last + 1 - first) * rows
            yield slice(first, last + 1), slice(start, stop), rows
            start = stop


def _consecutive(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first and the last of each run of ``numbers``, which ascend, without a gap."""
    first = last = numbers[0]
    for number in numbers[1:]:
        if number > last + 1:
            yield first, last
            first = number
        last = number
    yield first, last


def _products(block: Block, rows: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """rows · weightsᵀ of its expert, in ``out`` [n, O]. rows: [n, I] of ``block``. weights: [E, O, I]."""
    if out is None:
        out = rows.new_empty(len(rows), weights.shape[1])
    if uses_onednn():
        for experts, of, each in _runs(block):
            products(rows[of].unflatten(0, (-1, each)), weights[experts], out[of].unflatten(0, (-1, each)))
    else:
        products_apart(rows.split(block.sizes), block.own(weights.mT), out.split(block.sizes))
    return out


def _outer_products(block: Block, left: Tensor, right: Tensor, out: Tensor) -> None:
    """out[e] = leftᵀ · right over the rows of expert e. left: [n, O] of ``block``. right: [n, I]. out: [E, O, I]."""
    if uses_onednn():
        for experts, of, each in _runs(block):
            products(left[of].unflatten(0, (-1, each)).mT, right[of].unflatten(0, (-1, each)).mT, out[experts])
    else:
        products_apart(left.t().split(block.sizes, dim=1), right.split(block.sizes), block.own(out))


def _forward(
    x: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    token: Tensor,
    blocks: list[Block],
    gate: _Gate,
    kept: list[Tensor] | None,
) -> Tensor:
    """The sum [T, D]; pre-activations [n, 2F] of each block are added to ``kept`` where it is given."""
    width, size = down.shape[2], max(map(len, blocks), default=0)
    up_weights = gate_up.flatten(1, 2)
    out = torch.zeros_like(x)
    row_buffer, inner_buffer = x.new_empty(size, x.shape[1]), x.new_empty(size, width)
    both_buffer = x.new_empty(size, 2 * width) if kept is None else None
    for block in blocks:
        tokens, n = token[block.rows], len(block)
        rows, inner = row_buffer[:n], inner_buffer[:n]
        torch.index_select(x, 0, tokens, out=rows)
        both = _products(block, rows, up_weights, None if both_buffer is None else both_buffer[:n])
        if kept is not None:
            kept.append(both)
        gate.forward(both[:, :width], inner)
        inner.mul_(both[:, width:]).mul_(weight[block.rows, None])
        del both  # not beside that of the next block
        out.index_add_(0, tokens, _products(block, inner, down, rows))
    return out


class _Mix(torch.autograd.Function):
    """``_forward`` with the gradients of x, the routing weights, ``gate_up`` and ``down``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gate_up: Tensor,
        down: Tensor,
        token: Tensor,
        blocks: list[Block],
        gate: _Gate,
        keep: bool,
    ) -> Tensor:
        kept: list[Tensor] | None = [] if keep else None
        out = _forward(x, weight, gate_up, down, token, blocks, gate, kept)
        ctx.save_for_backward(x, weight, gate_up, down, token, *(kept or ()))
        ctx.blocks, ctx.gate, ctx.keep = blocks, gate, keep
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate_up, down, token, *kept = ctx.saved_tensors
        width, size = down.shape[2], max(map(len, ctx.blocks), default=0)
        up_weights, down_weights = gate_up.flatten(1, 2).mT, down.mT
        of_x, _, of_gate_up, of_down = ctx.needs_input_grad[:4]
        d_x, d_weight = torch.zeros_like(x) if of_x else None, torch.empty_like(weight)
        # No memory for the gradient of experts that are frozen.
        d_gate_up = torch.empty_like(gate_up) if of_gate_up else None
        d_down = torch.empty_like(down) if of_down else None
        d_up_weights = None if d_gate_up is None else d_gate_up.flatten(1, 2)
        row_buffer, inner_buffer = x.new_empty(size, x.shape[1]), x.new_empty(size, width)
        both_buffer = x.new_empty(size, 2 * width)
        again_buffer = None if ctx.keep else x.new_empty(size, 2 * width)
        for number, block in enumerate(ctx.blocks):
            tokens, n = token[block.rows], len(block)
            w = weight[block.rows, None]
            if again_buffer is None:
                both = kept[number]
            else:
                rows = torch.index_select(x, 0, tokens, out=row_buffer[:n])
                both = _products(block, rows, gate_up.flatten(1, 2), again_buffer[:n])
            gate, up = both.chunk(2, dim=1)
            rows = torch.index_select(gradient, 0, tokens, out=row_buffer[:n])
            d_inner, d_both = _products(block, rows, down_weights, inner_buffer[:n]), both_buffer[:n]
            d_gate, d_up = d_both.chunk(2, dim=1)
            ctx.gate.forward(gate, d_up)
            # The place of the gate's gradient holds the inner activations until that is known.
            inner = torch.mul(d_up, up, out=d_gate)
            torch.sum(inner * d_inner, dim=1, out=d_weight[block.rows])
            if d_down is not None:
                _outer_products(block, rows, inner.mul_(w), d_down)
            d_up.mul_(d_inner.mul_(w))
            ctx.gate.backward(d_inner.mul_(up), gate, d_gate)
            if d_up_weights is not None:
                torch.index_select(x, 0, tokens, out=rows)
                _outer_products(block, d_both, rows, d_up_weights)
            if d_x is not None:
                del d_inner, both, gate, up, inner  # not beside those of the next block
                d_x.index_add_(0, tokens, _products(block, d_both, up_weights, rows))
        busy = {expert for block in ctx.blocks for expert in block.experts}
        for expert in set(range(len(down))) - busy:
            for of_experts in (d_up_weights, d_down):
                if of_experts is not None:
                    of_experts[expert].zero_()
        return d_x, d_weight, d_gate_up, d_down, None, None, None, None
