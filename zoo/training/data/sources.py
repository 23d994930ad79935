"""Documents out of text, JSONL and Parquet files and hub data sets, one at a time.

Every function is a generator of ``(text, bytes read)``: nothing but the current document is held in memory, and the
bytes drive the progress bar.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

TEXT_SUFFIXES = (".txt", ".text", ".md")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
_CHUNK = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")

Documents = Iterator[tuple[str, int]]


@dataclass(frozen=True)
class Source:
    """One place that documents come from.

    Args:
        location: a file (.txt, .jsonl, .parquet), a local directory in hub layout, or a hub id, the last two with an
            optional ``:config`` at the end (``aps/super_glue:boolq``).
        text_column: field of JSONL and column of Parquet and of hub data sets that holds the text.
        separator: text that ends a document in .txt files (``"\\n"``: every line is one); ``None``: a file is one
            document.
        hub_split: split of a hub data set.
        first: read only so many documents; ``None``: all.
        held_out: whether some of its documents may be held out for validation.
    """

    location: str
    text_column: str = "text"
    separator: str | None = None
    hub_split: str = "train"
    first: int | None = None
    held_out: bool = True

    @property
    def name(self) -> str:
        """Name without the directories of this machine."""
        return Path(self.location).name if self._is_local() else self.location

    @property
    def total_bytes(self) -> int | None:
        """Size of the file, ``None`` for a data set whose size is not known before it is read."""
        return Path(self.location).stat().st_size if Path(self.location).is_file() else None

    def documents(self) -> Documents:
        """The documents that are not blank, in order.

        Raises:
            FileNotFoundError: no such file.
            ValueError: an empty or unreadable file, naming the line or the byte offset.
        """
        found = 0
        for text, size in self._read():
            if found == self.first:
                return
            if text.strip():
                found += 1
                yield text, size
        if not found:
            raise ValueError(f"{self.location}: holds no text; remove it from the sources")

    def _is_local(self) -> bool:
        return Path(self.location).exists() or Path(_split_config(self.location)[0]).is_dir()

    def _read(self) -> Documents:
        path = Path(self.location)
        suffix = path.suffix.lower()
        known = TEXT_SUFFIXES + JSONL_SUFFIXES + PARQUET_SUFFIXES
        if path.is_file():
            if suffix not in known:
                raise ValueError(f"{path}: unknown kind of file {suffix!r}; give one of {', '.join(known)}")
            if path.stat().st_size == 0:
                raise ValueError(f"{path}: the file is empty; remove it from the sources or write it again")
            if suffix in TEXT_SUFFIXES:
                return read_text(path, self.separator)
            if suffix in JSONL_SUFFIXES:
                return read_jsonl(path, self.text_column)
            return read_parquet(path, self.text_column)
        looks_like_path = suffix in known or self.location.startswith((".", "/", "~"))
        if looks_like_path and not self._is_local():
            raise FileNotFoundError(f"{path}: no such file")
        return read_hub(self.location, self.hub_split, self.text_column)


def read_text(path: Path, separator: str | None) -> Documents:
    """Documents of a UTF-8 text file, cut at ``separator`` (which is not kept)."""
    offset = 0
    with open(path, "rb") as file:
        # UTF-8 never holds one character's bytes inside another's, so cutting the bytes is safe.
        for part, size in _parts(file, separator.encode() if separator else None):
            yield _decode(part, path, offset), size
            offset += size


def _parts(file: BinaryIO, separator: bytes | None) -> Iterator[tuple[bytes, int]]:
    """Byte strings between separators, each with the number of bytes that it took from the file."""
    if separator is None:
        data = file.read()
        yield data, len(data)
        return
    pending = b""
    while chunk := file.read(_CHUNK):
        *parts, pending = (pending + chunk).split(separator)
        for part in parts:
            yield part, len(part) + len(separator)
    if pending:
        yield pending, len(pending)


def read_jsonl(path: Path, text_column: str) -> Documents:
    """The field ``text_column`` of every line."""
    for where, row, size in jsonl_rows(path, f"the field {text_column!r}"):
        _check_column(text_column, list(row), where)
        yield check_text(row[text_column], text_column, where), size


def jsonl_rows(path: Path, expected: str) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(file and line, object, bytes) of every line that is not blank; ``expected`` says what must be in it."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}: line {number}"
            text = _decode(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error}); correct or remove the line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object with {expected}, got {text.strip()[:40]}")
            yield where, row, len(line)


def read_parquet(path: Path, text_column: str) -> Documents:
    """The column ``text_column``, in batches of rows."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(text_column, file.schema_arrow.names, str(path))
            # Compressed bytes of a row are not known: every row counts for the mean.
            rows, size, row = file.metadata.num_rows, path.stat().st_size, 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    done = size * row // rows - size * (row - 1) // rows
                    yield check_text(text, text_column, f"{path}: row {row}"), done
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a whole Parquet file ({reason}); get the file again") from None


def read_hub(location: str, split: str, text_column: str) -> Documents:
    """A hub data set, or a local directory in the same layout, streamed; no code of the data set is run."""
    import datasets

    path, config = _split_config(location)
    try:
        rows = iter(datasets.load_dataset(path, config, split=split, streaming=True))
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{location}: cannot be read as a hub data set ({' '.join(str(error).split())}); give an existing file, or "
            "a directory in hub layout or hub id with one of its configurations (:config) and splits (--hub-split)"
        ) from None
    for number in itertools.count(1):
        where = f"{location}: row {number} of split {split!r}"
        try:
            row = next(rows, None)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{where}: cannot be read ({' '.join(str(error).split())}); get the data again") from None
        if row is None:
            return
        _check_column(text_column, list(row), where)
        text = check_text(row[text_column], text_column, where)
        yield text, len(text.encode())


def _split_config(location: str) -> tuple[str, str | None]:
    if Path(location).exists():
        return location, None
    path, _, config = location.partition(":")
    return path, config or None


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the file, for "
            "example with iconv -t UTF-8"
        ) from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def _check_column(column: str, available: Sequence[str], where: str) -> None:
    if column in available:
        return
    close = difflib.get_close_matches(column, available, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(map(repr, available)) or 'none'}"
    raise ValueError(f"{where}: no text column {column!r}; {hint}")


def check_text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} is {type(value).__name__}, not text; choose another text column")
    if _SURROGATE.search(value):  # JSON can spell half a character, which no encoding can write
        raise ValueError(f"{where}: {column!r} holds half a surrogate pair; correct the text")
    return value
