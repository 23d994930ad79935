"""A report as one HTML page that needs no other file and no network, from 400 to 1400 pixels wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from zoo.harness.contents import Section, Table, provenance, reading, sections
from zoo.harness.drawing import Plot, palette

_STYLE = Path(__file__).with_name("page.css")

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""No script, and nothing fetched from anywhere."""


def html(report: Mapping[str, Any], drawn: Sequence[Plot], config: str) -> str:
    """The page of a study.

    Args:
        drawn: the figures of ``report``.
        config: the study as YAML.
    """
    return page(
        f"{report['study']}: sparse against dense",
        report["headline"],
        sections(report),
        drawn,
        reading(report),
        provenance(report),
        f"<details><summary>The study</summary><pre>{escape(config)}</pre></details>",
    )


def page(
    title: str,
    headline: Sequence[str],
    contents: Sequence[Section],
    drawn: Sequence[Plot],
    how_to_read: str,
    origin: Sequence[tuple[str, str]],
    details: str = "",
) -> str:
    """Any page of this kind.

    Args:
        title: plain text, as all else but ``details``.
        headline: sentences; the first stands out.
        contents: sections in order; one without a table and without a figure is left out.
        drawn: figures, each with the name of its section.
        how_to_read: a paragraph.
        origin: names and values of how it was made.
        details: HTML after these.
    """
    lead, *others = headline
    parts = [(s, [plot for plot in drawn if plot.section == s.name]) for s in contents]
    parts = [(section, figures) for section, figures in parts if section.tables or figures]
    links = [(s.name, s.title) for s, _ in parts] + [("reading", "How to read this"), ("making", "How it was made")]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title><style>{_style()}</style></head><body>",
            f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>',
            "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in others) + "</ul>",
            "<nav>"
            + " ".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in links)
            + "</nav></header><main>",
            *(_section(section, figures) for section, figures in parts),
            f'<section id="reading"><h2>How to read this</h2><p>{escape(how_to_read)}</p></section>',
            '<section id="making"><h2>How it was made</h2><dl>',
            *(f"<dt>{escape(name)}</dt><dd>{_value(name, value)}</dd>" for name, value in origin),
            f"</dl>{details}</section>",
            "</main></body></html>",
            "",
        ]
    )


def _value(name: str, value: str) -> str:
    return f"<code>{escape(value)}</code>" if name == "command" else escape(value)


def _style() -> str:
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {palette(dark=True)} }} }}"
    return f"\n:root {{ {palette(dark=False)} }}\n{dark}\n{_STYLE.read_text(encoding='utf-8')}"


def _section(section: Section, figures: Sequence[Plot]) -> str:
    drawn = "".join(
        f"<figure><figcaption><b>{escape(plot.title)}</b> {escape(plot.note)}</figcaption>{plot.svg}</figure>"
        for plot in figures
    )
    return "\n".join(
        [
            f'<section id="{section.name}"><h2>{escape(section.title)}</h2>',
            f"<p>{escape(section.note)}</p>" if section.note else "",
            f'<div class="figures">{drawn}</div>' if drawn else "",
            *(['<div class="tables">', *map(_table, section.tables), "</div>"] if section.tables else []),
            "</section>",
        ]
    )


def _table(table: Table) -> str:
    """In a box of its own, which scrolls where the page is too narrow (by keyboard as well)."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    body = "\n".join(
        f'<tr><th scope="row">{_breakable(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in table.rows
    )
    title = escape(table.title)
    return (
        f'<div><h3>{title}</h3><div class="wide" role="region" aria-label="{title}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div></div>"
    )


def _breakable(name: str) -> str:
    """A name that may go on in the next line after an underscore, as it may after a hyphen."""
    return escape(name).replace("_", "_<wbr>")
