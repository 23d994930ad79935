"""An inspection as one HTML page, made as the pages of studies are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.harness.drawing import Plot
from zoo.harness.page import page
from zoo.inspect.contents import provenance, reading, sections


def html(report: Mapping[str, Any], drawn: Sequence[Plot]) -> str:
    """The page; ``drawn`` are the figures of ``report``."""
    title = f"The routers of {report['model']}"
    return page(title, report["headline"], sections(report), drawn, reading(report), provenance(report))
