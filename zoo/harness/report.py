"""A study's report: Markdown, one self-contained HTML page, and the JSON that both are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from zoo.files import replacing, write_text
from zoo.harness.contents import Table, provenance, reading, sections
from zoo.harness.page import html
from zoo.harness.plots import plots

SCHEMA = Path(__file__).with_name("report.schema.json")
"""JSON Schema (2020-12) of ``report.json``."""


def write_report(report: Mapping[str, Any], out: Path) -> list[Path]:
    """Write ``report.md``, ``report.html`` and ``report.json`` into ``out``; returns their paths.

    Every figure is also written as PNG and CSV, into ``figures``.

    Args:
        report: of ``summarise``.
    """
    drawn = plots(report)
    (out / "figures").mkdir(exist_ok=True)
    for plot in drawn:
        write_text(out / "figures" / f"{plot.name}.csv", plot.csv())
        with replacing(out / "figures" / f"{plot.name}.png") as file:
            file.write(plot.png)
    contents = {
        "report.md": markdown(report),
        "report.html": html(report, drawn, _yaml(report)),
        "report.json": json.dumps(report, indent=1, allow_nan=False) + "\n",
    }
    for name, text in contents.items():
        write_text(out / name, text)
    return [out / name for name in contents]


def without_times(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without what a clock, the memory or the machine decides: equal for two runs of one study."""
    result: dict[str, Any] = json.loads(json.dumps(report))
    for key in ("date", "command", "machine", "platform", "git"):
        del result[key]
    for model in result["models"]:
        for key in ("wall_seconds", "peak_memory_bytes", "threads"):
            del model[key]
        for point in model["checkpoints"]:
            del point["seconds"]
    for comparison in result["comparisons"]:
        comparison["views"].pop("seconds", None)
    return result


def markdown(report: Mapping[str, Any]) -> str:
    """The report without its figures."""
    lines = [f"# {report['study']}", "", *(f"- {sentence}" for sentence in report["headline"]), ""]
    for section in sections(report):
        if section.tables:
            lines += [f"## {section.title}", "", *([section.note, ""] if section.note else [])]
        for table in section.tables:
            lines += [f"### {table.title}", "", *_markdown_table(table), ""]
    lines += ["## How to read this", "", reading(report), "", "## How it was made", ""]
    lines += [f"- {name}: {value}" for name, value in provenance(report)]
    return "\n".join([*lines, "", "```yaml", _yaml(report), "```", ""])


def _markdown_table(table: Table) -> list[str]:
    return [_row(table.header), _row(["---", *["---:"] * (len(table.header) - 1)]), *map(_row, table.rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _yaml(report: Mapping[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(report["config"])).strip()
