"""Rows as people read them: aligned text for the terminal, Markdown for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from zoo.bench.results import Results, Run
from zoo.bench.rows import LIMIT, OURS, Row
from zoo.cli.text import columns

HEADINGS = ("case", "zoo", "best peer", "", "ratio", "quartiles", "of the limit", "memory")


def text_table(rows: Sequence[Row]) -> str:
    """Aligned columns under headings."""
    return columns([HEADINGS, *(_cells(row) for row in rows)])


def markdown(results: Results) -> str:
    """A table for each run, by place and then by date, under a line that says where and when it was measured."""
    runs = sorted(results.runs, key=lambda run: (run.place, run.date))
    return "\n\n".join(f"{caption(run)}:\n\n{_markdown_table(run.rows)}" for run in runs)


def caption(run: Run) -> str:
    """Where, when and with what a run was measured."""
    threads = f"{run.threads} thread{'' if run.threads == 1 else 's'}"
    machine, versions = run.machine, run.versions
    place = machine.get("accelerator") or f"{machine['processor']} ({machine['vector_units']}), {threads}"
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "litgpt") if name in versions)
    commit = (
        "" if run.git is None else f", commit {run.git['commit'][:10]}{' with changes' if run.git['dirty'] else ''}"
    )
    return f"{place}; {used}; {run.date[:10]}{commit}; medians of {run.rounds} rounds"


def _markdown_table(rows: Iterable[Row]) -> str:
    headings = ("case", "zoo", "best peer", "", "peer / zoo", "limit / zoo", "memory", "other peers / zoo")
    lines = [headings, tuple("---" if i in (0, 3, 7) else "---:" for i in range(len(headings)))]
    for row in rows:
        case, ours, peer, name, ratio, quartiles, limit, memory = _cells(row)
        lines.append((case, ours, peer, name, f"{ratio} ({quartiles})" if name else "", limit, memory, _others(row)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    """As in ``HEADINGS``: times in the unit that suits them, then ratios; empty where there is none."""
    peer, memory = row.best_peer, row.memory_ratio
    ours = duration(row.median(OURS))
    limit = f"{row.ratio(LIMIT):.2f}" if LIMIT in row.seconds else ""
    share = "" if memory is None else f"{memory:.2f}"
    if peer is None:
        return row.case, ours, "", "", "", "", limit, share
    low, high = row.quartiles(peer)
    return (
        row.case,
        ours,
        duration(row.median(peer)),
        peer,
        f"{row.ratio(peer):.2f}",
        f"{low:.2f}–{high:.2f}",
        limit,
        share,
    )


def _others(row: Row) -> str:
    """Ratios of the ways that are neither ours, nor the limit, nor the best peer, and the row's remark."""
    others = [way for way in row.seconds if way not in (OURS, LIMIT, row.best_peer)]
    ratios = ", ".join(f"{way} {row.ratio(way):.2f}" for way in others)
    return "; ".join(part for part in (ratios, row.notes.get("remark")) if part)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds / 1e-6)} µs"


def _three_digits(number: float) -> str:
    decimals = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:,.{decimals}f}"
