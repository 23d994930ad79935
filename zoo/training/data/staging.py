"""Making a directory so that it is there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.files import sync


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A hidden directory beside ``out`` that only this process writes to, removed if it was not committed.

    What a killed build left there is cleared by the next one.
    """
    directory = out.parent / f".{out.name}.building"
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another process is building it; wait for it or choose another --out") from None
        for left_over in directory.iterdir():
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        try:
            yield directory
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def commit(directory: Path, out: Path) -> None:
    """Make ``directory`` durable and give it its name, in place of data that is there already."""
    for path in [*directory.rglob("*"), directory]:
        sync(path)
    replaced = out.parent / f".{out.name}.replaced"
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(out, replaced)
    os.rename(directory, out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)
