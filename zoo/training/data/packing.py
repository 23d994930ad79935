"""Packing: the token stream of a split cut into training examples of equal length.

Letters: S sequence length.

Window w covers the stream positions w·S … (w+1)·S - 1 as inputs; its labels are the tokens one position later. So in an
epoch every token is an input exactly once, and every token but the first of a document is a label exactly once.
Documents follow each other without padding; ``document_ids`` lets attention stay within one. Only the last window may
be padded.
"""

from __future__ import annotations

import numpy as np
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
        labels: the token one position later; ``IGNORED`` where that token begins another document or there is none.
        document_ids: number of the document in the split; ``PADDING_DOCUMENT`` where padded.
    """

    def __init__(self, split: TokenSplit, sequence_length: int) -> None:
        """Raises ``ValueError`` where the split does not fill one window."""
        if sequence_length < 1:
            raise ValueError(f"sequence_length = {sequence_length}: give a positive number of tokens")
        if len(split.tokens) < sequence_length + 1:
            raise ValueError(
                f"sequence_length = {sequence_length}: the {split.name} split of {split.directory} has only "
                f"{len(split.tokens)} tokens, one more than the sequence is needed; use a shorter sequence or more text"
            )
        self.split = split
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        # The stream's last token is never an input: nothing follows it that could be its label.
        return -(-(len(self.split.tokens) - 1) // self.sequence_length)

    def __getitem__(self, window: int) -> dict[str, Tensor]:
        length = self.sequence_length
        inputs = np.zeros(length, np.int64)
        labels = np.full(length, IGNORED, np.int64)
        documents = np.full(length, PADDING_DOCUMENT, np.int64)
        if window != PADDING_WINDOW:
            start = window * length
            stop = min(start + length, len(self.split.tokens) - 1)
            used = stop - start
            tokens = self.split.tokens[start : stop + 1].astype(np.int64)
            if tokens.max() >= self.split.vocab_size:
                raise ValueError(
                    f"{self.split.directory}: token id {tokens.max()} near position {start} of {self.split.name}.bin "
                    f"is outside the vocabulary of {self.split.vocab_size}; the file is damaged, build the data again"
                )
            ids = self.split.document_ids(start, stop + 1)
            inputs[:used] = tokens[:-1]
            documents[:used] = ids[:-1]
            labels[:used] = np.where(ids[1:] == ids[:-1], tokens[1:], IGNORED)
        return {
            "input_ids": torch.from_numpy(inputs),
            "labels": torch.from_numpy(labels),
            "document_ids": torch.from_numpy(documents),
        }
