"""The tokens that a router is looked at with.

Shapes: N tokens, W windows, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.tokenizer import Tokenizer
from zoo.training.data.packing import PADDING_DOCUMENT
from zoo.training.data.sources import Source
from zoo.training.data.store import MANIFEST_FILE, SplitName, TokenSplit, read_manifest


@dataclass(frozen=True, eq=False)
class Text:
    """The first tokens of one set of data."""

    name: str
    source: str
    """As it was given, with the split of a data directory."""
    ids: NDArray[np.int64]
    """[N]"""
    documents: NDArray[np.int64]
    """[N], number of the document that each token is of."""

    def windows(self, length: int) -> tuple[Tensor, Tensor]:
        """Input ids and document ids, each [W, S = length] int64; the last window is padded."""
        return (_cut(self.ids, length, 0), _cut(self.documents, length, PADDING_DOCUMENT))


def read_text(given: str, tokenizer: Tokenizer, limit: int, separator: str | None = None) -> Text:
    """The first ``limit`` tokens of ``[NAME=]PATH``.

    Args:
        given: a directory of ``zoo data build``, whose validation split is read, or the training split where there is
            no validation; else a text file, or whatever a ``Source`` reads. Its name is that of the path by default.
        tokenizer: of the model.
        limit: tokens.
        separator: what ends a document in a .txt file; ``None``: the file is one document.

    Raises:
        ValueError: data of another tokenizer, or without two tokens.
        OSError: it cannot be read.
    """
    name, equals, location = given.partition("=")
    if not equals or Path(given).exists():
        name, location = "", given
    directory = Path(location)
    if (directory / MANIFEST_FILE).is_file():
        source, ids, documents = _of_directory(directory, tokenizer, limit)
    else:
        source, ids, documents = location, *_of_source(Source(location, separator=separator), tokenizer, limit)
    if len(ids) < 2:
        raise ValueError(f"{location}: {len(ids)} tokens; give a text with two or more")
    return Text(name or directory.stem, source, ids, documents)


def _of_directory(
    directory: Path, tokenizer: Tokenizer, limit: int
) -> tuple[str, NDArray[np.int64], NDArray[np.int64]]:
    manifest = read_manifest(directory)
    if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{directory}: tokenised with another tokenizer than the model's; give the text itself, or build the data "
            "again with the model's directory as --tokenizer"
        )
    name: SplitName = "validation" if manifest.splits["validation"].documents else "train"
    split = TokenSplit(directory, name)
    ids = split.tokens[:limit].astype(np.int64)
    return f"{directory} ({name} split)", ids, split.document_ids(0, len(ids))


def _of_source(source: Source, tokenizer: Tokenizer, limit: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids: list[int] = []
    documents: list[int] = []
    for number, (text, _) in enumerate(source.documents()):
        # Tokens have a few letters each: of a book the first pages are enough.
        tokens = tokenizer.encode(text[: 8 * limit], bos=tokenizer.add_bos, eos=tokenizer.add_eos)
        ids += tokens
        documents += [number] * len(tokens)
        if len(ids) >= limit:
            break
    return np.array(ids[:limit], np.int64), np.array(documents[:limit], np.int64)


def _cut(values: NDArray[np.int64], length: int, padding: int) -> Tensor:
    full = np.full(-(-len(values) // length) * length, padding, np.int64)
    full[: len(values)] = values
    return torch.from_numpy(full).view(-1, length)
