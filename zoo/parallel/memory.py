"""What one rank holds at the fullest moment of a step: the model of memory.

Parameters and two Adam moments in fp32, sharded, are always there. The rest comes and goes, and no two kinds of it are
largest at the same time, so that moments are compared:

    forward     Gradients of the step before (Lightning frees them after it); the activations kept so far, and those of
                a running block, with its parameters gathered, beside the buffer that they were gathered in and that of
                the unit before.
    loss        The same with all that is kept, a chunk of logits, and the gradients that are computed with them: of the
                final hidden states, and in fp32 of the head; then backward, where the head's is cast.
    backward    For the first and last blocks of a kind: the gradients of the blocks after it; what is kept for those
                before it; and of the block itself what one of five moments needs (``_backward``).
    end         All gradients, and those of embedding and head in both dtypes.

A gathered unit is copied out of the buffer that it arrived in, experts by way of a third (they are split along another
dimension than the first). Its gradient comes in the dtype of the computation, is copied to fp32, and waits there until
the next unit's is reduced. With several micro-batches nothing is reduced before the last, and all gradients of the
local model wait in fp32; where each is reduced, the sharded gradients stay throughout.

A GPU counts as full at ``USABLE_MEMORY`` of its memory: CUDA, NCCL's buffers and fragmentation have the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from zoo.accounting import FP32_BYTES, count_buffers
from zoo.parallel.activations import BlockActivations, block_activations, head_activations, loss_chunk
from zoo.parallel.estimate import Setting, Workload
from zoo.parallel.footprint import COMPUTE_BYTES, Holdings, Layers, Recompute
from zoo.parallel.mesh import MeshSizes

USABLE_MEMORY = 0.9
ADAM_MOMENTS = 2


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes that come and go."""

    gradients: float = 0.0
    gathered: float = 0.0
    unreduced: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        """Bytes."""
        return self.gradients + self.gathered + self.unreduced + self.activations


def peak_memory(work: Workload, sizes: MeshSizes, held: Holdings, setting: Setting) -> dict[str, float]:
    """Bytes by purpose on the fullest rank at its fullest moment."""
    fullest = max(_moments(work, sizes, held, setting), key=lambda moment: moment.total)
    parameters = held.whole.at_rest * FP32_BYTES
    return {
        "parameters": parameters + count_buffers(work.config) * FP32_BYTES,
        "gradients": fullest.gradients,
        "optimizer": ADAM_MOMENTS * parameters,
        "gathered parameters": fullest.gathered,
        "unreduced gradients": fullest.unreduced,
        "activations": fullest.activations,
    }


Kinds = list[tuple[Layers, BlockActivations]]
"""Blocks that are equal and follow each other, with the activations of one."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A block, and what is there whenever its turn comes."""

    layers: Layers
    activations: BlockActivations
    kept_before: float
    """Bytes per token that are kept for the blocks before it."""
    gathered_before: int
    """Bytes of the parameters of the blocks before it."""
    at_rest_after: int
    """Elements that the rank keeps of the blocks after it."""
    first: bool
    last: bool


