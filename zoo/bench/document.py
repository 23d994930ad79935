"""docs/performance.md: tables and figure made from the JSON files beside it, in prose that people write.

What stands between ``<!-- zoo bench: NAME -->`` and ``<!-- end -->`` is made from ``performance/NAME.json``; all else
is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import zoo
from zoo.bench.plots import cost_plot, sweeps
from zoo.bench.results import Results, load
from zoo.bench.tables import markdown
from zoo.files import replacing, write_text

DOCUMENT, FOLDER = "performance.md", "performance"
_MADE = re.compile(r"(<!-- zoo bench: ([\w-]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def docs_dir() -> Path:
    """``docs/`` of the source checkout.

    Raises:
        ValueError: the zoo was installed without it.
    """
    directory = Path(zoo.__file__).resolve().parent.parent / "docs"
    if not (directory / DOCUMENT).is_file():
        raise ValueError(f"--write-docs: {directory / DOCUMENT} is not there; run it in a checkout of the source")
    return directory


def write(docs: Path) -> None:
    """Make the document's tables, and the figures beside the JSON files, anew from what ``docs / FOLDER`` holds."""
    path, results = docs / DOCUMENT, load_all(docs / FOLDER)
    write_text(path, filled(path.read_text(encoding="utf-8"), results))
    for one in results.values():
        png = cost_plot(one)
        if png is not None:
            with replacing(docs / FOLDER / _figure(one)) as file:
                file.write(png)


def load_all(folder: Path) -> dict[str, Results]:
    """Every file of results in ``folder``, by name.

    Raises:
        ValueError: one of them is not such a file, or has the name of another subject, device or dtype.
    """
    found = {path.stem: load(path) for path in sorted(folder.glob("*.json"))}
    for name, results in found.items():
        if name != results.name:
            raise ValueError(f"{folder / name}.json: holds {results.name}; rename it to {results.name}.json")
    return found


def filled(text: str, results: Mapping[str, Results]) -> str:
    """``text`` with what was made before made anew; results that have no place in it get one at its end."""
    for name in results.keys() - {found[2] for found in _MADE.finditer(text)}:
        text = f"{text.rstrip()}\n\n## `{name}`\n\n<!-- zoo bench: {name} -->\n<!-- end -->\n"

    def fill(found: re.Match[str]) -> str:
        name = found[2]
        return f"{found[1]}{_section(results[name]) if name in results else ''}{found[3]}"

    return _MADE.sub(fill, text)


def _section(results: Results) -> str:
    figure = "" if not sweeps(results) else f"![Cost of a token]({FOLDER}/{_figure(results)})\n\n"
    return f"\n{figure}{markdown(results)}\n\n"


def _figure(results: Results) -> str:
    return f"{results.name}-cost.png"
