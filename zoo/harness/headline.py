"""What a report may say in words: sentences made from its numbers, which never rank what the data cannot tell apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SIGNIFICANCE = 0.001
"""Largest p-value that counts as clearly better than guessing."""

SKILLS = ("knowledge", "comprehension")

MATCHED = {"active": "active parameters", "total": "total parameters", "flops": "training FLOPs", "time": "step time"}


def sentences(report: Mapping[str, Any]) -> list[str]:
    """The report in a few sentences: the first contrast, whether guessing would do, what was left out, other contrasts.

    Nothing here depends on a clock: the view at equal time is in the report's table.
    """
    result = []
    for comparison in report["comparisons"]:
        result.append(_contrast(report, comparison, "tokens", f"At equal {held_equal(comparison)}"))
        if "loss" in comparison["views"]:
            perplexity = math.exp(comparison["views"]["loss"]["at"])
            result.append(_contrast(report, comparison, "loss", f"At equal perplexity ({perplexity:.2f})"))
        both = [task for task in comparison["at_chance"] if task not in report["not_ranked"]]
        if both:
            pair = f"{comparison['first']} and {comparison['second']}"
            result.append(f"Of {pair}, neither is above chance on {', '.join(both)}: not ranked.")
    chance = [_against_guessing(report)]
    if report["not_ranked"]:
        chance.append(f"No model is above chance on {', '.join(report['not_ranked'])}: left out here.")
    return [*result[:1], *chance, *result[1:]]


def held_equal(comparison: Mapping[str, Any]) -> str:
    """What two models have in common at the end of training."""
    return " and ".join([*([MATCHED[by]] if (by := comparison["matched_by"]) else []), "tokens"])


def ranked_tasks(report: Mapping[str, Any], skill: str, comparison: Mapping[str, Any] | None = None) -> list[str]:
    """The tasks of a skill on which some model is above chance; of a comparison, one of its two."""
    left_out = {*report["not_ranked"], *(comparison["at_chance"] if comparison else ())}
    return [task for task in report["tasks"][skill] if task not in left_out]


def percent(value: float) -> str:
    """A share of one as a percentage with one decimal."""
    return f"{100 * value:.1f}%"


def points(value: float) -> str:
    """A difference of shares in percentage points, signed."""
    return f"{100 * value:+.1f}".replace("-", "−")


def interval(estimate: Mapping[str, float]) -> str:
    """Bounds of an estimate in percentage points."""
    return f"{points(estimate['low'])} to {points(estimate['high'])}"


def tells_apart(difference: Mapping[str, float]) -> bool:
    """Whether the interval of a difference leaves out zero."""
    return difference["low"] > 0 or difference["high"] < 0


def _against_guessing(report: Mapping[str, Any]) -> str:
    scores = {(model["name"], skill): model["scores"][skill] for model in report["models"] for skill in SKILLS}
    weak = [
        f"{name} on {skill} (p = {score['p_value']:.2g})"
        for (name, skill), score in scores.items()
        if score["p_value"] is not None and score["p_value"] > SIGNIFICANCE
    ]
    if weak:
        return f"Not clearly better than guessing: {', '.join(weak)}; contrasts there mean little."
    if all(score["p_value"] is None for model in report["models"] for score in model["scores"].values()):
        return "No task here has a known guess rate, so no score was tested against guessing."
    return f"Every model beats guessing on knowledge and on comprehension (exact test, p < {SIGNIFICANCE})."


def _contrast(report: Mapping[str, Any], comparison: Mapping[str, Any], axis: str, where: str) -> str:
    view = comparison["views"][axis]
    subject = f"{where}, {comparison['first']} against {comparison['second']}"
    if view["scores"] is None:
        return f"{subject}: not determined, because one of the two was better than that at its first checkpoint."
    drawn = "items and seeds" if len(report["seeds"]) > 1 else "items"
    ranked = [skill for skill in SKILLS if ranked_tasks(report, skill, comparison)]
    if not ranked:
        return f"{subject}: not ranked, because neither is above chance on any task."
    parts = [
        f"{skill} {_difference(view['scores'][skill], drawn)}"
        if skill in ranked
        else f"{skill} not ranked, because neither is above chance on any task of it"
        for skill in SKILLS
    ]
    if len(ranked) == len(SKILLS):
        parts.append(f"ratio of relative gains {_value(view)}")
    return f"{subject}: {'; '.join(parts)}."


def _difference(score: Mapping[str, Any], drawn: str) -> str:
    values, difference = [percent(value) for value in score["values"]], score["difference"]
    text = f"{values[0]} and {values[1]}, {points(difference['value'])} points (95% interval {interval(difference)})"
    return text if tells_apart(difference) else f"{text}, which these {drawn} cannot tell from no difference"


def _value(view: Mapping[str, Any]) -> str:
    """The ratio of a view with its interval, or why there is none."""
    ratio = view["gain_ratio"]
    if ratio is None:
        gains = [view["scores"][skill]["relative_gain"] for skill in SKILLS]
        reason = "the second model may score zero" if None in gains else "the gain on comprehension may be zero"
        return f"not determined, because {reason}"
    return ratio_text(ratio)


def ratio_text(ratio: Mapping[str, float]) -> str:
    """A ratio with its interval."""
    value, low, high = (f"{ratio[key]:.1f}".replace("-", "−") for key in ("value", "low", "high"))
    return f"{value} (95% interval {low} to {high})"
