"""What a generator of training text and evaluation questions makes, and how it is laid out on disk.

``train.jsonl``, ``validation.jsonl``
    one short document a line, in an order fixed by the seed
``hub/<owner>/<name>/<config>/validation-00000-of-00001.parquet``
    the questions, in the hub's layout: what ``--data-root`` takes
``<name>.json``
    the config, and the scores that guessing reaches
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from zoo.files import replacing, write_text

TRAINING_TEXT = "train.jsonl"
VALIDATION_TEXT = "validation.jsonl"
MIRROR = "hub"


@dataclass(frozen=True)
class GeneratedData:
    """A generated data set in memory."""

    training: list[str]
    validation: list[str]
    """Documents of the evaluation questions with their answers, for perplexity."""
    tables: dict[str, list[dict[str, Any]]]
    """Evaluation rows by configuration of the data set."""
    guesses: dict[str, float]
    """Score that guessing reaches."""


@dataclass(frozen=True)
class Origin:
    """Where the content of a data set comes from, for its card."""

    source: str
    licence: str
    """As the hub spells it."""


def write(
    directory: Path,
    name: str,
    config: Mapping[str, Any],
    make: Callable[[], GeneratedData],
    origin: Origin,
    mirror: Path | None = None,
) -> None:
    """Write a data set into ``directory``, unless it is there already. The manifest comes last.

    Args:
        name: of the data set in the mirror, such as ``moe-zoo/phone_book``.
        config: what it is made from.
        make: makes it.
        origin: of its content.
        mirror: where its questions go, which several data sets may share; by default ``hub`` in ``directory``.

    Raises:
        ValueError: ``directory`` holds a data set made from another config.
    """
    manifest = directory / f"{Path(name).name}.json"
    if manifest.exists():
        made_from = json.loads(manifest.read_text(encoding="utf-8"))["config"]
        if made_from != json.loads(json.dumps(config)):
            raise ValueError(f"{directory} was made from {made_from}, not from {dict(config)}: give another directory")
        return
    data = make()
    directory.mkdir(parents=True, exist_ok=True)
    write_tables((mirror or directory / MIRROR) / name, data.tables, origin)
    for file, documents in ((TRAINING_TEXT, data.training), (VALIDATION_TEXT, data.validation)):
        lines = (json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
        write_text(directory / file, "".join(lines))
    summary = {"config": config, "guesses": data.guesses, "source": origin.source}
    write_text(manifest, json.dumps(summary, indent=2) + "\n")


def guess_rates(directory: Path, name: str) -> dict[str, float]:
    """Scores that guessing reaches on a data set on disk, as its generator calls them."""
    manifest = directory / f"{Path(name).name}.json"
    rates: dict[str, float] = json.loads(manifest.read_text(encoding="utf-8"))["guesses"]
    return rates


def write_tables(directory: Path, tables: Mapping[str, list[dict[str, Any]]], origin: Origin) -> None:
    """Write ``tables`` as the configurations of a data set in the hub's layout, with its card."""
    for config, rows in tables.items():
        (directory / config).mkdir(parents=True, exist_ok=True)
        with replacing(directory / config / "validation-00000-of-00001.parquet") as file:
            pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd")
    write_text(directory / "README.md", _card(tables, origin))


def _card(configs: Iterable[str], origin: Origin) -> str:
    listed = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: validation\n    path: {name}/validation-*.parquet\n"
        for name in configs
    )
    return f"---\nlicense: {origin.licence}\nconfigs:\n{listed}---\n\nMade by moe-zoo. {origin.source}.\n"
