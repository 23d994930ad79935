"""Packing: the token stream of a split cut into training examples of equal length.

Letters: S sequence length.

Of plain text, window w covers the stream positions w·S … (w+1)·S - 1 as inputs; its labels are the tokens one position
later. So in an epoch every token is an input exactly once, and every token but the first of a document is a label
exactly once. Documents follow each other without padding. Only the last window may be padded.

Of instructions only answers are labels, and they need what they answer: a window takes as many whole documents as fit
and is padded. A document longer than S is cut: it begins a window, and what is past that goes on in the next one.

``document_ids`` lets attention stay within a document.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.layers.linear_nll import IGNORED
from zoo.training.data.store import TokenSplit

PADDING_DOCUMENT = -1
"""``document_ids`` of positions that hold no token."""
PADDING_WINDOW = -1
"""Index of a window that is nothing but padding."""


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Windows of a split.

    Item w is a dict of int64 tensors [S]:
        input_ids: token ids (0 where padded).
        labels: the token one position later; ``IGNORED`` where that token begins another document, is not an answer's
            in a split that says which are, or is not there.
        document_ids: number of the document in the split; ``PADDING_DOCUMENT`` where padded.

    Attributes:
        cut: documents of instructions that are longer than a window.
    """

    def __init__(self, split: TokenSplit, sequence_length: int) -> None:
        """Raises ``ValueError`` where the split does not fill one window."""
        if sequence_length < 1:
            raise ValueError(f"sequence_length = {sequence_length}: give a positive number of tokens")
        if split.mask is None and len(split.tokens) < sequence_length + 1:
            raise ValueError(
                f"sequence_length = {sequence_length}: the {split.name} split of {split.directory} has only "
                f"{len(split.tokens)} tokens, one more than the sequence is needed; use a shorter sequence or more text"
            )
        self.split = split
        self.sequence_length = sequence_length
        self._starts = None if split.mask is None else _whole_documents(split.offsets, sequence_length)
        self.cut = 0 if split.mask is None else int((np.diff(split.offsets) > sequence_length).sum())

    def __len__(self) -> int:
        if self._starts is not None:
            return len(self._starts) - 1
        # The stream's last token is never an input: nothing follows it that could be its label.
        return -(-(len(self.split.tokens) - 1) // self.sequence_length)

    def __getitem__(self, window: int) -> dict[str, Tensor]:
        length = self.sequence_length
        inputs = np.zeros(length, np.int64)
        labels = np.full(length, IGNORED, np.int64)
        documents = np.full(length, PADDING_DOCUMENT, np.int64)
        if window != PADDING_WINDOW:
            start, stop = self._bounds(window)
            tokens = self.split.tokens[start : stop + 1].astype(np.int64)
            if tokens.max() >= self.split.vocab_size:
                raise ValueError(
                    f"{self.split.directory}: token id {tokens.max()} near position {start} of {self.split.name}.bin "
                    f"is outside the vocabulary of {self.split.vocab_size}; the file is damaged, build the data again"
                )
            ids = self.split.document_ids(start, start + len(tokens))
            inputs[: stop - start] = tokens[: stop - start]
            documents[: stop - start] = ids[: stop - start]
            learned = ids[1:] == ids[:-1]
            if self.split.mask is not None:
                learned &= self.split.mask[start + 1 : start + len(tokens)] == 1
            labels[: len(learned)] = np.where(learned, tokens[1:], IGNORED)
        return {
            "input_ids": torch.from_numpy(inputs),
            "labels": torch.from_numpy(labels),
            "document_ids": torch.from_numpy(documents),
        }

    def _bounds(self, window: int) -> tuple[int, int]:
        """Positions in the stream, from and to, of the inputs of a window."""
        if self._starts is not None:
            return int(self._starts[window]), int(self._starts[window + 1])
        start = window * self.sequence_length
        return start, min(start + self.sequence_length, len(self.split.tokens) - 1)


def _whole_documents(offsets: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Where windows of at most ``length`` tokens begin that end with a document, if one ends in them; and the end."""
    starts, end = [0], int(offsets[-1])
    while starts[-1] < end:
        reach = starts[-1] + length
        last = int(offsets[np.searchsorted(offsets, reach, side="right") - 1])
        starts.append(last if last > starts[-1] else reach)
    return np.array(starts, np.int64)
