"""Running subjects one after the other, with progress, and keeping every row as soon as it is measured."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zoo.bench.results import Results, Run, empty, load, new_run, save
from zoo.bench.rows import Options, Row

EXTRA = {"transformers", "accelerate", "litgpt"}
"""Peers that a plain installation lacks."""


@dataclass(frozen=True)
class _Lister(Options):
    """Options that want nothing, and remember what they were asked for."""

    asked: list[str] = field(default_factory=list)

    def wants(self, case: str) -> bool:
        self.asked.append(case)
        return False


def cases(subject: str, options: Options) -> list[str]:
    """Names of the cases that ``options`` wants of a subject; nothing is measured.

    Raises:
        ValueError: a peer is not installed.
    """
    lister = _Lister(**{key: getattr(options, key) for key in Options.__dataclass_fields__})
    for _ in _rows(subject, lister):
        raise AssertionError(f"{subject} measures a case without asking whether it is wanted")
    return [case for case in lister.asked if options.wants(case)]


def measure(
    subjects: Sequence[str], options: Options, threads: Sequence[int], folders: Sequence[Path], show: bool
) -> list[Results]:
    """Measure ``subjects`` with each number of ``threads``.

    Args:
        options: How; their ``threads`` are replaced.
        folders: Where results are kept, in files that each new row is added to.
        show: Show a progress bar on standard error.

    Returns:
        What was measured now, a ``Results`` for each subject.

    Raises:
        ValueError: no case is wanted, a peer is not installed, or a file of results cannot be read.
    """
    wanted = {subject: cases(subject, options) for subject in subjects}
    if not any(wanted.values()):
        known = [case for subject in subjects for case in cases(subject, replace(options, cases=()))]
        raise ValueError(f"--case {' '.join(options.cases)}: part of no case; there are {'; '.join(known)}")
    measured = []
    with _progress(len(threads) * sum(map(len, wanted.values())), show) as advance:
        for subject in (subject for subject, names in wanted.items() if names):
            results = empty(subject, options)
            for number in threads:
                with _threads(number):
                    run = new_run(replace(options, threads=number))
                    advance(f"{subject}, {number} thread{'' if number == 1 else 's'}", 0)
                    for row in _rows(subject, replace(options, threads=number)):
                        run = replace(run, rows=(*run.rows, row))
                        _keep(results, run, folders)
                        advance(f"{subject}: {row.case}", 1)
                results = results.add(run)
            measured.append(results)
    return measured


def _keep(results: Results, run: Run, folders: Sequence[Path]) -> None:
    """Put ``run`` into the files of results."""
    for folder in folders:
        path = folder / f"{results.name}.json"
        save((load(path) if path.exists() else replace(results, runs=())).add(run), folder)


def _rows(subject: str, options: Options) -> Iterator[Row]:
    try:
        yield from importlib.import_module(f"zoo.bench.{subject}").rows(options)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise ValueError(f"{subject}: {error.name} is not installed; pip install 'moe-zoo[bench]'") from None


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[str, int], Any]]:
    """A bar over the cases; what is called in the block shows a text and moves it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not show, transient=True, speed_estimate_period=3600) as progress:
        task = progress.add_task("", total=total)
        yield lambda text, steps: progress.update(task, description=text, advance=steps)