def _moments(work: Workload, sizes: MeshSizes, held: Holdings, setting: Setting) -> Iterator[Moment]:
    config, itemsize = work.config, COMPUTE_BYTES[work.precision]
    tokens, recompute = setting.micro_batch * work.sequence_length, setting.recompute
    first_layers = accumulate((layers.count for layers in held.layers), initial=0)
    kinds = [
        (layers, block_activations(config, first, itemsize, sizes))
        for layers, first in zip(held.layers, first_layers, strict=False)
    ]
    everything = held.whole.at_rest * FP32_BYTES
    root = held.root.gathered_bytes
    resident = root if setting.reshard else held.whole.gathered_bytes
    several = setting.micro_batches > 1
    # Gradients of earlier micro-batches, as they are or summed over ranks; of the step before until these begin.
    waiting = held.whole.gathered * FP32_BYTES if several and not setting.reduce_each else 0
    summed = everything if several and setting.reduce_each else 0
    before = 0 if waiting else everything
    head = config.vocab_size * config.hidden_size * itemsize
    for place in _places(kinds, recompute):
        block, experts, own = place.layers.block, place.layers.experts, place.activations
        buffers = 2 * block.gathered_bytes + 2 * experts.gathered_bytes if setting.reshard else 0
        yield Moment(
            gradients=before,
            gathered=resident + buffers,
            unreduced=waiting,
            activations=tokens * (place.kept_before + own.running(recompute)),
        )
        for moment in _backward(place, setting, itemsize, sizes):
            yield Moment(
                gradients=0 if waiting else summed or place.at_rest_after * FP32_BYTES,
                gathered=root + moment.gathered + (0 if setting.reshard else place.gathered_before),
                unreduced=waiting + head + moment.unreduced,
                activations=tokens * (place.kept_before + moment.activations),
            )
    kept = sum(layers.count * own.kept(recompute) for layers, own in kinds)
    kept += head_activations(config, itemsize)
    wide_head = config.vocab_size * config.hidden_size * FP32_BYTES
    yield Moment(
        gradients=before,
        gathered=resident,
        unreduced=waiting + wide_head,
        activations=tokens * kept + loss_chunk(config, itemsize, tokens),
    )
    yield Moment(
        gradients=summed,
        gathered=resident,
        unreduced=waiting + wide_head + (head if itemsize < FP32_BYTES else 0),
        activations=tokens * kept,
    )
    unreduced = waiting or held.root.gathered * (itemsize + FP32_BYTES)
    yield Moment(gradients=everything, unreduced=unreduced, activations=tokens * itemsize * config.hidden_size)


def _places(kinds: Kinds, recompute: Recompute) -> Iterator[_Place]:
    """The blocks at the ends of each kind and next to them: between them everything changes evenly."""
    kept, gathered = 0.0, 0
    after = sum(layers.count * (layers.block + layers.experts).at_rest for layers, _ in kinds)
    for number, (layers, own) in enumerate(kinds):
        one = layers.block + layers.experts
        for i in sorted({0, layers.count - 2, layers.count - 1} & set(range(layers.count))):
            yield _Place(
                layers=layers,
                activations=own,
                kept_before=kept + i * own.kept(recompute),
                gathered_before=gathered + i * one.gathered_bytes,
                at_rest_after=after - (i + 1) * one.at_rest,
                first=number == i == 0,
                last=number == len(kinds) - 1 and i == layers.count - 1,
            )
        kept += layers.count * own.kept(recompute)
        gathered += layers.count * one.gathered_bytes
        after -= layers.count * one.at_rest


def _backward(place: _Place, setting: Setting, itemsize: int, sizes: MeshSizes) -> Iterator[Moment]:
    """Bytes of a block and its neighbours in the backward pass; activations are bytes per token.

    In turn: gradients of the rows return; the experts are gathered; they are gone through, and their gradients
    reduced; then the mixer; and then the gradients of the block.
    """
    block, experts, own = place.layers.block, place.layers.experts, place.activations
    ahead = 0 if place.first or not setting.reshard else block.gathered_bytes
    arriving = 0 if not setting.reshard else experts.gathered_bytes
    after = 0 if place.last else block.gathered * FP32_BYTES
    missing = own.inside_experts if setting.recompute == "experts" else 0.0
    both = itemsize + FP32_BYTES
    apart = experts.gathered > 0
    yield Moment(
        gathered=block.gathered_bytes + experts.gathered_bytes + (0 if apart else ahead),
        unreduced=after,
        activations=own.whole - missing + own.input + own.returning,
    )
    if apart:
        buffers = 2 * arriving if sizes.expert_shard > 1 else 0
        yield Moment(
            gathered=block.gathered_bytes + experts.gathered_bytes + buffers,
            unreduced=after,
            activations=own.whole - missing + own.input,
        )
    yield Moment(
        gathered=block.gathered_bytes + experts.gathered_bytes + ahead,
        unreduced=after + (experts if apart else block).gathered * itemsize,
        activations=own.whole + own.input + own.ffn_gradients,
    )
    if apart:
        yield Moment(
            gathered=block.gathered_bytes + ahead + (experts.gathered_bytes if itemsize == FP32_BYTES else 0),
            unreduced=experts.gathered * both,
            activations=own.mixer + own.input,
        )
    yield Moment(
        gathered=block.gathered_bytes + ahead,
        unreduced=experts.gathered * FP32_BYTES + block.gathered * itemsize,
        activations=2 * own.mixer + own.input,
    )
    yield Moment(gathered=ahead, unreduced=block.gathered * both, activations=own.input)
