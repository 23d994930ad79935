"""Figures of a study's sweeps: what more experts and more width do to the scores and to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from zoo.cli.text import short
from zoo.harness.drawing import FAINT, WIDTH, Plot, finish, legend, looks

_PANEL, _LEGEND = 1.7, 0.25
"""Inches of a panel, and of a line of the legend."""


def sweep_plots(report: Mapping[str, Any]) -> list[Plot]:
    """Each sweep over its own numbers, and all of them over the total parameters."""
    if not report["sweeps"]:
        return []
    return [*(_of_sweep(report, sweep) for sweep in report["sweeps"]), _over_parameters(report)]


def _of_sweep(report: Mapping[str, Any], sweep: Mapping[str, Any]) -> Plot:
    """Scores, a line for each task, and validation loss by number of experts, width or whatever is swept over."""
    tasks = _tasks(report)
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(WIDTH, 2.8 * _PANEL + _LEGEND * len(tasks)), sharex=True, height_ratios=(1.8, 1)
    )
    values = [point["value"] for point in sweep["points"]]
    rows: list[list[Any]] = [["sweep", sweep["dial"], "model", "of", "value", "low", "high"]]
    for task, look in zip(tasks, looks([True] * len(tasks)), strict=True):
        scores = [_scores(report, point)[task] for point in sweep["points"]]
        _line(above, values, scores, 100, label=task, **look)
        rows += _rows(sweep, task, scores)
    losses = [point["loss"] for point in sweep["points"]]
    _line(below, values, losses, 1, color=FAINT, marker="o")
    rows += _rows(sweep, "validation loss", losses)
    above.set(ylabel="score, %")
    below.set(ylabel="validation loss", xlabel=_DIALS[sweep["dial"]], xscale="log")
    below.set_xticks(values, [str(value) for value in values])
    below.xaxis.set_minor_locator(NullLocator())
    legend(figure, tasks)
    title = f"{sweep['name']}: over {_DIALS[sweep['dial']]}"
    return finish(figure, f"sweep-{sweep['name']}", "sweeps", title, _note(report), rows)


def _over_parameters(report: Mapping[str, Any]) -> Plot:
    """A panel for each task and one for the loss, in which every sweep is a line over its models' total parameters."""
    sweeps, tasks = report["sweeps"], _tasks(report)
    sparse = {model["name"]: model["sparse"] for model in report["models"]}
    lines = looks([any(sparse[point["model"]] for point in sweep["points"]) for sweep in sweeps])
    names = [sweep["name"] for sweep in sweeps]
    height = _PANEL * (len(tasks) + 1) + _LEGEND * len(names)
    figure, panels = plt.subplots(len(tasks) + 1, 1, figsize=(WIDTH, height), sharex=True)
    rows: list[list[Any]] = [["sweep", "model", "total parameters", "active parameters", "of", "value", "low", "high"]]
    sizes = {m["name"]: (m["total_parameters"], m["active_parameters"]) for m in report["models"]}
    for sweep, look in zip(sweeps, lines, strict=True):
        points = sweep["points"]
        totals = [sizes[point["model"]][0] for point in points]
        for task, panel in zip(tasks, panels, strict=False):
            _line(panel, totals, [_scores(report, point)[task] for point in points], 100, **look)
        _line(panels[-1], totals, [point["loss"] for point in points], 1, label=sweep["name"], **look)
        for point in points:
            estimates = {task: _scores(report, point)[task] for task in tasks} | {"validation loss": point["loss"]}
            rows += [
                [sweep["name"], point["model"], *sizes[point["model"]], of, e["value"], e["low"], e["high"]]
                for of, e in estimates.items()
            ]
    for task, panel in zip(tasks, panels, strict=False):
        panel.axhline(100 * report["models"][0]["scores"][task]["guess"], linestyle=":", color=FAINT)
        panel.set(ylabel="score, %")
        panel.set_title(task, loc="left", fontsize="medium")
    panels[-1].set(ylabel="validation loss", xlabel="total parameters", xscale="log")
    panels[-1].xaxis.set_minor_locator(NullLocator())
    panels[-1].xaxis.set_major_locator(MaxNLocator(4))  # powers of ten are too far apart
    panels[-1].xaxis.set_major_formatter(lambda value, _: short(value))
    legend(figure, names)
    note = f"{_note(report)} Dashed lines are dense models, dotted ones guessing."
    return finish(figure, "score-against-parameters", "sweeps", "Over total parameters", note, rows)


_DIALS = {
    "width": "width of the model",
    "experts": "number of experts",
    "active": "active experts",
    "granularity": "granularity",
    "shared": "shared experts",
}


def _line(axes: Axes, x: Sequence[float], estimates: Sequence[Mapping[str, float]], scale: float, **look: Any) -> None:
    """Estimates with their intervals."""
    values = [scale * e["value"] for e in estimates]
    low = [max(0.0, scale * (e["value"] - e["low"])) for e in estimates]
    high = [max(0.0, scale * (e["high"] - e["value"])) for e in estimates]
    axes.errorbar(x, values, yerr=[low, high], markersize=4, linewidth=1.5, capsize=3, **look)


def _rows(sweep: Mapping[str, Any], of: str, estimates: Sequence[Mapping[str, float]]) -> list[list[Any]]:
    return [
        [sweep["name"], point["value"], point["model"], of, e["value"], e["low"], e["high"]]
        for point, e in zip(sweep["points"], estimates, strict=True)
    ]


def _tasks(report: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(task for members in report["tasks"].values() for task in members))


def _scores(report: Mapping[str, Any], point: Mapping[str, Any]) -> Mapping[str, Any]:
    scores: Mapping[str, Any] = next(m["scores"] for m in report["models"] if m["name"] == point["model"])
    return scores


def _note(report: Mapping[str, Any]) -> str:
    over = "items and seeds, of the loss over seeds." if len(report["seeds"]) > 1 else "items; the loss is of one seed."
    return f"Bars are 95% intervals over {over}"
