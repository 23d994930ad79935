"""What was measured, on what, and when, as small JSON files: one for each subject, device and dtype."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from zoo.bench.rows import Options, Row
from zoo.config_reading import from_dict
from zoo.files import write_text
from zoo.registry import read_json
from zoo.training.run import environment

PEERS = ("transformers", "litgpt", "lm-eval")
_NUMBERS = re.compile(r"\[[-+\d.,e\s]+\]")
"""A list of numbers in JSON, which is to stand in one line."""


@dataclass(frozen=True)
class Run:
    """Rows measured by one command with one number of threads."""

    date: str
    """ISO 8601, UTC."""
    threads: int
    rounds: int
    machine: dict[str, Any]
    versions: dict[str, str]
    git: dict[str, Any] | None
    """Commit of the zoo's source and whether it was changed since."""
    rows: tuple[Row, ...] = ()

    @property
    def place(self) -> tuple[str, str, int]:
        """Processor, accelerator and threads: times of two places say nothing about each other."""
        return self.machine["processor"], self.machine.get("accelerator", ""), self.threads


@dataclass(frozen=True)
class Results:
    """The latest measurement of every case of a subject in every place."""

    bench: str
    device: str
    """``cpu`` or ``cuda``"""
    dtype: str
    runs: tuple[Run, ...] = ()

    @property
    def name(self) -> str:
        """Of the file, without suffix; fp32 on the CPU goes without saying."""
        device = "" if self.device == "cpu" else f"-{self.device}"
        return f"{self.bench}{device}{'' if self.dtype == 'float32' else f'-{self.dtype}'}"

    def add(self, run: Run) -> Results:
        """With ``run`` in the place of what was measured of its cases before on such a machine with as many threads."""
        new = {row.case for row in run.rows}
        kept = [
            replace(old, rows=tuple(row for row in old.rows if old.place != run.place or row.case not in new))
            for old in self.runs
        ]
        return replace(self, runs=(*(old for old in kept if old.rows), run))


def new_run(options: Options) -> Run:
    """Now and here, before anything is measured."""
    surroundings = environment()
    return Run(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        threads=options.threads,
        rounds=options.rounds,
        machine=machine(options.device),
        versions=surroundings["versions"] | _versions(PEERS),
        git=surroundings["git"],
    )


def machine(device: str) -> dict[str, Any]:
    """What times depend on: processor, cores, vector units, memory in bytes, and the accelerator if it is used."""
    found = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "platform": platform.platform(),
    }
    return found | ({"accelerator": torch.cuda.get_device_name(device)} if torch.device(device).type == "cuda" else {})


def processor() -> str:
    """Name of the processor as Linux knows it, elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def empty(bench: str, options: Options) -> Results:
    """Nothing measured yet."""
    return Results(bench, torch.device(options.device).type, str(options.dtype).removeprefix("torch."))


def load(path: Path) -> Results:
    """Results that ``save`` wrote.

    Raises:
        ValueError: the file is not one of those.
    """
    data = read_json(path)
    runs = data.pop("runs", None)
    if not isinstance(runs, list):
        raise ValueError(f"{path}: no list of runs in it; give a file that `zoo bench --out` wrote")
    return replace(
        from_dict(Results, data, str(path)),
        runs=tuple(_run(run, f"{path}: runs[{number}]") for number, run in enumerate(runs)),
    )


def save(results: Results, directory: Path) -> Path:
    """Write or replace ``directory / NAME.json``; times are cut to a tenth of a thousandth of themselves."""
    path = directory / f"{results.name}.json"
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(results), indent=1)
    write_text(path, _NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n")
    return path


def as_json(results: Results) -> dict[str, Any]:
    """Plain data; the inverse of ``load``."""
    data = asdict(results)
    for run in data["runs"]:
        for row in run["rows"]:
            row["seconds"] = {way: [float(f"{time:.4g}") for time in times] for way, times in row["seconds"].items()}
    return data


def _run(data: Any, where: str) -> Run:
    rows = data.pop("rows", None) if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{where}: no list of rows in it; give a file that `zoo bench --out` wrote")
    return replace(
        from_dict(Run, data, where),
        rows=tuple(_row(row, f"{where}.rows[{number}]") for number, row in enumerate(rows)),
    )


def _row(data: Any, where: str) -> Row:
    try:
        return Row(data["bench"], data["case"], data["seconds"], data["bytes"], data["notes"])
    except (KeyError, TypeError):
        raise ValueError(f"{where}: not a row of `zoo bench`; give a file that `zoo bench --out` wrote") from None


def _versions(distributions: Sequence[str]) -> Mapping[str, str]:
    """Of those that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
