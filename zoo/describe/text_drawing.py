"""A block as a drawing of characters."""

from __future__ import annotations

import textwrap

from zoo.describe.block import BlockDrawing, Experts, Part, SubBlock

RAIL = 2
"""Column of the residual."""
LEFT = 6
"""Column at which boxes begin."""
GAP = 3
"""Columns between the boxes of experts."""


def text_drawing(drawing: BlockDrawing) -> str:
    """The block from top to bottom; every line is right for a fixed-width font."""
    canvas = _Canvas(_inner_width(drawing))
    canvas.centred(f"x, {drawing.width:,} wide")
    for sub_block in drawing.sub_blocks:
        _draw(canvas, sub_block)
    canvas.stem()
    notes = [line for note in drawing.notes for line in textwrap.wrap(note, LEFT + canvas.width)]
    return "\n".join([*(line.rstrip() for line in canvas.lines), "", *notes])


class _Canvas:
    """Lines of characters that grow downwards, around one vertical axis."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.axis = LEFT + width // 2
        self.lines: list[str] = []
        self.residual = False

    def line(self, placed: dict[int, str]) -> None:
        """A line with texts at columns; the residual passes on the left where there is one."""
        row = [" "] * (LEFT + self.width)
        for column, text in (({RAIL: "│"} if self.residual else {}) | placed).items():
            row[column : column + len(text)] = text
        self.lines.append("".join(row))

    def stem(self) -> None:
        self.line({self.axis: "│"})

    def centred(self, text: str) -> None:
        self.line({self.axis - len(text) // 2: text})

    def box(self, part: Part, below: str = "┬") -> None:
        inner = self.width - 2
        edge = self.axis - LEFT - 1
        self.line({LEFT: "┌" + "─" * edge + "┴" + "─" * (inner - edge - 1) + "┐"})
        for text in (part.title, *part.lines):
            self.line({LEFT: f"│{text:^{inner}}│"})
        self.line({LEFT: "└" + "─" * edge + below + "─" * (inner - edge - 1) + "┘"})


def _draw(canvas: _Canvas, sub_block: SubBlock) -> None:
    canvas.stem()
    canvas.line({RAIL: "┌" + "─" * (canvas.axis - RAIL - 1) + "┤"})
    canvas.residual = True
    for part in (*sub_block.before, sub_block.main):
        canvas.box(part)
    if sub_block.experts:
        _draw_experts(canvas, sub_block.experts)
    for part in sub_block.after:
        canvas.box(part)
    canvas.residual = False
    canvas.line({RAIL: "└" + "─" * (canvas.axis - RAIL - 2) + "▶⊕"})


def _labels(experts: Experts) -> tuple[list[str], list[str]]:
    """Of the routed boxes, an ellipsis for those that are not drawn, and of the shared one."""
    numbers = list(range(1, experts.count + 1))
    routed = [f"expert {n}" for n in (numbers if experts.count <= 3 else numbers[:2])]
    if experts.count > 3:
        routed += ["…", f"expert {experts.count}"]
    return routed, [f"{experts.shared} shared" if experts.shared > 1 else "shared"] if experts.shared else []


def _row_width(experts: Experts) -> int:
    routed, shared = _labels(experts)
    return sum(len(label) + (0 if label == "…" else 4) + GAP for label in [*routed, *shared]) - GAP


def _draw_experts(canvas: _Canvas, experts: Experts) -> None:
    """Boxes side by side: the router's lines reach the routed ones, every token the shared one; their sum goes on."""
    routed, shared = _labels(experts)
    column = LEFT + (canvas.width - _row_width(experts)) // 2
    rows: list[dict[int, str]] = [{}, {}, {}]
    centres: list[int] = []
    for label in [*routed, *shared]:
        if label == "…":
            rows[1][column] = label
            column += 1 + GAP
            continue
        middle = (len(label) + 2) // 2
        centres.append(column + 1 + middle)
        edge = "─" * middle, "─" * (len(label) + 1 - middle)
        rows[0][column] = "┌" + "┴".join(edge) + "┐"
        rows[1][column] = f"│ {label} │"
        rows[2][column] = "└" + "┬".join(edge) + "┘"
        column += len(label) + 4 + GAP
    reached = centres[: len(centres) - len(shared)]
    above = _bar(reached, canvas.axis, "┌┬┐", "┴┼")
    if shared:
        above[centres[-1]] = "╷"
    canvas.line(above)
    for row in rows:
        canvas.line(row)
    canvas.line(_bar(centres, canvas.axis, "└┴┘", "┬┼"))
    canvas.centred("Σ")
    canvas.centred(experts.line)
    canvas.stem()


def _bar(ends: list[int], axis: int, corners: str, joints: str) -> dict[int, str]:
    """A horizontal line that joins the columns ``ends`` and the ``axis``."""
    first, last = min(*ends, axis), max(*ends, axis)
    row = ["─"] * (last - first + 1)
    for end in ends:
        row[end - first] = corners[1]
    row[0], row[-1] = corners[0], corners[2]
    row[axis - first] = joints[1] if axis in ends else joints[0]
    return {first: "".join(row)}


def _inner_width(drawing: BlockDrawing) -> int:
    texts = [
        text
        for sub_block in drawing.sub_blocks
        for part in (*sub_block.before, sub_block.main, *sub_block.after)
        for text in (part.title, *part.lines)
    ]
    rows = [max(_row_width(s.experts), len(s.experts.line)) for s in drawing.sub_blocks if s.experts]
    return max([*map(len, texts), *rows]) + 5
