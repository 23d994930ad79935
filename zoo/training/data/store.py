"""The data directory: tokenised documents as flat files, and the manifest that says what they are.

::

    DIR/manifest.json              what was tokenised, how, and the SHA-256 of every file
    DIR/{train,validation}.bin     token ids, little-endian uint16 or uint32, documents one after the other
    DIR/{train,validation}.offsets int64: where each document begins, and at the end the number of tokens
    DIR/{train,validation}.mask    of instructions: uint8 for each token, 1 where it is an answer's and so a label
    DIR/tokenizer/                 the tokenizer's files
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from zoo.config_reading import from_dict
from zoo.tokenizer import Tokenizer

MANIFEST_FILE = "manifest.json"
TOKENIZER_DIR = "tokenizer"
FORMAT = "moe-zoo data"
VERSION = 1

TokenDtype = Literal["<u2", "<u4"]
"""Little-endian unsigned integers of two or four bytes, in numpy's spelling."""
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")
OFFSET_DTYPE = np.dtype("<i8")
MASK_DTYPE = np.dtype("u1")


def token_dtype(vocab_size: int) -> TokenDtype:
    """The smaller of the two stored types that holds every id below ``vocab_size``."""
    if vocab_size > 1 << 32:
        raise ValueError(f"vocab_size = {vocab_size}: token ids are stored in at most 32 bits; use a smaller tokenizer")
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """Counts and file digests of one split."""

    tokens: int
    documents: int
    sha256: str
    """Of the token file."""
    offsets_sha256: str
    answers: int | None = None
    """Tokens that are an answer's; ``None`` of plain text, where every token is learned."""
    mask_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """One source of documents."""

    name: str
    """File name or hub id."""
    split: str
    """Split that it was given for; documents of a ``train`` source may have been held out for validation."""
    documents: int
    bytes: int
    """Size of the file; of a hub data set, the UTF-8 length of its documents."""
    sha256: str
    """Of the file; of a hub data set, of its documents put together."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``manifest.json``. Holds no time, host or absolute path: equal input gives equal bytes."""

    format: str
    version: int
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: TokenDtype
    bos: bool
    """Whether every document was put after the beginning-of-sequence token; of instructions the template says it."""
    eos: bool
    """Whether every document was put before the end-of-sequence token; of instructions the template says it."""
    validation_fraction: float
    """Part of the documents, chosen by the hash of their text, that was held out; 0 with explicit sources."""
    sources: tuple[SourceInfo, ...]
    splits: dict[str, SplitInfo]

    def to_json(self) -> str:
        """Indented JSON with a final newline."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def read_manifest(directory: str | Path) -> Manifest:
    """Read and check the manifest of a data directory.

    Raises:
        ValueError: not a data directory, a manifest of another version, or one that was damaged.
    """
    path = Path(directory) / MANIFEST_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{directory}: no {MANIFEST_FILE}; make a data directory with zoo data build") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); build the data again") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path}: not a {FORMAT} manifest; make a data directory with zoo data build")
    if data.get("version") != VERSION:
        raise ValueError(
            f"{path}: version = {data.get('version')}: this zoo reads version {VERSION}; build the data again"
        )
    manifest = from_dict(Manifest, data, str(path))
    if set(manifest.splits) != set(SPLITS):
        raise ValueError(
            f"{path}: splits = {sorted(manifest.splits)}: expected {', '.join(SPLITS)}; build the data again"
        )
    return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(directory: str | Path) -> None:
    """Compare every file with the digests in the manifest; reads the whole directory.

    Raises:
        ValueError: a file is missing, has another length or other contents than when it was built.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name in SPLITS:
        TokenSplit(directory, name)
        info = manifest.splits[name]
        for path, digest in (
            (directory / f"{name}.bin", info.sha256),
            (directory / f"{name}.offsets", info.offsets_sha256),
            (directory / f"{name}.mask", info.mask_sha256),
        ):
            if digest is not None and file_sha256(path) != digest:
                raise ValueError(f"{path}: contents differ from the SHA-256 in {MANIFEST_FILE}; build the data again")
    load_tokenizer(directory, manifest)


def load_tokenizer(directory: str | Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer that the data was made with.

    Raises:
        ValueError: the copy in the directory is not the one that made the tokens.
    """
    path = Path(directory) / TOKENIZER_DIR
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise ValueError(f"{path}: not the tokenizer that {MANIFEST_FILE} names; build the data again")
    return tokenizer


class TokenSplit:
    """One split, memory-mapped and read only.

    Attributes:
        tokens: [tokens] uint16 or uint32.
        offsets: [documents + 1] int64: document d is ``tokens[offsets[d]:offsets[d + 1]]``.
        mask: [tokens] uint8 of instructions, 1 where the token is an answer's; ``None`` of plain text.
        vocab_size: every id is below it.
    """

    def __init__(self, directory: str | Path, name: SplitName) -> None:
        """Raises ``ValueError`` where a file is missing or its length is not the manifest's."""
        self.directory = Path(directory)
        self.name: SplitName = name
        manifest = read_manifest(self.directory)
        info = manifest.splits[name]
        self.vocab_size = manifest.vocab_size
        self.tokens = _map(self.directory / f"{name}.bin", np.dtype(manifest.dtype), info.tokens)
        self.offsets = _map(self.directory / f"{name}.offsets", OFFSET_DTYPE, info.documents + 1)
        self.mask = None if info.answers is None else _map(self.directory / f"{name}.mask", MASK_DTYPE, info.tokens)
        if self.offsets[0] != 0 or self.offsets[-1] != info.tokens:
            raise ValueError(
                f"{self.directory / name}.offsets: ends at token {self.offsets[-1]}, {MANIFEST_FILE} says {info.tokens}"
                "; build the data again"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # A memory map would be pickled as a copy of the whole file; a worker process opens it again instead.
        return TokenSplit, (self.directory, self.name)

    def document_ids(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Number of the document that each token of ``start <= position < stop`` belongs to."""
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, stop, side="left"))
        ends = self.offsets[first + 1 : last + 1]
        return first + np.searchsorted(ends, np.arange(start, stop), side="right").astype(np.int64)


def _map(path: Path, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path}: missing, although {MANIFEST_FILE} lists it; build the data again") from None
    if size != length * dtype.itemsize:
        raise ValueError(
            f"{path}: {size} bytes, {MANIFEST_FILE} says {length * dtype.itemsize}; the file was cut or replaced, "
            "build the data again"
        )
    if length == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,))
