"""What a report may say in words: sentences made from its numbers, which never rank what the data cannot tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIGNIFICANCE = 0.001
"""Largest p-value that counts as clearly better than guessing."""

MATCHED = {"active": "active parameters", "total": "total parameters", "flops": "training FLOPs"}


def sentences(report: Mapping[str, Any]) -> list[str]:
    """The report in a few sentences: first whether the models learnt anything, then each contrast."""
    models = {model["name"]: model for model in report["models"]}
    result = [_against_guessing(report["models"])]
    for comparison in report["comparisons"]:
        sparse, dense = models[comparison["sparse"]], models[comparison["dense"]]
        matched = f"At equal {MATCHED[comparison['matched_by']]}"
        result += [
            f"{matched}, {_contrast(skill, sparse, dense, comparison['scores'][skill]['difference'])}"
            for skill in ("knowledge", "comprehension")
        ]
        result.append(_ratio(comparison))
    return result


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


def _against_guessing(models: list[Mapping[str, Any]]) -> str:
    weak = [
        f"{model['name']} on {skill} (p = {p:.2g})"
        for model in models
        for skill in ("knowledge", "comprehension")
        if (p := model["scores"][skill]["p_value"]) is not None and p > SIGNIFICANCE
    ]
    if weak:
        return f"Not clearly better than guessing: {', '.join(weak)}; contrasts there mean little."
    tested = any(model["scores"][skill]["p_value"] is not None for model in models for skill in model["scores"])
    if not tested:
        return "No task here has a known guess rate, so no score was tested against guessing."
    return f"Every model beats guessing on knowledge and on comprehension (exact test, p < {SIGNIFICANCE})."


def _contrast(skill: str, sparse: Mapping[str, Any], dense: Mapping[str, Any], difference: Mapping[str, float]) -> str:
    scores = [percent(model["scores"][skill]["value"]) for model in (sparse, dense)]
    items = sparse["scores"][skill]["items"]
    text = (
        f"{sparse['name']} answers {scores[0]} and {dense['name']} {scores[1]} of {items:,} {skill} items: "
        f"{points(difference['value'])} points (95% interval {interval(difference)})"
    )
    if tells_apart(difference):
        return f"{text}."
    return f"{text}, which these items cannot tell from no difference."


def _ratio(comparison: Mapping[str, Any]) -> str:
    pair = f"{comparison['sparse']} over {comparison['dense']}"
    subject = f"Relative gain on knowledge ÷ relative gain on comprehension, {pair}"
    ratio = comparison["gain_ratio"]
    if ratio is None:
        gains = [comparison["scores"][skill]["relative_gain"] for skill in ("knowledge", "comprehension")]
        reason = (
            "the dense model may score zero" if None in gains else "the gain on comprehension cannot be told from zero"
        )
        return f"{subject}: not determined, because {reason}."
    values = [f"{ratio[key]:.1f}".replace("-", "−") for key in ("value", "low", "high")]
    return f"{subject}: {values[0]} (95% interval {values[1]} to {values[2]})."
