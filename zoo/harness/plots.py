"""The figures of a report: inline SVG for the page, PNG and the plotted numbers as CSV for files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zoo.harness.headline import MATCHED

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "zoo",  # ids that do not change from run to run
}
_SIZE = (5.2, 3.4)
"""Inches. Small, so that the text stays readable where the figure is scaled down to a telephone."""

SKILLS = ("knowledge", "comprehension")

LABELS = {
    "loss": "validation loss, nats a token",
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "seconds": "time of training, s",
}


@dataclass(frozen=True)
class Plot:
    """A figure in its three forms."""

    name: str
    """Of its files, without suffix."""
    title: str
    svg: str
    png: bytes
    rows: list[list[Any]]
    """The plotted numbers, under a row of headings."""

    def csv(self) -> str:
        """``rows`` as text."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(self.rows)
        return buffer.getvalue()


def plots(report: Mapping[str, Any]) -> list[Plot]:
    """Every figure of a report."""
    with plt.rc_context(_STYLE):
        result = [scores(report)]
        result += [forest(comparison, report["tasks"]) for comparison in report["comparisons"]]
        if len(report["models"][0]["checkpoints"]) > len(report["seeds"]):
            result += [
                against(report, axis) for axis in LABELS if report["models"][0]["checkpoints"][0][axis] is not None
            ]
        result.append(curves(report))
        result += [expert_load(model) for model in report["models"] if model["expert_load"]]
        return result + [task_load(model) for model in report["models"] if model["task_load"]]


def scores(report: Mapping[str, Any]) -> Plot:
    """Scores with intervals and guess rates: each skill, and its tasks where it has several."""
    names = [name for skill, tasks in report["tasks"].items() for name in (skill, *(tasks if len(tasks) > 1 else ()))]
    models = report["models"]
    figure, axes = plt.subplots(figsize=(_SIZE[0], 0.55 * len(names) + 1.2))
    rows = [["model", "score of", "value", "low", "high", "guess"]]
    for number, (model, colour) in enumerate(zip(models, _cycle(len(models)), strict=True)):
        estimates = [model["scores"][name] for name in names]
        heights = [i + 0.6 * (number / max(len(models) - 1, 1) - 0.5) for i in range(len(names))]
        _bars(axes, estimates, heights, color=colour, label=model["name"])
        rows += [
            [model["name"], n, e["value"], e["low"], e["high"], e["guess"]]
            for n, e in zip(names, estimates, strict=True)
        ]
    for i, name in enumerate(names):
        guess = 100 * models[0]["scores"][name]["guess"]
        axes.plot([guess, guess], [i - 0.4, i + 0.4], ":", color="grey", label=None if i else "guessing")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="score, % (bars: 95% intervals)", xlim=(-2, 102))
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return _plot(figure, "scores", "Scores", rows)


def forest(comparison: Mapping[str, Any], tasks: Mapping[str, Sequence[str]]) -> Plot:
    """Sparse minus dense of each skill and task with its interval; grey where neither model is above chance."""
    names = [name for skill, members in tasks.items() for name in (skill, *members)]
    differences = [comparison["views"]["tokens"]["scores"][name]["difference"] for name in names]
    figure, axes = plt.subplots(figsize=(_SIZE[0], 0.32 * len(names) + 1.1))
    for height, (name, difference) in enumerate(zip(names, differences, strict=True)):
        colour = "#999999" if name in comparison["at_chance"] else COLOURS[0] if name in tasks else "#333333"
        _bars(axes, [difference], [height], color=colour, marker="D" if name in tasks else "o")
    axes.axvline(0, color="grey", linewidth=0.8)
    labels = [f"{name} (at chance)" if name in comparison["at_chance"] else name for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="sparse − dense, points (bars: 95% intervals)")
    title = f"{comparison['sparse']} − {comparison['dense']} at equal {MATCHED[comparison['matched_by']]} and tokens"
    rows: list[list[Any]] = [["difference of", "value", "low", "high", "at chance"]]
    rows += [
        [n, d["value"], d["low"], d["high"], n in comparison["at_chance"]]
        for n, d in zip(names, differences, strict=True)
    ]
    return _plot(figure, f"forest-{comparison['dense']}", title, rows)


