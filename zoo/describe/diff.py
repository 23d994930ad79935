"""How two architectures differ, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from zoo.cli.text import columns
from zoo.config import ModelConfig
from zoo.describe.markdown import table
from zoo.describe.rows import LABELS, NONE, Row, describe


@dataclass(frozen=True)
class Pair:
    """One property of two models; a model without it has ``None`` and shows a dash."""

    section: str
    label: str
    a: Any
    b: Any
    texts: tuple[str, str]

    @property
    def differs(self) -> bool:
        return self.a != self.b


def diff(a: ModelConfig, b: ModelConfig) -> list[Pair]:
    """The properties of both models, those included in which they agree, in the order of the table."""
    rows_a, rows_b = describe(a), describe(b)
    keys = [*rows_a, *(key for key in rows_b if key not in rows_a)]
    order = _order(list(rows_a), list(rows_b))
    return [_pair(key, rows_a.get(key), rows_b.get(key)) for key in sorted(keys, key=order.__getitem__)]


def as_text(names: tuple[str, str], pairs: list[Pair]) -> str:
    """Aligned columns, a heading for every section."""
    rows = [("", *names)]
    for section, group in groupby(pairs, key=lambda pair: pair.section):
        rows.append((section, "", ""))
        rows.extend((f"  {pair.label}", *pair.texts) for pair in group)
    return columns(rows)


def as_markdown(names: tuple[str, str], pairs: list[Pair]) -> str:
    """A table of GitHub's Markdown."""
    rows: list[tuple[str, ...]] = [("", *names)]
    for section, group in groupby(pairs, key=lambda pair: pair.section):
        rows.append((f"**{section}**", "", ""))
        rows.extend((pair.label, *pair.texts) for pair in group)
    return table(rows)


def _pair(key: tuple[str, str], a: Row | None, b: Row | None) -> Pair:
    values = (a.value if a else None, b.value if b else None)
    texts = (a.text if a else NONE, b.text if b else NONE)
    if values[0] != values[1] and texts[0] == texts[1]:  # they agree in the digits shown
        texts = (f"{values[0]:,}", f"{values[1]:,}")
    return Pair(*key, *values, texts)


def _order(a: list[tuple[str, str]], b: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Key → its place: sections together, known labels as in ``LABELS``, others after them, what it costs last."""
    known: dict[tuple[str, str], int] = {}
    for i, key in enumerate(LABELS.values()):
        known.setdefault(key, i)
    keys = [*a, *b]
    sections = dict.fromkeys(section for section, _ in [*known, *keys])
    places = {section: i for i, section in enumerate([*(s for s in sections if s != "Cost"), "Cost"])}
    return {key: (places[key[0]], known.get(key, len(known)), i) for i, key in enumerate(keys)}
