"""Reversible operations between the tensors of a published checkpoint and the parameters of ``zoo.model.Decoder``.

A weight map is a list of operations, the rarer ones from ``zoo/weights/rearrange.py``. Each names the published tensors
it takes and the parameters it fills, and runs both ways, one tensor group at a time: nothing but its own group is ever
in memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Read = Callable[[str], "Tensor"]
"""Name → tensor."""
Region = tuple[slice, ...]
"""A box of a tensor: a slice with start and stop for every dimension."""
ReadRegion = Callable[[str, Region], "Tensor"]
"""Name and box → that box of the tensor."""


class Op(Protocol):
    """One reversible operation; ``sources`` are published names, ``targets`` the names of our parameters."""

    @property
    def sources(self) -> tuple[str, ...]: ...

    @property
    def targets(self) -> tuple[str, ...]: ...

    def to_zoo(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        """Read every source once and yield (name, tensor) for every target."""
        ...

    def to_published(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        """Read every target once and yield (name, tensor) for every source: the inverse of ``to_zoo``."""
        ...

    def region_to_zoo(self, target: str, region: Region, target_shape: Shape, read: ReadRegion) -> Tensor:
        """The box ``region`` of ``target``, which has ``target_shape``; nothing else is read."""
        ...

    def source_shape(self, target_shape: Shape) -> Shape:
        """Shape that every source must have, given the shape of the first target."""
        ...


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    source: str
    target: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def to_zoo(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        yield self.target, read(self.source)

    def to_published(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        yield self.source, read(self.target)

    def region_to_zoo(self, target: str, region: Region, target_shape: Shape, read: ReadRegion) -> Tensor:
        return read(self.source, region)

    def source_shape(self, target_shape: Shape) -> Shape:
        return target_shape


@dataclass(frozen=True)
class Copies:
    """One tensor that is published under several names. The first is read; that the others equal it is for the reader
    of the checkpoint to check (``zoo.weights.source.check_copy``)."""

    sources: tuple[str, ...]
    target: str

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def to_zoo(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        yield self.target, read(self.sources[0])

    def to_published(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        tensor = read(self.target)
        for name in self.sources:
            yield name, tensor

    def region_to_zoo(self, target: str, region: Region, target_shape: Shape, read: ReadRegion) -> Tensor:
        return read(self.sources[0], region)

    def source_shape(self, target_shape: Shape) -> Shape:
        return target_shape


@dataclass(frozen=True)
class Stack:
    """Tensors of one shape, in row-major order, stacked along new leading dimensions.

    With ``leading = (E, 2)`` the sources gate₀, up₀, gate₁, up₁, … become one tensor [E, 2, F, D].
    """

    sources: tuple[str, ...]
    target: str
    leading: Shape

    def __post_init__(self) -> None:
        assert math.prod(self.leading) == len(self.sources)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def to_zoo(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        # Copied one by one into the result: the peak is the group and one source, not twice the group.
        first = read(self.sources[0])
        stacked = first.new_empty((len(self.sources), *first.shape))
        stacked[0] = first
        for i, name in enumerate(self.sources[1:], start=1):
            stacked[i] = read(name)
        yield self.target, stacked.unflatten(0, self.leading)

    def to_published(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        yield from zip(self.sources, read(self.target).flatten(0, len(self.leading) - 1).unbind(0), strict=True)

    def region_to_zoo(self, target: str, region: Region, target_shape: Shape, read: ReadRegion) -> Tensor:
        depth = len(self.leading)
        chosen = [range(s.start, s.stop) for s in region[:depth]]
        sources = [self.sources[_row_major(index, self.leading)] for index in itertools.product(*chosen)]
        first = read(sources[0], region[depth:])
        stacked = first.new_empty((len(sources), *first.shape))
        stacked[0] = first
        for i, name in enumerate(sources[1:], start=1):
            stacked[i] = read(name, region[depth:])
        return stacked.unflatten(0, [len(indices) for indices in chosen])

    def source_shape(self, target_shape: Shape) -> Shape:
        return target_shape[len(self.leading) :]


@dataclass(frozen=True)
class Split:
    """One dimension of the source split in two: [E, 2·F, D] becomes [E, 2, F, D] with ``dim = 1, parts = 2``."""

    source: str
    target: str
    dim: int
    parts: int

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def to_zoo(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        yield self.target, read(self.source).unflatten(self.dim, (self.parts, -1))

    def to_published(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        yield self.source, read(self.target).flatten(self.dim, self.dim + 1)

    def region_to_zoo(self, target: str, region: Region, target_shape: Shape, read: ReadRegion) -> Tensor:
        outer, inner = region[self.dim : self.dim + 2]
        size = target_shape[self.dim + 1]
        starts = [part * size + inner.start for part in range(outer.start, outer.stop)]
        slices = [slice(start, start + inner.stop - inner.start) for start in starts]
        parts = [read(self.source, (*region[: self.dim], s, *region[self.dim + 2 :])) for s in slices]
        whole = parts[0].new_empty((len(parts), *parts[0].shape))
        for i, part in enumerate(parts):
            whole[i] = part
        return whole.movedim(0, self.dim)

    def source_shape(self, target_shape: Shape) -> Shape:
        merged = target_shape[self.dim] * target_shape[self.dim + 1]
        return (*target_shape[: self.dim], merged, *target_shape[self.dim + 2 :])


def _row_major(index: tuple[int, ...], shape: Shape) -> int:
    place = 0
    for i, size in zip(index, shape, strict=True):
        place = place * size + i
    return place


def source_shapes(ops: Iterable[Op], target_shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Published name → shape, for a map that fills exactly ``target_shapes``."""
    ops = list(ops)
    targets = [name for op in ops for name in op.targets]
    sources = [name for op in ops for name in op.sources]
    # A broken map is our mistake, not the user's.
    assert sorted(targets) == sorted(target_shapes), set(targets) ^ set(target_shapes)
    assert len(set(sources)) == len(sources)
    return {name: op.source_shape(target_shapes[op.targets[0]]) for op in ops for name in op.sources}
