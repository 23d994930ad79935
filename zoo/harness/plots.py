"""The figures of a report: SVG for its page, PNG and the plotted numbers as CSV for files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from zoo.cli.text import short
from zoo.harness.drawing import (
    COLOURS,
    FAINT,
    INK,
    STYLE,
    WIDTH,
    Plot,
    finish,
    heat_map,
    legend,
    looks,
    plt,
    wrapped,
)
from zoo.harness.headline import SKILLS, held_equal
from zoo.harness.sweep_plots import sweep_plots

AXES = {
    "loss": "validation loss, nats a token",
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "seconds": "time of training, s",
}

_LINE = 0.17
"""Inches of a line of text."""

_LAYERS_SHOWN = 4


def plots(report: Mapping[str, Any]) -> list[Plot]:
    """Every figure of a report."""
    models = report["models"]
    several = len(models[0]["checkpoints"]) > len(report["seeds"])
    tasks = [t for part, members in report["tasks"].items() for t in members if len(members) > 1 or part not in SKILLS]
    with plt.rc_context(STYLE):
        result = [score_of(report, skill, "scores") for skill in SKILLS]
        if several:
            result += [against(report, axis) for axis in AXES if models[0]["checkpoints"][0][axis] is not None]
        result += sweep_plots(report)
        result += [forest(comparison, report["tasks"]) for comparison in report["comparisons"]]
        result += [score_of(report, task, "tasks") for task in dict.fromkeys(tasks)]
        result += [expert_load(model) for model in models if model["expert_load"]]
        result += [task_load(model) for model in models if model["task_load"]]
        return [*result, curves(report)]


def score_of(report: Mapping[str, Any], name: str, section: str) -> Plot:
    """Every model's score on a skill or task with its interval; grey where it is not above chance."""
    models = report["models"]
    scores = [model["scores"][name] for model in models]
    unranked = set(report["tasks"].get(name, [name])) <= set(report["not_ranked"])
    labels = [wrapped(model["name"]) for model in models]
    figure, axes, heights = _rows(labels, extra=0.75)
    for height, model, score, look in zip(heights, models, scores, _looks(models), strict=True):
        colour = FAINT if score.get("at_chance") or unranked else look["color"]
        _bar(axes, score, height, color=colour, marker="o" if model["sparse"] else "s")
    guess = scores[0]["guess"]
    axes.axvline(100 * guess, linestyle=":", color=FAINT)
    axes.set(xlabel="score, %")
    rows = [["model", "score of", "value", "low", "high", "guess", "at chance"]]
    rows += [
        [model["name"], name, *(score[key] for key in ("value", "low", "high", "guess")), score.get("at_chance")]
        for model, score in zip(models, scores, strict=True)
    ]
    note = f"Bars are 95% intervals, the dotted line is guessing ({100 * guess:.1f}%)."
    if unranked:
        note += " No model is above chance here: not ranked."
    elif any(score.get("at_chance") for score in scores):
        note += " Grey: not above chance."
    return finish(figure, f"score-{name}", section, f"Score on {name}", note, rows)


def forest(comparison: Mapping[str, Any], tasks: Mapping[str, Sequence[str]]) -> Plot:
    """First minus second model of each skill and task with its interval; grey where neither model is above chance."""
    names = [name for part, members in tasks.items() for name in ((part, *members) if part in SKILLS else members)]
    differences = [comparison["views"]["tokens"]["scores"][name]["difference"] for name in names]
    at_chance = [set(tasks.get(name, [name])) <= set(comparison["at_chance"]) for name in names]
    labels = [wrapped(f"{name} (at chance)" if grey else name) for name, grey in zip(names, at_chance, strict=True)]
    figure, axes, heights = _rows(labels, extra=0.75)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    for height, name, difference, grey in zip(heights, names, differences, at_chance, strict=True):
        colour = FAINT if grey else COLOURS[0] if name in tasks else INK
        _bar(axes, difference, height, color=colour, marker="D" if name in tasks else "o")
    axes.set(xlabel="difference, points")
    rows: list[list[Any]] = [["difference of", "value", "low", "high", "at chance"]]
    rows += [[n, d["value"], d["low"], d["high"], c] for n, d, c in zip(names, differences, at_chance, strict=True)]
    title = f"{comparison['first']} − {comparison['second']}"
    note = (
        f"At equal {held_equal(comparison)}; to the right {comparison['first']} is better. Bars are 95% intervals; "
        "diamonds are the means of the skills."
    )
    return finish(figure, f"forest-{comparison['first']}-{comparison['second']}", "comparisons", title, note, rows)


