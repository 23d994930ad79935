"""The figures of a report as inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}
_SIZE = (5.2, 3.4)
"""Inches. Small, so that the text stays readable where the figure is scaled down to a telephone."""


def scores(report: Mapping[str, Any]) -> str:
    """Scores with intervals and guess rates: each skill, and its tasks where it has several."""
    names = [name for skill, tasks in report["tasks"].items() for name in (skill, *(tasks if len(tasks) > 1 else ()))]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(_SIZE[0], 0.55 * len(names) + 1.2))
        models = report["models"]
        for number, (model, colour) in enumerate(zip(models, _cycle(len(models)), strict=True)):
            estimates = [model["scores"][name] for name in names]
            rows = [i + 0.6 * (number / max(len(models) - 1, 1) - 0.5) for i in range(len(names))]
            values, low, high = ([100 * e[key] for e in estimates] for key in ("value", "low", "high"))
            bounds = [
                [max(0.0, v - b) for v, b in zip(values, low, strict=True)],
                [max(0.0, b - v) for v, b in zip(values, high, strict=True)],
            ]
            axes.errorbar(
                values, rows, xerr=bounds, fmt="o", markersize=4, capsize=2, color=colour, label=model["name"]
            )
        guesses = [(i, models[0]["scores"][name]["guess"]) for i, name in enumerate(names)]
        known = [(i, 100 * guess) for i, guess in guesses if guess is not None]
        for i, guess in known:
            label = "guessing" if i == known[0][0] else None
            axes.plot([guess, guess], [i - 0.4, i + 0.4], ":", color="grey", label=label)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlabel="score, % (bars: 95% intervals)", xlim=(-2, 102))
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
        return _svg(figure, "scores")


def curves(report: Mapping[str, Any]) -> str:
    """Training loss, and validation loss as dots, by step."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=_SIZE)
        for model, colour in zip(report["models"], _cycle(len(report["models"])), strict=True):
            for number, curve in enumerate(model["curves"]):
                label = model["name"] if number == 0 else None
                axes.plot(*_columns(curve["train"]), color=colour, linewidth=1, alpha=0.6, label=label)
                axes.plot(*_columns(curve["validation"]), "o", color=colour, markersize=4)
        axes.set(xlabel="optimizer step", ylabel="loss, nats a token\n(dots: validation)")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.2g}")
        axes.yaxis.set_minor_formatter("{x:.2g}")
        axes.tick_params(axis="y", which="minor", labelsize=8)
        axes.legend(frameon=False, fontsize=9)
        return _svg(figure, "curves")


def expert_load(model: Mapping[str, Any]) -> str:
    """Share of the assignments by layer and expert, times the number of experts: 1 is balanced."""
    load = model["expert_load"]
    experts = len(load[0])
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(_SIZE[0], max(2.0, 0.4 * len(load) + 1.2)))
        relative = [[share * experts for share in layer] for layer in load]
        highest = max(2.0, *map(max, relative))
        image = axes.imshow(relative, cmap="viridis", vmin=0, vmax=highest, aspect="auto")
        if experts <= 16:
            for row, layer in enumerate(relative):
                for column, value in enumerate(layer):
                    colour = "black" if value > 0.65 * highest else "white"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set(xlabel="expert", ylabel="MoE layer")
        axes.set_yticks(range(len(load)))
        if experts <= 16:
            axes.set_xticks(range(experts))
        figure.colorbar(image, label="load ÷ mean load")
        return _svg(figure, f"load-{model['name']}")


def _columns(pairs: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _cycle(number: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(number)]


def _svg(figure: Figure, name: str) -> str:
    """The figure without XML prologue; ``name`` keeps the ids of several figures in one page apart."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
