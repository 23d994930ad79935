"""What the figures of a report have in common: size, colours that follow the page's, and their three forms."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import count
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 4.0
"""Inches of every figure, 384 pixels of a page: so wide is a telephone, where text must not shrink. A page with more
room shows several side by side."""

FONT_SIZE = 10

INK, FAINT = "#1b1f24", "#767676"
"""Colours of text and axes, and of what stands back."""

COLOURS = ("#0072b2", "#d55e00", "#00805d", "#b3478d", "#8f6a00", "#5f4bb6")
"""After Okabe and Ito's palette, which colour-blind readers can tell apart, darker where white needs it."""

_DARK = {
    INK: "#e8eaed",
    FAINT: "#9aa0a6",
    **dict(zip(COLOURS, ("#4db2ec", "#ff8a3d", "#35c79b", "#ee8fca", "#d9ad3c", "#a99bf5"), strict=True)),
}

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One more than colours, so that the two together tell 42 models apart."""

STYLE: Any = {
    "font.size": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    "legend.fontsize": FONT_SIZE,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text: it can be read out, selected and coloured
    "svg.hashsalt": "zoo",  # ids that do not change from run to run
}


@dataclass(frozen=True)
class Plot:
    """A figure in its three forms."""

    name: str
    """Of its files, without suffix."""
    section: str
    """Of the report that it belongs to."""
    title: str
    note: str
    """What is drawn, in a sentence; with the title it is what a screen reader says."""
    svg: str
    png: bytes
    rows: list[list[Any]]
    """The plotted numbers, under a row of headings."""

    def csv(self) -> str:
        """``rows`` as text."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(self.rows)
        return buffer.getvalue()


def finish(figure: Figure, name: str, section: str, title: str, note: str, rows: list[list[Any]]) -> Plot:
    """Draw and close ``figure``."""
    name = re.sub(r"[^\w.-]", "-", name)  # of files, and of ids that others of the SVG refer to
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
    figure.savefig(png, format="png", dpi=200)
    plt.close(figure)
    return Plot(name, section, title, note, _for_page(svg.getvalue(), name, f"{title}. {note}"), png.getvalue(), rows)


def _for_page(svg: str, name: str, label: str) -> str:
    """Ids that several figures of one page do not share, colours as variables of the page, and a text to read out."""
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return re.sub("|".join(_DARK), lambda found: f"var({_variable(found[0])})", svg)


def palette(dark: bool) -> str:
    """The colours as CSS variables."""
    return " ".join(f"{_variable(light)}: {darker if dark else light};" for light, darker in _DARK.items())


def _variable(colour: str) -> str:
    return f"--c{colour[1:]}"


def looks(sparse: Sequence[bool]) -> list[dict[str, Any]]:
    """Colour, marker and line of each model: solid lines for sparse models, dashed ones for dense models."""
    return [
        {
            "color": COLOURS[number % len(COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": "-" if is_sparse else "--",
        }
        for number, is_sparse in zip(count(), sparse, strict=False)
    ]


def wrapped(name: str, width: int = 18) -> str:
    """A name in lines of about ``width`` letters, broken after hyphens, underscores and spaces."""
    lines = [""]
    for part in re.findall(r"[^-_ ]*[-_ ]?", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.strip() for line in lines)


def legend(figure: Figure, names: Sequence[str]) -> None:
    """A legend above the axes, in two columns where the names leave room for that."""
    columns = 2 if max(map(len, names)) <= 16 else 1
    figure.legend(loc="outside upper left", ncols=columns)


def heat_map(
    figure: Figure,
    panels: Sequence[Axes],
    tables: Sequence[Sequence[Sequence[float]]],
    names: Sequence[str] | None,
    label: str = "load ÷ mean load",
    limits: tuple[float, float] | None = None,
) -> None:
    """One table [rows][experts] a panel, all in the same colours, with the numbers where there is room for them.

    What is not a number stays empty.

    Args:
        names: of the rows; ``None``: they are numbered.
        label: of the colours.
        limits: what the colours go from and to; by default from 0 to the highest value, or 2.
    """
    low, high = limits or (0.0, max(2.0, np.nanmax(tables)))
    for axes, table in zip(panels, tables, strict=True):
        image = axes.imshow(table, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        if names is None:
            axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        else:
            axes.set_yticks(range(len(names)), names)
        colours: Any = image.to_rgba(np.array(table))
        for row, column in np.ndindex(*np.shape(table)) if len(table[0]) <= 8 and len(panels) == 1 else ():
            text = "" if np.isnan(table[row][column]) else f"{table[row][column]:.1f}"
            axes.text(column, row, text, ha="center", va="center", color=readable_on(colours[row, column]))
    panels[-1].set(xlabel="expert")
    panels[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.colorbar(image, ax=list(panels), label=label, location="bottom", aspect=30, ticks=MaxNLocator(5))


def readable_on(colour: Sequence[float]) -> str:
    """Black or white, whichever stands out more from ``colour`` (RGB from 0 to 1): by WCAG 4.4 : 1 or more."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#0a0a0a" if luminance > 0.18 else "#ffffff"  # not #000000, which Matplotlib leaves to the page