def against(report: Mapping[str, Any], axis: str) -> Plot:
    """Score of each skill against loss, tokens, FLOPs or time: a line for each training, dots at its checkpoints."""
    figure, panels = plt.subplots(2, 1, figsize=(_SIZE[0], 1.7 * _SIZE[1]), sharex=True)
    rows = [["model", "seed", "step", axis, *SKILLS]]
    for model, colour in zip(report["models"], _cycle(len(report["models"])), strict=True):
        for number, seed in enumerate(report["seeds"]):
            points = [point for point in model["checkpoints"] if point["seed"] == seed]
            rows += [
                [model["name"], seed, p["step"], p[axis], *(p["scores"][skill] for skill in SKILLS)] for p in points
            ]
            for skill, panel in zip(SKILLS, panels, strict=True):
                label = model["name"] if number == 0 and skill == SKILLS[0] else None
                values = [100 * p["scores"][skill] for p in points]
                panel.plot(
                    [p[axis] for p in points], values, "o-", color=colour, markersize=3, linewidth=1, label=label
                )
    for skill, panel in zip(SKILLS, panels, strict=True):
        panel.axhline(100 * report["models"][0]["scores"][skill]["guess"], linestyle=":", color="grey")
        panel.set(ylabel=f"{skill}, %")
    panels[1].set(xlabel=LABELS[axis] + (" (better to the right)" if axis == "loss" else ""))
    if axis == "loss":
        panels[1].invert_xaxis()
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return _plot(figure, f"score-against-{axis}", f"Score against {LABELS[axis].split(',')[0]}", rows)


def curves(report: Mapping[str, Any]) -> Plot:
    """Training loss, and validation loss as dots, by step."""
    figure, axes = plt.subplots(figsize=_SIZE)
    rows = [["model", "seed", "split", "step", "loss"]]
    for model, colour in zip(report["models"], _cycle(len(report["models"])), strict=True):
        for number, curve in enumerate(model["curves"]):
            label = model["name"] if number == 0 else None
            axes.plot(*_columns(curve["train"]), color=colour, linewidth=1, alpha=0.6, label=label)
            axes.plot(*_columns(curve["validation"]), "o", color=colour, markersize=4)
            rows += [
                [model["name"], curve["seed"], split, *pair]
                for split in ("train", "validation")
                for pair in curve[split]
            ]
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token\n(dots: validation)")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.2g}")
    axes.yaxis.set_minor_formatter("{x:.2g}")
    axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.legend(frameon=False, fontsize=9)
    return _plot(figure, "loss", "Loss", rows)


def expert_load(model: Mapping[str, Any]) -> Plot:
    """Load of each expert by layer, on the validation text."""
    load = model["expert_load"]
    figure = _heat_map(_relative(load), [str(i) for i in range(len(load))], "MoE layer", "expert")
    rows: list[list[Any]] = [["layer", "expert", "share"]]
    rows += [[i, j, share] for i, layer in enumerate(load) for j, share in enumerate(layer)]
    return _plot(figure, f"expert-load-{model['name']}", f"Expert load of {model['name']}, validation text", rows)


def task_load(model: Mapping[str, Any]) -> Plot:
    """Load of each expert by task; the layers stand side by side."""
    load = model["task_load"]
    wide = [[value for layer in _relative(layers) for value in layer] for layers in load.values()]
    layers, experts = np.shape(next(iter(load.values())))
    figure = _heat_map(wide, list(load), "", f"{layers} MoE layers of {experts} experts, side by side")
    for layer in range(1, layers):
        figure.axes[0].axvline(layer * experts - 0.5, color="white", linewidth=1.5)
    rows: list[list[Any]] = [["task", "layer", "expert", "share"]]
    rows += [[t, i, j, share] for t, of in load.items() for i, layer in enumerate(of) for j, share in enumerate(layer)]
    return _plot(figure, f"task-load-{model['name']}", f"Which experts of {model['name']} fire for which task", rows)


def _relative(load: Sequence[Sequence[float]]) -> list[list[float]]:
    """Shares times the number of experts: 1 is balanced."""
    return [[share * len(layer) for share in layer] for layer in load]


def _heat_map(values: list[list[float]], names: Sequence[str], ylabel: str, xlabel: str) -> Figure:
    figure, axes = plt.subplots(figsize=(_SIZE[0], max(2.0, 0.4 * len(values) + 1.2)))
    highest = max(2.0, *map(max, values))
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=highest, aspect="auto")
    columns = len(values[0])
    if columns <= 16:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "black" if value > 0.65 * highest else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(columns))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_yticks(range(len(values)), names)
    figure.colorbar(image, label="load ÷ mean load")
    return figure


def _bars(
    axes: Axes, estimates: Sequence[Mapping[str, float]], heights: Sequence[float], marker: str = "o", **more: Any
) -> None:
    """Estimates in % with their intervals as horizontal bars."""
    values = [100 * e["value"] for e in estimates]
    left = [max(0.0, v - 100 * e["low"]) for v, e in zip(values, estimates, strict=True)]
    right = [max(0.0, 100 * e["high"] - v) for v, e in zip(values, estimates, strict=True)]
    axes.errorbar(values, heights, xerr=[left, right], fmt=marker, markersize=4, capsize=2, **more)


def _columns(pairs: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _cycle(number: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(number)]


def _plot(figure: Figure, name: str, title: str, rows: list[list[Any]]) -> Plot:
    """Draw and close ``figure``; ``name`` keeps the ids of several SVGs in one page apart."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=150)
    plt.close(figure)
    text = svg.getvalue()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    return Plot(name, title, text, png.getvalue(), rows)
