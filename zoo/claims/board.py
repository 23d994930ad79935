"""What was found on every claim, as JSON and as the table of ``docs/claims.md``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from zoo.claims.claim import Claim
from zoo.claims.measures import MEASURES
from zoo.claims.run import ArmRun, core_seconds
from zoo.claims.verdict import Finding, Measures, judge
from zoo.config import to_dict
from zoo.describe.markdown import table
from zoo.files import write_text
from zoo.harness.summary import machine
from zoo.training.run import environment

RESULTS = "claims"
"""Folder of the results in a directory of claims."""


def result(claim: Claim, measures: Measures, runs: Mapping[str, Mapping[int, ArmRun]]) -> dict[str, Any]:
    """All that is known of a claim, as plain data."""
    verdict, found, given = judge(claim, measures)
    of_all = [run for by_seed in runs.values() for run in by_seed.values()]
    return {
        "claim": claim.name,
        "says": claim.says,
        "sources": list(claim.sources),
        "note": claim.note,
        "verdict": verdict,
        "expect": [_finding(finding) for finding in found],
        "given": [_finding(finding) for finding in given],
        "arms": {
            arm: {str(seed): dict(values) for seed, values in by_seed.items()} for arm, by_seed in measures.items()
        },
        "seeds": list(claim.seeds),
        "core_seconds": core_seconds(of_all),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        **environment(),
        "config": to_dict(claim),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "expectation": {key: value for key, value in asdict(finding.expectation).items() if value is not None},
        "by_seed": list(finding.by_seed),
        "value": finding.estimate.value,
        "low": finding.estimate.low,
        "high": finding.estimate.high,
        "outcome": finding.outcome,
    }


def keep(found: Mapping[str, Any], out: Path) -> Path:
    """Write a result into its directory of claims."""
    path = out / RESULTS / f"{found['claim']}.json"
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(found, indent=1) + "\n")
    return path


def kept(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, in the order of their names.

    Raises:
        ValueError: a file is not a result.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            results.append({key: found[key] for key in (*_KEYS, *(set(found) - set(_KEYS)))})
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path}: it is not the result of a claim ({error}); remove it") from None
    return results


_KEYS = ("claim", "says", "verdict", "expect", "given", "arms", "seeds")


# ---------------------------------------------------------------------------------------------------------------
# As text
# ---------------------------------------------------------------------------------------------------------------


def board(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one row a claim, then each with its arms and what was expected of them."""
    head = ["claim", "verdict", "what was seen (95% interval)", "seeds"]
    rows = [
        [
            f"[{found['says']}](#{found['claim']})",
            f"**{found['verdict']}**",
            "<br>".join(seen(finding) for finding in found["expect"]),
            str(len(found["seeds"])),
        ]
        for found in results
    ]
    return "\n\n".join([table([head, *rows], left=len(head)), *(details(found) for found in results)])


def details(found: Mapping[str, Any]) -> str:
    """Markdown on one claim."""
    used = dict.fromkeys(f["expectation"]["measure"] for f in (*found["expect"], *found["given"]))
    arms = [
        [arm, *(spread([values[name] for values in by_seed.values() if name in values]) for name in used)]
        for arm, by_seed in found["arms"].items()
    ]
    checks = [
        [kind, wanted(finding), seen(finding), finding["outcome"]]
        for kind, findings in (("given", found["given"]), ("expected", found["expect"]))
        for finding in findings
    ]
    minutes = found["core_seconds"] / 60
    return "\n\n".join(
        part
        for part in [
            f"### {found['claim']}",
            f"{found['says']} ({'; '.join(found['sources'])}): **{found['verdict']}**.",
            found["note"],
            table([["arm", *used], *arms]),
            table([["", "expectation", "mean over seeds (95% interval)", "outcome"], *checks], left=4),
            "; ".join(f"{name}: {MEASURES[name]}" for name in used) + ". "
            f"`zoo claims {found['claim']}`, {minutes:.0f} minutes of one core, {found['date'][:10]}, "
            f"{found['machine']['processor']}.",
        ]
        if part
    )


def wanted(finding: Mapping[str, Any]) -> str:
    """An expectation in words."""
    expectation = finding["expectation"]
    terms = " ".join(_term(arm, weight) for arm, weight in expectation["contrast"].items()).removeprefix("+ ")
    name = f"ln {expectation['measure']}" if expectation["log"] else expectation["measure"]
    for key, sign in (("at_least", "≥"), ("at_most", "≤"), ("within", "within ±")):
        if key in expectation:
            return f"{name} of {terms} {sign} {expectation[key]:g}"
    raise AssertionError(f"{expectation}: no bound")


def _term(arm: str, weight: float) -> str:
    size = "" if abs(weight) == 1 else f"{abs(weight):g} · "
    return f"{'−' if weight < 0 else '+'} {size}{arm}"


def seen(finding: Mapping[str, Any]) -> str:
    """What was measured, with its interval."""
    name = finding["expectation"]["measure"]
    return f"{name} {finding['value']:+.3g} ({finding['low']:.3g} to {finding['high']:.3g})"


def spread(values: Sequence[float]) -> str:
    """Mean over seeds and the least and largest of them."""
    if not values:
        return "–"
    return f"{fmean(values):.4g} ({min(values):.4g}–{max(values):.4g})"


_MADE = re.compile(r"(<!-- zoo claims -->\n).*?(<!-- end -->\n)", re.DOTALL)


def write_docs(docs: Path, results: Sequence[Mapping[str, Any]]) -> Path:
    """Keep ``results`` in ``docs / RESULTS`` and make the board in ``claims.md`` of all that are there.

    Raises:
        ValueError: the document is not there, or has no place for the board.
    """
    path = docs / "claims.md"
    if not path.is_file():
        raise ValueError(f"--write-docs: {path} is not there; run it in a checkout of the source")
    for found in results:
        keep(found, docs)
    text, made = _MADE.subn(
        lambda place: f"{place[1]}\n{board(kept(docs / RESULTS))}\n\n{place[2]}", path.read_text(encoding="utf-8")
    )
    if made != 1:
        raise ValueError(f"{path}: it has {made} places for the board, between <!-- zoo claims --> and <!-- end -->")
    write_text(path, text)
    return path
