"""The one progress bar of the data commands: bytes read, and the time left."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zoo.training.data.instructions import Instructions
from zoo.training.data.sources import Source


def byte_progress() -> Progress:
    """A bar on standard error; where that is no terminal, only its last state is printed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def total_bytes(sources: Sequence[Source | Instructions]) -> int | None:
    """Size of all sources, ``None`` where one is not known before it is read."""
    sizes = [source.total_bytes for source in sources]
    return None if None in sizes else sum(size or 0 for size in sizes)
