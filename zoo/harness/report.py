"""A study's report: Markdown, one self-contained HTML page, and the JSON that both are made of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from zoo.cli.text import binary, short
from zoo.files import replacing, write_text
from zoo.harness.headline import interval, percent, points
from zoo.harness.plots import Plot, plots
from zoo.harness.views import AXES, Axis

Table = tuple[str, list[str], list[list[str]]]
"""Title, header, rows. The first column is text, the others are numbers."""

SKILLS = ("knowledge", "comprehension")

SCHEMA = Path(__file__).with_name("report.schema.json")
"""JSON Schema (2020-12) of ``report.json``."""

_OF_ITEMS = (
    "Intervals are 95% bootstrap intervals over the evaluation items. They speak about other items of the same kind, "
    "not about other training runs: only several seeds show those."
)

_OF_SEEDS = (
    "Intervals are 95% bootstrap intervals over the evaluation items and {seeds} training seeds (Student's t on "
    "{freedom} degrees of freedom). They speak about other items and other training runs of the same kind."
)

_READING = (
    "Differences are paired by item and seed, and are sparse minus dense. p is the probability of so many right "
    "answers by guessing (exact one-sided binomial test, of several seeds the worst); guessing is the better of random "
    "choices and the one answer that is right most often. A task is at chance where that p, corrected by Holm for the "
    "number of tasks, is above 0.05; where both models are, their difference is not ranked. McNemar's exact test "
    "speaks about the trained models, not about other runs; its p is corrected by Holm as well. A score of 0% or 100% "
    "has an interval of no width; a true rate up to 3 ÷ items away is still compatible with it."
)


def reading(report: Mapping[str, Any]) -> str:
    """How the numbers are to be read."""
    seeds = len(report["seeds"])
    return f"{_OF_SEEDS.format(seeds=seeds, freedom=seeds - 1) if seeds > 1 else _OF_ITEMS} {_READING}"


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
        "report.html": html(report, drawn),
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


# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Everything that the report shows as numbers."""
    loads = [_load(model) for model in report["models"] if model["expert_load"]]
    by_task = [_task_differences(comparison, report["tasks"]) for comparison in report["comparisons"]]
    return [_skills(report), _differences(report), _tasks(report), *by_task, _sizes(report), _costs(report), *loads]


def _skills(report: Mapping[str, Any]) -> Table:
    header = ["model", "knowledge", "p", "comprehension", "p", "perplexity"]
    rows = []
    for model in report["models"]:
        cells = [model["name"]]
        for skill in SKILLS:
            score = model["scores"][skill]
            cells += [_scored(score), _p_value(score["p_value"])]
        rows.append([*cells, f"{model['perplexity']:.3f}"])
    guesses = [percent(report["models"][0]["scores"][skill]["guess"]) for skill in SKILLS]
    rows.append(["guessing", guesses[0], "", guesses[1], "", ""])
    return "Scores", header, rows


def _differences(report: Mapping[str, Any]) -> Table:
    """One row for each comparison and view."""
    header = [
        "sparse − dense, points",
        "matched by",
        "at equal",
        "knowledge",
        "comprehension",
        "ratio of relative gains",
    ]
    rows = []
    for comparison in report["comparisons"]:
        for axis, view in comparison["views"].items():
            pair = f"{comparison['sparse']} − {comparison['dense']}"
            cells = [pair, comparison["matched_by"], f"{AXES[axis]}: {_at(axis, view['at'])}"]
            if view["scores"] is None:
                rows.append([*cells, "passed before", "the first checkpoint", "not determined"])
                continue
            cells += [_signed(view["scores"][skill]["difference"]) for skill in SKILLS]
            ratio = view["gain_ratio"]
            known = ratio and f"{ratio['value']:.1f} ({ratio['low']:.1f} to {ratio['high']:.1f})"
            rows.append([*cells, known or "not determined"])
    return "Sparse against dense", header, rows


def _at(axis: Axis, value: float) -> str:
    if axis == "loss":
        return f"{math.exp(value):.3f}"
    return f"{value:,.0f} s" if axis == "seconds" else short(value)


def _signed(difference: Mapping[str, float]) -> str:
    return f"{points(difference['value'])} ({interval(difference)})"


def _tasks(report: Mapping[str, Any]) -> Table:
    names = list(dict.fromkeys(task for tasks in report["tasks"].values() for task in tasks))
    first = report["models"][0]["scores"]
    header = ["task", "items", "guessing", *(model["name"] for model in report["models"])]
    rows = []
    for name in names:
        scores = [model["scores"][name] for model in report["models"]]
        cells = [_scored(score) + (" at chance" if score["at_chance"] else "") for score in scores]
        rows.append([name, f"{first[name]['items']:,}", percent(first[name]["guess"]), *cells])
    return "Scores by task", header, rows


def _task_differences(comparison: Mapping[str, Any], tasks: Mapping[str, Sequence[str]]) -> Table:
    header = ["task", "skill", "sparse − dense, points", "McNemar p", "Holm p"]
    scores = comparison["views"]["tokens"]["scores"]
    rows = []
    for skill, members in tasks.items():
        for task in members:
            test = comparison["mcnemar"].get(task)
            cells = [task, skill, _signed(scores[task]["difference"])]
            if task in comparison["at_chance"]:
                cells[2] = "both at chance: not ranked"
            rows.append([*cells, *(_p_value(test and test[key]) for key in ("p_value", "p_holm"))])
    return f"By task: {comparison['sparse']} − {comparison['dense']}, at equal tokens", header, rows


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
    lines += ["## How to read this", "", reading(report), "", "## How it was made", ""]
    lines += [f"- {name}: {value}" for name, value in provenance(report)]
    return "\n".join([*lines, "", "```yaml", _yaml(report), "```", ""])


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [_row(header), _row(["---", *["---:"] * (len(header) - 1)]), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def html(report: Mapping[str, Any], drawn: Sequence[Plot]) -> str:
    """One page that needs no other file, from 400 to 1400 pixels wide."""
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
            *(f"<figure><figcaption>{escape(plot.title)}</figcaption>{plot.svg}</figure>" for plot in drawn),
            "</div>",
            *(_html_table(table) for table in tables(report) if table[2]),
            f"<h2>How to read this</h2><p>{escape(reading(report))}</p>",
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
