"""Checking a checkpoint directory without loading it: every fault, not the first one.

Only headers, configs and the index are held in memory; hashes, where they are recorded, are taken a MiB at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.config import CONFIG_FILE
from zoo.encoder_decoder_config import AnySpec, load_any_spec
from zoo.families import exporting_family
from zoo.registry import published_spec, read_json
from zoo.weights.convert import parameter_shapes, published_tensors
from zoo.weights.hashes import SUMS_FILE, record, recorded, sha256
from zoo.weights.headers import AGAIN, read_header
from zoo.weights.ops import Shape
from zoo.weights.quantized import unquantised_entries
from zoo.weights.source import (
    INDEX_FILE,
    SINGLE_FILE,
    Entry,
    TensorSource,
    check_copy,
    misfits,
    shard_path,
    weight_files,
)

WEIGHTS = "model*.safetensors"
"""Files that a checkpoint may consist of; others beside them are not its own."""

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where, and what."""

    place: str
    problem: str

    def __str__(self) -> str:
        return " ".join(f"{self.place}: {self.problem}".split())


@dataclass
class Report:
    """What a check of ``directory`` saw."""

    directory: Path
    spec: AnySpec | None = None
    """None where the config cannot be read; shapes are not checked then."""
    files: list[Path] = field(default_factory=list)
    tensors: int = 0
    size: int = 0
    """Bytes of the weight files."""
    hashed: int = 0
    """Weight files that have a recorded hash."""
    left_out: list[str] = field(default_factory=list)
    """Tensors that the family declares as not part of the model."""
    findings: list[Finding] = field(default_factory=list)

    def add(self, place: str | Path, problem: str | ValueError | OSError) -> None:
        """Note a finding; what a message says about the place again is cut off."""
        text = str(problem).removeprefix(f"{place}: ")
        where = Path(place)
        inside = where.is_relative_to(self.directory) and where != self.directory
        self.findings.append(Finding(str(where.relative_to(self.directory)) if inside else str(place), text))

    def as_dict(self) -> dict[str, Any]:
        """For a script."""
        return {
            "directory": str(self.directory),
            "name": self.spec.name if self.spec else None,
            "family": self.spec.family if self.spec else None,
            "files": [path.name for path in self.files],
            "tensors": self.tensors,
            "bytes": self.size,
            "hashed": self.hashed,
            "left_out": self.left_out,
            "findings": [vars(finding) for finding in self.findings],
        }


