"""A study's report: Markdown, one self-contained HTML page, and the JSON that both are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from zoo.cli.text import binary, short
from zoo.files import write_text
from zoo.harness import plots
from zoo.harness.headline import interval, percent, points

Table = tuple[str, list[str], list[list[str]]]
"""Title, header, rows. The first column is text, the others are numbers."""

READING = (
    "Intervals are 95% bootstrap intervals over the evaluation items; differences are paired by item and are "
    "sparse minus dense. They speak about other items of the same kind, not about other training runs: only several "
    "seeds show those. p is the probability of so many right answers by guessing (exact one-sided binomial test). A "
    "score of 0% or 100% has an interval of no width; a true rate up to 3 ÷ items away is still compatible with it."
)


def write_report(report: Mapping[str, Any], out: Path) -> list[Path]:
    """Write ``report.md``, ``report.html`` and ``report.json`` into ``out``; returns their paths.

    Args:
        report: of ``summarise``.
    """
    contents = {
        "report.md": markdown(report),
        "report.html": html(report),
        "report.json": json.dumps(report, indent=1) + "\n",
    }
    for name, text in contents.items():
        write_text(out / name, text)
    return [out / name for name in contents]


# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Everything that the report shows as numbers."""
    loads = [_load(model) for model in report["models"] if model["expert_load"]]
    return [_skills(report), _differences(report), _tasks(report), _sizes(report), _costs(report), *loads]


def _skills(report: Mapping[str, Any]) -> Table:
    header = ["model", "knowledge", "p", "comprehension", "p", "perplexity"]
    rows = []
    for model in report["models"]:
        cells = [model["name"]]
        for skill in ("knowledge", "comprehension"):
            score = model["scores"][skill]
            cells += [_scored(score), _p_value(score["p_value"])]
        rows.append([*cells, f"{model['perplexity']:.3f}"])
    guesses = [report["models"][0]["scores"][skill]["guess"] for skill in ("knowledge", "comprehension")]
    shown = ["–" if guess is None else percent(guess) for guess in guesses]
    rows.append(["guessing", shown[0], "", shown[1], "", ""])
    return "Scores", header, rows


def _differences(report: Mapping[str, Any]) -> Table:
    header = ["sparse − dense, points", "matched by", "knowledge", "comprehension", "ratio of relative gains"]
    rows = []
    for comparison in report["comparisons"]:
        cells = [f"{comparison['sparse']} − {comparison['dense']}", comparison["matched_by"]]
        for skill in ("knowledge", "comprehension"):
            difference = comparison["scores"][skill]["difference"]
            cells.append(f"{points(difference['value'])} ({interval(difference)})")
        ratio = comparison["gain_ratio"]
        known = ratio and f"{ratio['value']:.1f} ({ratio['low']:.1f} to {ratio['high']:.1f})"
        cells.append(known or "not determined")
        rows.append(cells)
    return "Sparse against dense", header, rows


def _tasks(report: Mapping[str, Any]) -> Table:
    names = list(dict.fromkeys(task for tasks in report["tasks"].values() for task in tasks))
    first = report["models"][0]["scores"]
    header = ["task", "items", "guessing", *(model["name"] for model in report["models"])]
    rows = [
        [
            name,
            f"{first[name]['items']:,}",
            "–" if first[name]["guess"] is None else percent(first[name]["guess"]),
            *(_scored(model["scores"][name]) for model in report["models"]),
        ]
        for name in names
    ]
    return "Scores by task", header, rows


def _sizes(report: Mapping[str, Any]) -> Table:
    header = ["model", "parameters", "active", "training FLOPs a token"]
    rows = [
        [m["name"], short(m["total_parameters"]), short(m["active_parameters"]), short(m["training_flops_per_token"])]
        for m in report["models"]
    ]
    return "Sizes", header, rows


