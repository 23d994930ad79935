"""Preallocated caches for decoding: what each layer remembers of the tokens seen so far.

Shapes: B batch, L capacity in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """Buffers [B, …, L, size] of one layer, filled along the second last dimension."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self.buffers = tuple(buffers)

    def append(self, past: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Write ``new`` [B, …, S, size] behind ``past`` filled slots; returns views of all past + S filled slots."""
        end = past + new[0].shape[-2]
        for buffer, values in zip(self.buffers, new, strict=True):
            buffer[..., past:end, :] = values
        return tuple(buffer[..., :end, :] for buffer in self.buffers)

    def branch(self, rows: Tensor, length: int, max_length: int) -> LayerCache:
        """A copy of the first ``length`` slots of ``rows`` with room for ``max_length``."""
        buffers = []
        for buffer in self.buffers:
            *middle, _, size = buffer.shape[1:]
            copy = buffer.new_empty(len(rows), *middle, max_length, size)
            copy[..., :length, :] = buffer[..., :length, :][rows]
            buffers.append(copy)
        return LayerCache(buffers)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep the batch rows numbered in ``rows`` [rows kept] int64."""
        self.buffers = tuple(buffer[rows] for buffer in self.buffers)


class StateCache(LayerCache):
    """Buffers [B, …] of a recurrent layer, which hold what is left of all tokens so far and cannot forget the last."""

    def branch(self, rows: Tensor, length: int, max_length: int) -> LayerCache:
        """See ``LayerCache``; ``length`` must be all tokens so far."""
        return StateCache([buffer[rows] for buffer in self.buffers])


class Cache:
    """The caches of all layers, which slots are filled, and which of those are padding."""

    def __init__(self, layers: Sequence[LayerCache], batch_size: int, max_length: int) -> None:
        self.layers = list(layers)
        self.batch_size = batch_size
        self.max_length = max_length
        self.length = 0
        self._valid: Tensor | None = None

    @property
    def valid(self) -> Tensor | None:
        """[B, length] bool, False for padding; None while no padding was seen."""
        return None if self._valid is None else self._valid[:, : self.length]

    @property
    def bytes(self) -> int:
        """Bytes of all buffers at full capacity."""
        return sum(b.numel() * b.element_size() for layer in self.layers for b in layer.buffers)

    def check_room(self, input_ids: Tensor) -> None:
        """Raise ``ValueError`` where ``input_ids`` [B, S] do not fit."""
        rows, new = input_ids.shape
        if rows != self.batch_size:
            raise ValueError(f"input_ids has {rows} rows: the cache was made for batch_size = {self.batch_size}")
        if self.length + new > self.max_length:
            raise ValueError(
                f"{self.length} cached + {new} new tokens exceed the cache: make it with max_length >= "
                f"{self.length + new} (it is {self.max_length})"
            )

    def advance(self, new: int, attention_mask: Tensor | None) -> None:
        """Count ``new`` slots as filled, with their padding."""
        end = self.length + new
        if attention_mask is not None and self._valid is None:
            self._valid = torch.ones(self.batch_size, self.max_length, dtype=torch.bool, device=attention_mask.device)
        if self._valid is not None:
            self._valid[:, self.length : end] = True if attention_mask is None else attention_mask != 0
        self.length = end

    def crop(self, length: int) -> None:
        """Forget every slot from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length = {length}: give a number between 0 and the {self.length} filled slots")
        if length < self.length and any(isinstance(layer, StateCache) for layer in self.layers):
            raise ValueError(f"length = {length}: a recurrent layer cannot forget tokens; make a new cache")
        self.length = length

    def branch(self, rows: Tensor, max_length: int) -> Cache:
        """A cache that continues the batch rows numbered in ``rows`` [B of the new one] int64, any of them repeatedly.

        This one stays as it is.

        Raises:
            ValueError: ``max_length`` is less than the filled slots.
        """
        if max_length < self.length:
            raise ValueError(f"max_length = {max_length}: give at least the {self.length} filled slots")
        layers = [layer.branch(rows, self.length, max_length) for layer in self.layers]
        copy = Cache(layers, len(rows), max_length)
        copy.length = self.length
        if self._valid is not None:
            copy._valid = self._valid.new_ones(len(rows), max_length)
            copy._valid[:, : self.length] = self._valid[rows, : self.length]
        return copy

    def keep_rows(self, rows: Tensor) -> None:
        """Keep the batch rows numbered in ``rows`` [rows kept] int64, in that order: the others are finished."""
        for layer in self.layers:
            layer.keep_rows(rows)
        if self._valid is not None:
            self._valid = self._valid[rows]
        self.batch_size = len(rows)
