"""Files that are either whole or as they were, whenever the process is killed or the disk is full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file beside ``path`` that takes its place, synced to disk, at the end of the block; gone on any error.

    What a killed process left beside ``path`` is overwritten by the next one.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Put ``text`` in UTF-8 in the place of what ``path`` held."""
    with replacing(path) as file:
        file.write(text.encode())


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
