"""Plain text for the terminal: aligned columns and numbers that a person can read."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of equal length as aligned columns: the first ``left`` to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            f"{cell:<{w}}" if i < left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def short(number: float) -> str:
    """Number with three digits and a decimal suffix: 46702792704 is 46.7B."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        scaled = abs(number) / size
        if scaled >= 0.9995:  # what would round to 1000 of the smaller unit is 1 of this one
            decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{number / size:.{decimals}f}{suffix}"
    return f"{number:.0f}"


def binary(size: int) -> str:
    """Bytes in binary units: 93405585408 is 87.0 GiB."""
    for unit, suffix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {suffix}"
    return f"{size} B"
