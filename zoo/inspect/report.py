"""``zoo inspect`` from loaded weights to its report: JSON, one HTML page, and every figure as PNG and CSV."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zoo.files import replacing, write_text
from zoo.inspect.findings import gather
from zoo.inspect.headline import sentences
from zoo.inspect.inspection import Settings, Windows, against_checkpoints, agreement, check_sparse, observe
from zoo.inspect.text import Text
from zoo.model import Decoder
from zoo.tokenizer import Tokenizer

SCHEMA = Path(__file__).with_name("report.schema.json")
"""JSON Schema (2020-12) of ``inspect.json``."""


def inspect(
    name: str,
    model: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    settings: Settings,
    others: Mapping[str, Callable[[], Decoder]] | None = None,
) -> dict[str, Any]:
    """Look at the routers of ``model``, with a progress bar on standard error; equal arguments give equal values.

    Args:
        name: of the model, for the report.
        model: with experts, in eval mode; its MTP modules are left out.
        tokenizer: for the spelling of tokens.
        texts: sets of data, each with a name of its own.
        settings: a sequence longer than the model's positions is cut to them.
        others: checkpoints of the same architecture by name, each loaded when it is its turn.

    Raises:
        ValueError: a dense model, two sets of data with one name, or a checkpoint of another architecture.
    """
    others = others or {}
    check_sparse(model, name)
    names = [text.name for text in texts]
    if len(set(names)) < len(names):
        raise ValueError(f"data {', '.join(names)}: two have the same name; give NAME=PATH")
    length = min(settings.sequence_length, model.config.max_position_embeddings)
    windows = Windows.of(texts, length)
    frequent = windows.frequent_types()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        batches = -(-len(windows.input_ids) // settings.batch_size)
        task = progress.add_task("batches", total=batches * (2 + len(others)))

        def advance() -> None:
            progress.advance(task)

        observed = observe(model, windows, settings, frequent[0], advance)
        noisy = agreement(model, windows, settings, observed.experts, settings.noise, advance)
        compared = against_checkpoints(model, others, windows, settings, observed.experts, advance)
    report = gather(name, model, tokenizer, texts, windows, settings, frequent, observed, noisy, compared)
    return {"headline": sentences(report), **report}


def write_inspection(report: Mapping[str, Any], out: Path) -> list[Path]:
    """Write ``inspect.html`` and ``inspect.json`` into ``out``, and its figures into ``figures``; returns their paths.

    Args:
        report: of ``inspect``.
    """
    from zoo.inspect.page import html
    from zoo.inspect.plots import plots

    drawn = plots(report)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for plot in drawn:
        write_text(out / "figures" / f"{plot.name}.csv", plot.csv())
        with replacing(out / "figures" / f"{plot.name}.png") as file:
            file.write(plot.png)
    write_text(out / "inspect.html", html(report, drawn))
    write_text(out / "inspect.json", to_json(report))
    return [out / "inspect.html", out / "inspect.json"]


def to_json(report: Mapping[str, Any]) -> str:
    """The report as text: no time and nothing of the machine is in it."""
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
