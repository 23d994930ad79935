"""What a token costs when one size of the model or of the batch varies, from the rows whose notes name a sweep."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from zoo.bench.results import Results
from zoo.bench.rows import LIMIT, OURS, Row
from zoo.harness.drawing import COLOURS, FAINT, STYLE, plt

PANELS = {
    "experts": "experts, of which 2 are active",
    "granularity": "granularity: parts of each expert",
    "sequence": "tokens of a sequence, 2,048 in a step",
    "batch": "sequences of 256 tokens in a step",
}
"""Name of a sweep in the notes → label of its axis."""


def sweeps(results: Results) -> dict[str, list[Row]]:
    """Name → rows in ascending order of the value, of the latest machine and the fewest threads of each sweep."""
    found = {}
    for name in PANELS:
        runs = [run for run in results.runs if any(row.notes.get("sweep") == name for row in run.rows)]
        latest = max(runs, key=lambda run: run.date).place[:2] if runs else None
        runs = [run for run in runs if run.place[:2] == latest]
        threads = min((run.threads for run in runs), default=0)
        rows = [row for run in runs if run.threads == threads for row in run.rows if row.notes.get("sweep") == name]
        if rows:
            found[name] = sorted(rows, key=lambda row: row.notes["value"])
    return found


def cost_plot(results: Results) -> bytes | None:
    """PNG with a panel for each sweep: median time per token of ours, of the best peer and of the limit."""
    found = sweeps(results)
    if not found:
        return None
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(8, 5.5), sharey=True, squeeze=False)
        for axes, name in zip(grid.flat, PANELS, strict=True):
            _panel(axes, PANELS[name], found.get(name, []))
        for axes in grid[:, 0]:
            axes.set_ylabel("µs for a token")
        grid[0, 0].set_ylim(bottom=0)
        handles, labels = next(axes for axes in grid.flat if axes.lines).get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
        plt.close(figure)
    return png.getvalue()


def _panel(axes: Axes, label: str, rows: list[Row]) -> None:
    values = [row.notes["value"] for row in rows]
    lines: dict[str, tuple[str | None, dict[str, Any]]] = {
        "zoo": (OURS, {"color": COLOURS[0], "marker": "o"}),
        "best peer": (None, {"color": COLOURS[1], "marker": "s", "linestyle": "--"}),
        "dense model of equal FLOPs": (LIMIT, {"color": FAINT, "marker": "^", "linestyle": ":"}),
    }
    for name, (way, look) in lines.items():
        ways = [way or row.best_peer for row in rows]
        points = [
            (value, 1e6 * row.median(chosen) / row.notes["tokens"])
            for value, row, chosen in zip(values, rows, ways, strict=True)
            if chosen is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, markersize=5, linewidth=1.5, **look)
    axes.set(xlabel=label, xscale="log")
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
