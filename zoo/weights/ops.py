"""Reversible operations between the tensors of a published checkpoint and the parameters of ``zoo.model.Decoder``.

A weight map is a list of operations. Each names the published tensors it takes and the parameters it fills, and runs
both ways, one tensor group at a time: nothing but its own group is ever in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Read = Callable[[str], "Tensor"]
"""Name → tensor."""


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

    def source_shape(self, target_shape: Shape) -> Shape:
        """Shape that every source must have, given the shape of the target."""
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

    def source_shape(self, target_shape: Shape) -> Shape:
        merged = target_shape[self.dim] * target_shape[self.dim + 1]
        return (*target_shape[: self.dim], merged, *target_shape[self.dim + 2 :])


def source_shapes(ops: Iterable[Op], target_shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Published name → shape, for a map that fills exactly ``target_shapes``."""
    ops = list(ops)
    targets = [name for op in ops for name in op.targets]
    sources = [name for op in ops for name in op.sources]
    # A broken map is our mistake, not the user's.
    assert sorted(targets) == sorted(target_shapes), set(targets) ^ set(target_shapes)
    assert len(set(sources)) == len(sources)
    return {name: op.source_shape(target_shapes[op.targets[0]]) for op in ops for name in op.sources}
