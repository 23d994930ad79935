"""Tables of GitHub's Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of equal length, the first of them the heading: ``left`` columns to the left, the others to the right."""
    heading, *body = [[escaped(cell) for cell in row] for row in rows]
    rule = ["---" if i < left else "---:" for i in range(len(heading))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *body))


def escaped(text: str) -> str:
    """``text`` as a cell."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("_", "\\_")
