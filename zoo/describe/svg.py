"""A block as an SVG file: the same parts as the drawing of characters, in boxes that a page or a paper shows."""

from __future__ import annotations

from xml.sax.saxutils import escape

from zoo.describe.block import BlockDrawing, Experts, Part, SubBlock

WIDTH, AXIS, LEFT, RIGHT, RAIL = 560, 300, 90, 510, 45
"""Of the picture; of the axis that the data flows along; of the boxes' sides; of the residual."""
LINE, PADDING, SPACE = 18, 10, 18
"""Height of a line of text, room above and below the text of a box, room between boxes."""
RADIUS = 8

COLOURS = {"norm": "#f1f3f5", "mixer": "#d0ebff", "ffn": "#d3f9d8", "router": "#ffe8cc", "expert": "#d3f9d8"}

STYLE = """
  text { font: 13px system-ui, sans-serif; text-anchor: middle; fill: #212529 }
  .title { font-weight: 600 }
  .note { fill: #495057; font-size: 12px }
  path { fill: none; stroke: #495057; stroke-width: 1.4 }
  rect { stroke: #495057; stroke-width: 1.2 }
"""


def svg_drawing(drawing: BlockDrawing, title: str) -> str:
    """A whole SVG file, on white, so that it is read on dark pages too."""
    page = _Page()
    page.text(AXIS, page.bottom + LINE, title, "title")
    page.text(AXIS, page.bottom + 2 * LINE, f"x, {drawing.width:,} wide", "note")
    page.bottom += 2 * LINE + 6
    mixer, *ffns = drawing.sub_blocks
    _draw(page, mixer, "mixer")
    for ffn in ffns:
        _draw(page, ffn, "ffn")
    page.stem(SPACE, arrow=True)
    for note in drawing.notes:
        page.bottom += LINE
        page.text(WIDTH // 2, page.bottom, note, "note")
    height = page.bottom + LINE
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            f"<title>{escape(title)}: one block</title>",
            f"<style>{STYLE}</style>",
            f'<path style="fill: white; stroke: none" d="M0 0H{WIDTH}V{height}H0z"/>',
            *page.elements,
            "</svg>\n",
        ]
    )


class _Page:
    """Elements, and how far down the last one reaches."""

    def __init__(self) -> None:
        self.elements: list[str] = []
        self.bottom = 6

    def text(self, x: int, y: int, content: str, kind: str = "") -> None:
        self.elements.append(f'<text x="{x}" y="{y}" class="{kind}">{escape(content)}</text>')

    def path(self, data: str) -> None:
        self.elements.append(f'<path d="{data}"/>')

    def rect(self, x: int, y: int, width: int, height: int, colour: str) -> None:
        self.elements.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{RADIUS}" fill="{COLOURS[colour]}"/>'
        )

    def stem(self, length: int, arrow: bool = False) -> None:
        """A line down the axis."""
        self.path(f"M{AXIS} {self.bottom}v{length}" + ("m-4 -6l4 6l4 -6" if arrow else ""))
        self.bottom += length

    def box(self, part: Part, colour: str) -> None:
        height = 2 * PADDING + LINE * (1 + len(part.lines)) - 4
        self.rect(LEFT, self.bottom, RIGHT - LEFT, height, colour)
        for i, line in enumerate((part.title, *part.lines)):
            self.text(AXIS, self.bottom + PADDING + LINE * i + 11, line, "" if i else "title")
        self.bottom += height


def _draw(page: _Page, sub_block: SubBlock, kind: str) -> None:
    page.stem(SPACE)
    start = page.bottom
    parts = [(part, "norm") for part in sub_block.before]
    parts.append((sub_block.main, "router" if sub_block.experts else kind))
    for part, colour in parts:
        page.stem(SPACE, arrow=True)
        page.box(part, colour)
    if sub_block.experts:
        _draw_experts(page, sub_block.experts)
    for part in sub_block.after:
        page.stem(SPACE, arrow=True)
        page.box(part, "norm")
    page.stem(SPACE, arrow=True)
    centre = page.bottom + 9
    page.elements.append(f'<circle cx="{AXIS}" cy="{centre}" r="9" fill="white" stroke="#495057" stroke-width="1.2"/>')
    page.text(AXIS, centre + 5, "+")
    page.path(f"M{AXIS} {start}H{RAIL}V{centre}H{AXIS - 9}m-6 -4l6 4l-6 4")
    page.bottom = centre + 9


def _draw_experts(page: _Page, experts: Experts) -> None:
    """Boxes side by side below the router: lines lead from it to the routed ones, and not to the shared ones."""
    labels = ["1", "2", "…", f"{experts.count:,}"] if experts.count > 3 else [str(n + 1) for n in range(experts.count)]
    labels += [f"{experts.shared} shared" if experts.shared > 1 else "shared"] * (experts.shared > 0)
    step = (RIGHT - LEFT) // len(labels)
    top, height, bar = page.bottom + 2 * SPACE, 30, page.bottom + SPACE
    below = top + height + SPACE
    page.path(f"M{AXIS} {page.bottom}V{bar}")
    centres = [LEFT + step * i + step // 2 for i in range(len(labels))]
    for centre, label in zip(centres, labels, strict=True):
        if label == "…":
            page.text(centre, top + 20, label)
            continue
        page.rect(centre - step // 2 + 6, top, step - 12, height, "expert")
        page.text(centre, top + 20, label)
        page.path(f"M{centre} {top + height}V{below}H{AXIS}")
        if "shared" in label:
            page.path(f"M{centre} {top - SPACE // 2}V{top}m-4 -6l4 6l4 -6")
            page.text(centre, top - SPACE // 2 - 4, "every token", "note")
        else:
            page.path(f"M{AXIS} {bar}H{centre}V{top}m-4 -6l4 6l4 -6")
    page.path(f"M{AXIS} {below}v{SPACE // 2}")
    page.text(AXIS, below + SPACE // 2 + 13, f"Σ, each {experts.line}", "note")
    page.bottom = below + SPACE // 2 + LINE
