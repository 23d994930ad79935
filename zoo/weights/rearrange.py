"""Reversible operations for checkpoints that store several matrices as one, or transposed.

They are ``Op``s as those of ``zoo/weights/ops.py``, and run both ways one tensor group at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoo.weights.ops import Op, Read, ReadRegion, Region, Shape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Transpose:
    """The dimensions of the source in another order: target dimension i is source dimension ``order[i]``.

    With ``interleaved = 2`` the last source dimension holds pairs (gate₀, up₀, gate₁, up₁, …), which are made a
    dimension of their own, the last, beforehand: [E, D, 2·F] becomes [E, 2, F, D] with ``order = (0, 3, 2, 1)``.
    """

    source: str
    target: str
    order: tuple[int, ...]
    interleaved: int = 1

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def to_zoo(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        yield self.target, self._pairs_apart(read(self.source)).permute(self.order).contiguous()

    def to_published(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        source = read(self.target).permute(self._inverse)
        yield self.source, (source.flatten(-2) if self.interleaved > 1 else source).contiguous()

    def region_to_zoo(self, target: str, region: Region, target_shape: Shape, read: ReadRegion) -> Tensor:
        box = [region[i] for i in self._inverse]
        if self.interleaved == 1:
            return read(self.source, tuple(box)).permute(self.order).contiguous()
        # Neighbours in the file: a pair is read whole, also where one of it is wanted.
        wanted, pairs = box.pop(), box.pop()
        box.append(slice(pairs.start * self.interleaved, pairs.stop * self.interleaved))
        return self._pairs_apart(read(self.source, tuple(box)))[..., wanted].permute(self.order).contiguous()

    def source_shape(self, target_shape: Shape) -> Shape:
        shape = tuple(target_shape[i] for i in self._inverse)
        return (*shape[:-2], shape[-2] * shape[-1]) if self.interleaved > 1 else shape

    @property
    def _inverse(self) -> tuple[int, ...]:
        return tuple(self.order.index(i) for i in range(len(self.order)))

    def _pairs_apart(self, source: Tensor) -> Tensor:
        return source.unflatten(-1, (-1, self.interleaved)) if self.interleaved > 1 else source


@dataclass(frozen=True)
class Cut:
    """The rows of one tensor dealt out to several: ``sizes[i]`` rows in turn to ``targets[i]``."""

    source: str
    targets: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def to_zoo(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        # Copied: a view would keep the whole source alive.
        parts = (part.clone() for part in read(self.source).split(self.sizes))
        yield from zip(self.targets, parts, strict=True)

    def to_published(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        first = read(self.targets[0])
        whole = first.new_empty((sum(self.sizes), *first.shape[1:]))
        for name, part in zip(self.targets, whole.split(self.sizes), strict=True):
            part.copy_(read(name) if name != self.targets[0] else first)
        yield self.source, whole

    def region_to_zoo(self, target: str, region: Region, target_shape: Shape, read: ReadRegion) -> Tensor:
        start = sum(self.sizes[: self.targets.index(target)])
        return read(self.source, (slice(start + region[0].start, start + region[0].stop), *region[1:]))

    def source_shape(self, target_shape: Shape) -> Shape:
        return (sum(self.sizes), *target_shape[1:])


@dataclass(frozen=True)
class Chain:
    """Operations one after the other: each takes what the one before it makes, a single tensor."""

    steps: tuple[Op, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return self.steps[0].sources

    @property
    def targets(self) -> tuple[str, ...]:
        return self.steps[-1].targets

    def to_zoo(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        for step in self.steps[:-1]:
            read = _reader(step.to_zoo(read))
        yield from self.steps[-1].to_zoo(read)

    def to_published(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        for step in reversed(self.steps[1:]):
            read = _reader(step.to_published(read))
        yield from self.steps[0].to_published(read)

    def region_to_zoo(self, target: str, region: Region, target_shape: Shape, read: ReadRegion) -> Tensor:
        *earlier, last = self.steps
        if not earlier:
            return last.region_to_zoo(target, region, target_shape, read)
        before, between = Chain(tuple(earlier)), last.source_shape(target_shape)

        def read_between(name: str, box: Region) -> Tensor:
            return before.region_to_zoo(name, box, between, read)

        return last.region_to_zoo(target, region, target_shape, read_between)

    def source_shape(self, target_shape: Shape) -> Shape:
        for step in reversed(self.steps):
            target_shape = step.source_shape(target_shape)
        return target_shape


def _reader(made: Iterator[tuple[str, Tensor]]) -> Read:
    """Reads the one tensor of ``made``."""
    ((_, tensor),) = made
    return lambda name: tensor