def _costs(report: Mapping[str, Any]) -> Table:
    header = ["model", "wall time", "tokens a second", "threads", "peak memory"]
    rows = []
    for model in report["models"]:
        seconds, memory = model["wall_seconds"], model["peak_memory_bytes"]
        timed = [f"{seconds:.0f} s", f"{report['tokens'] / seconds:,.0f}"] if seconds else ["–", "–"]
        rows.append([model["name"], *timed, str(model["threads"] or "–"), binary(memory) if memory else "–"])
    return "Cost of training, start-up included", header, rows


def _load(model: Mapping[str, Any]) -> Table:
    header = ["MoE layer", *(f"expert {i}" for i in range(len(model["expert_load"][0])))]
    rows = [[str(i), *(f"{share * len(layer):.2f}" for share in layer)] for i, layer in enumerate(model["expert_load"])]
    return f"Expert load of {model['name']} on the validation text, ÷ mean load: 1 is balanced", header, rows


def _scored(score: Mapping[str, float]) -> str:
    return f"{percent(score['value'])} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 1e-6" if p < 1e-6 else f"{p:.2g}"


def provenance(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What it takes to repeat the study."""
    machine = report["machine"]
    memory = f"{binary(machine['memory_bytes'])} memory"
    parts = [machine["processor"], f"{machine['cores']} cores", memory, machine["gpu"]]
    git = report["git"]
    training = report["config"]["training"]
    pairs = [
        ("command", report["command"]),
        ("date", report["date"]),
        ("machine", ", ".join(part for part in parts if part)),
        ("system", report["platform"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        ("code", "not a git checkout" if git is None else git["commit"] + (" with changes" if git["dirty"] else "")),
        (
            "budget",
            f"{report['tokens']:,} tokens a model: {training['steps']:,} steps of {training['batch_size']} sequences "
            f"of {training['sequence_length']} tokens, the same ones in the same order for every model",
        ),
    ]
    if "facts" in report["config"]["data"]:
        from zoo.harness.facts.world import ATTRIBUTION

        pairs.append(("facts", ATTRIBUTION))
    return pairs


# ---------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """The report without its figures."""
    lines = [f"# {report['study']}", "", *(f"- {sentence}" for sentence in report["headline"]), ""]
    for title, header, rows in tables(report):
        if rows:
            lines += [f"## {title}", "", *_markdown_table(header, rows), ""]
    lines += ["## How to read this", "", READING, "", "## How it was made", ""]
    lines += [f"- {name}: {value}" for name, value in provenance(report)]
    return "\n".join([*lines, "", "```yaml", _yaml(report), "```", ""])


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [_row(header), _row(["---", *["---:"] * (len(header) - 1)]), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def html(report: Mapping[str, Any]) -> str:
    """One page that needs no other file, from 400 to 1400 pixels wide."""
    figures = [("Scores", plots.scores(report)), ("Loss", plots.curves(report))]
    figures += [
        (f"Expert load of {model['name']}, validation text", plots.expert_load(model))
        for model in report["models"]
        if model["expert_load"]
    ]
    title = escape(f"{report['study']}: sparse against dense")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{_CSS}</style></head><body><main>",
            f"<h1>{title}</h1>",
            "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in report["headline"]) + "</ul>",
            '<div class="figures">',
            *(f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in figures),
            "</div>",
            *(_html_table(table) for table in tables(report) if table[2]),
            f"<h2>How to read this</h2><p>{escape(READING)}</p>",
            "<h2>How it was made</h2><dl>",
            *(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in provenance(report)),
            f"</dl><details><summary>The study</summary><pre>{escape(_yaml(report))}</pre></details>",
            "</main></body></html>",
            "",
        ]
    )


def _html_table(table: Table) -> str:
    title, header, rows = table
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    table_body = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<h2>{escape(title)}</h2><div class="wide"><table>{table_body}</table></div>'


def _yaml(report: Mapping[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(report["config"])).strip()


_CSS = """
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
main { max-width: 1200px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; } figure svg { width: 100%; height: auto; max-width: 40rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 0.3rem 0.8rem; text-align: right; border-bottom: 1px solid #ddd; font-weight: 400; }
thead th { font-weight: 600; } tr > :first-child { text-align: left; }
dt { font-weight: 600; } dd { margin: 0 0 0.5rem; overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: 0.85rem; }
"""
