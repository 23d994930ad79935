"""Tensors on their way through a weight map: a group at a time, and a piece at a time where values are converted."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from zoo.weights.ops import Op, Region, Rename, Shape, Stack
from zoo.weights.source import TensorSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Named = Iterator[tuple[str, "Tensor"]]

PIECE_BYTES = 16 * 2**20
"""Of fp32: so much of a tensor is in memory twice while it is dequantised or gets another dtype."""


class Groups(Protocol):
    """Tensors in groups, of which one is in memory at a time."""

    def __len__(self) -> int: ...

    def groups(self) -> Iterator[Named]:
        """For every operation of a weight map, its tensors."""
        ...


class Stream:
    """The tensors of a published source under our names.

    Args:
        ops: weight map.
        source: in the published layout.
        shapes: name → shape of every tensor of ours.
        dtype: that they become; by default each stays in the one that the source has it in.
        kept: names of those that stay so in any case.
        left_out: names of the source's tensors that are no part of the model.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        source: TensorSource,
        shapes: dict[str, Shape],
        *,
        dtype: torch.dtype | None = None,
        kept: Collection[str] = (),
        left_out: Iterable[str] = (),
    ) -> None:
        self._ops, self._source, self._shapes, self._dtype, self._kept = ops, source, shapes, dtype, kept
        self._by_target = {name: op for op in ops for name in op.targets}
        self.left_out = tuple(left_out)

    def __len__(self) -> int:
        return len(self._ops)

    def read_region(self, name: str, region: Region, shape: Shape) -> Tensor:
        """A box of our parameter ``name``, which has ``shape``, as the source has it; nothing else is read."""
        return self._by_target[name].region_to_zoo(name, region, shape, self._source.read_region)

    def groups(self) -> Iterator[Named]:
        """See ``Groups``."""
        for op in self._ops:
            as_stored = self._as_stored(op)
            if as_stored and isinstance(op, Stack):
                yield iter([(op.target, self._source.read_stacked(op.sources).unflatten(0, op.leading))])
                continue
            # A view of a file keeps it mapped, with all that was read of it: what is copied is read by itself.
            view = as_stored and isinstance(op, Rename)
            if not view:
                self._source.close()
            yield op.to_zoo(self._source.read) if as_stored else self._converted(op)
            if view:
                self._source.let_go()
            else:
                self._source.close()

    def _as_stored(self, op: Op) -> bool:
        """Whether the sources of ``op`` are views of their file, in the dtype that is asked for."""
        kept = self._dtype is None or self._kept_whole(op)
        wanted = str(self._dtype).removeprefix("torch.")
        return self._source.mapped and (kept or all(self._source.dtype(name) == wanted for name in op.sources))

    def _kept_whole(self, op: Op) -> bool:
        return all(name in self._kept for name in op.targets)

    def _converted(self, op: Op) -> Named:
        dtype = None if self._kept_whole(op) else self._dtype
        for name in op.targets:
            yield name, self._in_pieces(name, dtype)

    def _in_pieces(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """The whole of ``name``, put together along its first dimension: beside it there is one piece."""
        shape = self._shapes[name]
        rest = tuple(slice(0, size) for size in shape[1:])
        rows = max(1, PIECE_BYTES // (4 * math.prod(shape[1:])))
        whole: Tensor | None = None
        for start in range(0, shape[0], rows):
            box = slice(start, min(start + rows, shape[0]))
            piece = self.read_region(name, (box, *rest), shape)
            if whole is None:
                whole = piece.new_empty(shape, dtype=dtype)
            check_fits(name, piece, whole[box].copy_(piece))
        assert whole is not None
        return whole


class Export:
    """Our tensors under the names that they are published with.

    Args:
        ops: weight map.
        source: a zoo checkpoint.
        dtype: that they become; by default each stays as it is stored.
        kept: our names of those that stay so in any case.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        source: TensorSource,
        *,
        dtype: torch.dtype | None = None,
        kept: Collection[str] = (),
    ) -> None:
        self._ops, self._source, self._dtype, self._kept = ops, source, dtype, kept

    def __len__(self) -> int:
        return len(self._ops)

    def groups(self) -> Iterator[Named]:
        """See ``Groups``."""
        for op in self._ops:
            tensors = op.to_published(self._source.read)
            kept = self._dtype is None or all(name in self._kept for name in op.targets)
            yield tensors if kept else self._cast(tensors)
            self._source.close()

    def _cast(self, tensors: Named) -> Named:
        assert self._dtype is not None
        for name, tensor in tensors:
            converted = tensor.to(self._dtype)
            check_fits(name, tensor, converted)
            yield name, converted


def check_fits(name: str, before: Tensor, after: Tensor) -> None:
    """Check that ``after``, which is ``before`` in another dtype, has no infinity that was a number.

    Raises:
        ValueError: it has; ``name`` says of which tensor.
    """
    import torch

    if torch.finfo(after.dtype).max >= torch.finfo(before.dtype).max or after.isfinite().all():
        return
    largest = before.abs().max().item()
    if math.isfinite(largest):
        kind = str(after.dtype).removeprefix("torch.")
        raise ValueError(f"tensor {name!r} holds {largest:g}, which {kind} cannot express; choose another dtype")


def tracked(stream: Groups, description: str, show: bool) -> Named:
    """The tensors of ``stream``, with a progress bar over its groups."""
    from rich.console import Console
    from rich.progress import track

    groups = track(
        stream.groups(), description, total=len(stream), console=Console(stderr=True), disable=not show, transient=True
    )
    for group in groups:
        yield from group
