"""Who may attend to whom: padding, packed documents, cached tokens and the sliding window, in one place.

Shapes: B batch, S new tokens, L = past + S key slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

OLD = 2**31
"""Age of a token whose document began before the new ones."""


@dataclass(frozen=True, eq=False)
class RecurrentOrder:
    """The new tokens of each row as they follow each other, padding last."""

    index: Tensor
    """[B, S] int64, where each is in the row."""
    inverse: Tensor
    """[B, S] int64, where each token of the row is in this order."""
    valid: Tensor
    """[B, S] bool in this order, False for padding."""
    age: Tensor
    """[B, S] int64 in this order, tokens since the document began; ``OLD`` and more in the first, which has a past."""


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """The layout of one batch, shared by all layers of a forward."""

    batch_size: int
    positions: Tensor
    """[B or 1, S] int64, the rotary position of every new token."""
    past: int
    """Key slots already in the cache."""
    segments: Tensor | None
    """[B, L] int64: a token attends within its segment only; padding is segment -1. None: one segment a row."""
    input_ids: Tensor
    """[B, S] int64, the new tokens."""
    window: int | None = None
    """Sliding window in tokens, or None."""

    @cached_property
    def valid(self) -> Tensor | None:
        """[B, S] bool, False where a new token is padding; None: nowhere."""
        return None if self.segments is None else self.segments[:, self.past :] != -1

    @property
    def keys(self) -> int:
        """L, which no position reaches."""
        return self.past + self.positions.shape[1]

    def within(self, window: int | None) -> SequenceLayout:
        """The same batch where a query sees itself and the ``window - 1`` tokens before it; None: all before it."""
        if window == self.window:
            return self
        if window not in self._windowed:
            self._windowed[window] = replace(self, window=window)
        return self._windowed[window]

    @cached_property
    def _windowed(self) -> dict[int | None, SequenceLayout]:
        """Layers with the same window share one layout, and so one mask."""
        return {}

    def in_chunks(self, size: int) -> SequenceLayout:
        """The same batch where a query sees tokens of its own chunk only: positions 0 to size - 1, and so on."""
        keys = self.keys
        if keys <= size:
            return self
        if size not in self._chunked:
            chunk = self.key_positions // size
            segments = chunk if self.segments is None else (self.segments + 1) * keys + chunk
            self._chunked[size] = replace(self, segments=segments.expand(self.batch_size, -1))
        return self._chunked[size]

    @cached_property
    def _chunked(self) -> dict[int, SequenceLayout]:
        return {}

    @property
    def key_positions(self) -> Tensor:
        """[B or 1, L] int64, of the keys as ``positions`` are of the new tokens; of padding it means nothing."""
        if self.past == 0:
            return self.positions
        if self.segments is None:
            return torch.arange(self.keys, device=self.positions.device)[None]
        return ((self.segments >= 0).cumsum(1) - 1).clamp(min=0)  # with cached tokens there are no documents

    def last(self, count: int | None) -> SequenceLayout:
        """The layout for which only the last ``count`` new tokens are new; None: all of them."""
        if count is None or count >= self.positions.shape[1]:
            return self
        return replace(
            self,
            positions=self.positions[:, -count:],
            past=self.keys - count,
            input_ids=self.input_ids[:, -count:],
        )

    @cached_property
    def mask(self) -> Tensor | None:
        """[B or 1, 1, S, L] bool, True where a query (row) sees a key (column); None where plain causality says it all.

        Padding queries see padding keys (themselves at least), so that no row is empty: an empty row is NaN in softmax.
        """
        follows = self.past == 0 or self.positions.shape[1] == 1
        if self.segments is None and (self.window is None or self.keys <= self.window) and follows:
            return None
        return self.visible

    @cached_property
    def visible(self) -> Tensor:
        """``mask`` where plain causality is written out as well."""
        keys, device = self.keys, self.positions.device
        query = torch.arange(self.past, keys, device=device)[:, None]
        key = torch.arange(keys, device=device)
        visible = (key <= query)[None]
        if self.window is not None:  # of tokens: padding between them, behind what rows share, does not count
            visible = visible & (self.key_positions[:, None] > self.positions[..., None] - self.window)
        if self.segments is not None:
            visible = visible & (self.segments[:, self.past :, None] == self.segments[:, None, :])
        return visible[:, None]

    @cached_property
    def recurrent_order(self) -> RecurrentOrder | None:
        """How a layer that carries a state from token to token goes through them; None: every row as it is."""
        if self.segments is None:
            return None
        new = self.segments[:, self.past :]
        index = (new == -1).int().argsort(dim=1, stable=True)
        segments = new.gather(1, index)
        valid, steps = segments != -1, torch.arange(new.shape[1], device=new.device).expand_as(index)
        begins = torch.zeros_like(valid)
        begins[:, 1:] = valid[:, 1:] & (segments[:, 1:] != segments[:, :-1])
        age = steps - torch.where(begins, steps, -OLD).cummax(dim=1).values
        return RecurrentOrder(index, index.argsort(dim=1), valid, age)

    @property
    def is_causal(self) -> bool:
        """With ``mask`` None: whether causality must still be applied (not for one new token)."""
        return self.mask is None and self.positions.shape[1] > 1

    @cached_property
    def run_offsets(self) -> Tensor:
        """[runs + 1] int32: ends of equal-segment runs in the flattened [B·S] tokens, for variable-length kernels.

        Only without cached tokens. Runs of padding are kept, so that nothing has to be gathered out and back.
        """
        rows, new = self.batch_size, self.positions.shape[1]
        starts = torch.zeros(rows, new, dtype=torch.bool, device=self.positions.device)
        starts[:, 0] = True
        if self.segments is not None:
            starts[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        first = starts.flatten().nonzero().flatten()
        return torch.cat((first, first.new_tensor([rows * new]))).to(torch.int32)


def sequence_layout(
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    past: int,
    past_valid: Tensor | None,
) -> SequenceLayout:
    """Layout of a batch of new tokens.

    Args:
        input_ids: [B, S].
        attention_mask: [B, S], nonzero for tokens and 0 for padding, on either side.
        document_ids: [B, S] integers; equal neighbours are one document, positions restart at each document.
        past: slots filled in the cache.
        past_valid: [B, past] bool, False where a cached slot is padding.

    Raises:
        ValueError: a shape that differs from ``input_ids``, or documents together with cached tokens.
    """
    for name, given in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}: give that of input_ids, {tuple(input_ids.shape)}")
    if document_ids is not None and past:
        raise ValueError("document_ids: packed documents cannot be continued from a cache; give one document a row")
    (rows, new), device = input_ids.shape, input_ids.device
    if document_ids is not None:
        segments = document_ids if attention_mask is None else document_ids.masked_fill(attention_mask == 0, -1)
        if not _plain(segments):
            return SequenceLayout(rows, positions_in_runs(segments), past, segments, input_ids)
        attention_mask = None
    if attention_mask is None and past_valid is None:
        positions = torch.arange(past, past + new, device=device)[None]
        return SequenceLayout(rows, positions, past, None, input_ids)
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    if past:
        earlier = valid.new_ones(len(valid), past) if past_valid is None else past_valid
        valid = torch.cat((earlier, valid), dim=1)
    positions = (valid.cumsum(1) - 1).clamp(min=0)[:, past:]
    return SequenceLayout(rows, positions, past, valid.long() - 1, input_ids)


def _plain(segments: Tensor) -> bool:
    """Whether every row is one document without padding, so that kernels for plain causality apply.

    Asked on a CPU only: a GPU would have to be waited for.
    """
    return segments.device.type == "cpu" and bool((segments == segments[:, :1]).all() and (segments[:, 0] != -1).all())


def tail(x: Tensor, last: int | None) -> Tensor:
    """x [B, S, ...] → its ``last`` tokens; None: all."""
    return x if last is None else x[:, -last:]


def positions_in_runs(segments: Tensor) -> Tensor:
    """[B, S] integers → [B, S] int64, distance of each token from the start of its run of equal values."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    is_start = torch.ones_like(segments, dtype=torch.bool)
    is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(is_start, index, 0).cummax(dim=1).values