def against(report: Mapping[str, Any], axis: str) -> Plot:
    """Score of each skill against loss, tokens, FLOPs or time: means over the seeds, and faintly each training."""
    models, seeds = report["models"], report["seeds"]
    names = [model["name"] for model in models]
    figure, panels = plt.subplots(2, 1, figsize=(WIDTH, 4.6 + _legend_height(names)), sharex=True)
    rows = [["model", "seed", "step", axis, *SKILLS]]
    for model, look in zip(models, _looks(models), strict=True):
        runs = [[point for point in model["checkpoints"] if point["seed"] == seed] for seed in seeds]
        rows += [
            [model["name"], p["seed"], p["step"], p[axis], *(p["scores"][s] for s in SKILLS)]
            for run in runs
            for p in run
        ]
        for skill, panel in zip(SKILLS, panels, strict=True):
            table = np.array([[(p[axis], 100 * p["scores"][skill]) for p in run] for run in runs])  # [seeds][points][2]
            for line in table if len(seeds) > 1 else ():
                panel.plot(*line.T, color=look["color"], linewidth=0.8, alpha=0.3)
            label = model["name"] if skill == SKILLS[0] else None
            panel.plot(*table.mean(axis=0).T, **look, markersize=4, linewidth=1.5, label=label)
    for skill, panel in zip(SKILLS, panels, strict=True):
        panel.axhline(100 * models[0]["scores"][skill]["guess"], linestyle=":", color=FAINT)
        panel.set(ylabel=f"{skill}, %")
    panels[1].set(xlabel=AXES[axis] + (" (better to the right)" if axis == "loss" else ""))
    panels[1].xaxis.set_major_locator(MaxNLocator(4))
    if axis in ("tokens", "flops"):
        panels[1].xaxis.set_major_formatter(lambda value, _: short(value) if value > 0 else "0")
    if axis == "loss":
        panels[1].invert_xaxis()
    legend(figure, names)
    note = "A dot is a checkpoint, dashed lines are dense models, dotted ones guessing."
    if len(seeds) > 1:
        note += f" Lines are means of {len(seeds)} seeds, faint ones each of them."
    return finish(figure, f"score-against-{axis}", "curves", f"Score against {AXES[axis].split(',')[0]}", note, rows)


def curves(report: Mapping[str, Any]) -> Plot:
    """Training loss, and validation loss as dots, by step."""
    models = report["models"]
    names = [model["name"] for model in models]
    figure, axes = plt.subplots(figsize=(WIDTH, 2.6 + _legend_height(names)))
    rows = [["model", "seed", "split", "step", "loss"]]
    for model, look in zip(models, _looks(models), strict=True):
        for number, curve in enumerate(model["curves"]):
            label = model["name"] if number == 0 else None
            line = {"color": look["color"], "linestyle": look["linestyle"]}
            axes.plot(*_columns(curve["train"]), **line, linewidth=1, alpha=0.7, label=label)
            axes.plot(*_columns(curve["validation"]), look["marker"], color=look["color"], markersize=4)
            rows += [
                [model["name"], curve["seed"], split, *pair]
                for split in ("train", "validation")
                for pair in curve[split]
            ]
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.3g}")
    legend(figure, names)
    note = "Lines are the training loss, dots the validation loss; dashed lines are dense models."
    return finish(figure, "loss", "training", "Loss", note, rows)


def expert_load(model: Mapping[str, Any]) -> Plot:
    """Load of each expert by layer, on the validation text."""
    load = model["expert_load"]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.26 * len(load) + 1.5))
    heat_map(figure, [axes], [_relative(load)], [str(i) for i in range(len(load))])
    axes.set(ylabel="MoE layer")
    rows: list[list[Any]] = [["layer", "expert", "share"]]
    rows += [[i, j, share] for i, layer in enumerate(load) for j, share in enumerate(layer)]
    note = f"On the validation text, over {len(load[0])} experts; 1 is an equal share."
    return finish(figure, f"expert-load-{model['name']}", "experts", f"Expert load of {model['name']}", note, rows)


def task_load(model: Mapping[str, Any]) -> Plot:
    """Load of each expert by task; a panel for each layer, of many for four of them."""
    load = model["task_load"]
    layers = len(next(iter(load.values())))
    shown = sorted({round(i) for i in np.linspace(0, layers - 1, min(layers, _LAYERS_SHOWN))})
    height = (0.26 * len(load) + 0.3) * len(shown) + 1.2
    figure, panels = plt.subplots(len(shown), 1, figsize=(WIDTH, height), sharex=True, squeeze=False)
    tables = [[_relative(of_task)[layer] for of_task in load.values()] for layer in shown]
    heat_map(figure, list(panels[:, 0]), tables, list(load))
    for layer, axes in zip(shown, panels[:, 0], strict=True):
        axes.set_title(f"MoE layer {layer}", fontsize=STYLE["font.size"], loc="left")
    rows: list[list[Any]] = [["task", "layer", "expert", "share"]]
    rows += [[t, i, j, share] for t, of in load.items() for i, layer in enumerate(of) for j, share in enumerate(layer)]
    which = "" if len(shown) == layers else f" {len(shown)} of {layers} MoE layers; the CSV has all."
    note = f"On the first items of each task; 1 is an equal share.{which}"
    title = f"Which experts of {model['name']} fire for which task"
    return finish(figure, f"task-load-{model['name']}", "experts", title, note, rows)


def _relative(load: Sequence[Sequence[float]]) -> list[list[float]]:
    """Shares times the number of experts: 1 is balanced."""
    return [[share * len(layer) for share in layer] for layer in load]


def _rows(labels: Sequence[str], extra: float) -> tuple[Figure, Axes, list[float]]:
    """A figure with a row for each label, as high as its lines, and where the rows are."""
    lines = [label.count("\n") + 1.6 for label in labels]
    heights = [sum(lines[:i]) + lines[i] / 2 for i in range(len(lines))]
    figure, axes = plt.subplots(figsize=(WIDTH, _LINE * sum(lines) + extra))
    axes.set_yticks(heights, labels)
    axes.set_ylim(sum(lines), 0)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color=FAINT, alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes, heights


def _bar(axes: Axes, estimate: Mapping[str, float], height: float, **look: Any) -> None:
    """An estimate in % with its interval as a horizontal bar."""
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    bounds = [[max(0.0, value - low)], [max(0.0, high - value)]]
    axes.errorbar([value], [height], xerr=bounds, linestyle="none", markersize=5, capsize=3, **look)


def _looks(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return looks([model["sparse"] for model in models])


def _legend_height(names: Sequence[str]) -> float:
    return _LINE * len(names) * (0.55 if max(map(len, names)) <= 16 else 1.1)


def _columns(pairs: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]