def verify(directory: str | Path, *, progress: bool = False) -> Report:
    """Check the zoo checkpoint or published checkpoint in ``directory``.

    Args:
        directory: with ``zoo.yaml`` or ``config.json``.
        progress: show a progress bar over the bytes that are hashed, on standard error.

    Raises:
        ValueError: there is no such directory.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; give a checkpoint directory")
    report = Report(directory)
    _read_config(report)
    listed = _find_files(report)
    entries = _read_headers(report)
    report.tensors = len(entries)
    if listed is not None:
        _check_index(report, listed, entries)
    if report.spec is not None:
        _check_tensors(report, report.spec, entries)
    _check_hashes(report, progress)
    return report


def record_hashes(report: Report, *, progress: bool = False) -> None:
    """Write the hashes of the weight files of a ``report`` without findings to ``SHA256SUMS``.

    Raises:
        ValueError: it has findings, or that file is there.
    """
    if report.findings:
        raise ValueError(f"{report.directory}: {len(report.findings)} findings; only a whole checkpoint is recorded")
    if (report.directory / SUMS_FILE).exists():
        raise ValueError(f"{report.directory / SUMS_FILE}: already there; remove it to record the hashes anew")
    with _bar(report.size, "recording", progress) as advance:
        record(report.directory, [path.name for path in report.files], advance)


def _read_config(report: Report) -> None:
    path = report.directory / CONFIG_FILE
    try:
        if path.is_file():
            report.spec = load_any_spec(path)
            return
        path = report.directory / "config.json"
        report.spec = published_spec(report.directory)
        exporting_family(report.spec)
    except (ValueError, OSError) as error:
        report.add(path, error)


def _find_files(report: Report) -> dict[str, str] | None:
    """Fill ``report.files``; what the index lists, as name → file, where there is one."""
    directory, index = report.directory, report.directory / INDEX_FILE
    if not index.is_file():
        try:
            for path in weight_files(directory):
                report.files.append(shard_path(directory, path, path.name))
        except ValueError as error:
            report.add(directory, error)
        return None
    if (directory / SINGLE_FILE).exists():
        report.add(SINGLE_FILE, f"is there beside {INDEX_FILE}; remove the one that is not wanted")
    try:
        weight_map = read_json(index).get("weight_map")
    except (ValueError, OSError) as error:
        report.add(index, error)
        return None
    if not isinstance(weight_map, dict) or not weight_map:
        report.add(index, "'weight_map' is missing or empty; download the checkpoint again")
        return None
    listed = {name: str(file) for name, file in weight_map.items()}
    for file in sorted(set(listed.values())):
        try:
            report.files.append(shard_path(directory, index, file))
        except (ValueError, OSError) as error:  # an OSError: a name longer than the system allows
            report.add(index, error)
    for path in sorted(directory.glob(WEIGHTS)):
        if path.name not in {*listed.values(), SINGLE_FILE}:
            report.add(path, f"is not in {INDEX_FILE}; remove it, or download the checkpoint again")
    return listed


def _read_headers(report: Report) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for path in report.files:
        try:
            found, problems = read_header(path)
            report.size += path.stat().st_size
        except OSError as error:
            found, problems = {}, [f"cannot be read ({error.strerror})"]
        for problem in problems:
            report.add(path, problem)
        for name, entry in found.items():
            if name in entries:
                report.add(path, f"tensor {name!r} is in {entries[name].path.name} too; remove one")
            entries.setdefault(name, entry)
    return entries


def _check_index(report: Report, listed: dict[str, str], entries: dict[str, Entry]) -> None:
    readable = {path.name for path in report.files}
    for name in sorted(listed.keys() | entries.keys()):
        there, found = listed.get(name), entries[name].path.name if name in entries else None
        if there == found or (found is None and there not in readable):  # the file is a finding already
            continue
        if there is None:
            report.add(INDEX_FILE, f"does not list tensor {name!r}, which is in {found}")
        else:
            report.add(INDEX_FILE, f"lists tensor {name!r} in {there!r}, but it is in {found or 'none'}")


def _check_tensors(report: Report, spec: AnySpec, entries: dict[str, Entry]) -> None:
    directory = report.directory
    if (directory / CONFIG_FILE).is_file():
        _compare(report, entries, parameter_shapes(spec.model), ())
        return
    hf = read_json(directory / "config.json")
    try:
        entries, problems = unquantised_entries(directory, hf, entries)
    except ValueError as error:
        report.add(directory, error)
        return
    for path, problem in problems:
        report.add(path, problem)
    published = published_tensors(spec, hf, entries)
    _compare(report, entries, published.shapes, published.ignored)
    for path, problem in misfits(entries, {}, published.ops):
        report.add(path, problem)
    repeated = list(published.repeated())
    if repeated and not report.findings:
        with TensorSource(directory) as source:
            for copy, original, why in repeated:
                try:
                    check_copy(source, copy, original, why)
                except ValueError as error:
                    report.add(source.entries[copy].path, error)


def _compare(report: Report, entries: dict[str, Entry], shapes: dict[str, Shape], ignored: tuple[str, ...]) -> None:
    """Names, shapes and dtypes against what the config needs."""
    where = CONFIG_FILE if (report.directory / CONFIG_FILE).is_file() else "config.json"
    for name in sorted(shapes.keys() - entries.keys()):
        report.add(where, f"needs tensor {name!r} {list(shapes[name])}, which is missing")
    for name in sorted(entries.keys() - shapes.keys()):
        if any(re.fullmatch(pattern, name) for pattern in ignored):
            report.left_out.append(name)
        else:
            report.add(entries[name].path, f"tensor {name!r} has no place in the model of {where}")
    for path, problem in misfits(entries, shapes, ()):
        report.add(path, problem)


def _check_hashes(report: Report, progress: bool) -> None:
    files = {path.name: path for path in report.files}
    try:
        hashes = recorded(report.directory, files)
    except (ValueError, OSError) as error:
        report.add(report.directory / SUMS_FILE, error)
        return
    for name in sorted(hashes.keys() - files.keys()):
        report.add(SUMS_FILE, f"has a hash of {name!r}, which is no weight file of this checkpoint")
    report.hashed = len(hashes.keys() & files.keys())
    total = sum(files[name].stat().st_size for name in hashes if name in files)
    with _bar(total, "hashing", progress) as advance:
        for name, (digest, place) in hashes.items():
            if name in files and sha256(files[name], advance) != digest:
                report.add(name, f"is not the file whose hash stands in {place} ({digest[:12]}…); {AGAIN}")


@contextmanager
def _bar(total: int, description: str, show: bool) -> Iterator[Advance]:
    """A progress bar over ``total`` bytes, and how to move it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*parts, console=Console(stderr=True), disable=not show, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
