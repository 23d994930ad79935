"""What a report may say in words: sentences made from its numbers, which never rank what the data cannot tell apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SIGNIFICANCE = 0.001
"""Largest p-value that counts as clearly better than guessing."""

MATCHED = {"active": "active parameters", "total": "total parameters", "flops": "training FLOPs"}


def sentences(report: Mapping[str, Any]) -> list[str]:
    """The report in a few sentences: first whether the models learnt anything, then each contrast.

    Nothing here depends on a clock: the view at equal time is in the report's table.
    """
    models = {model["name"]: model for model in report["models"]}
    drawn = "items and seeds" if len(report["seeds"]) > 1 else "items"
    result = [_against_guessing(report["models"])]
    for comparison in report["comparisons"]:
        sparse, dense = models[comparison["sparse"]], models[comparison["dense"]]
        matched = f"At equal {MATCHED[comparison['matched_by']]}"
        result += [
            f"{matched}, {_contrast(skill, sparse, dense, comparison['views']['tokens']['scores'][skill], drawn)}"
            for skill in ("knowledge", "comprehension")
        ]
        result.append(_ratio(comparison))
        if "loss" in comparison["views"]:
            result.append(_at_equal_perplexity(comparison, drawn))
        if comparison["at_chance"]:
            pair = f"{comparison['sparse']} and {comparison['dense']}"
            result.append(f"Of {pair}, neither is above chance on {', '.join(comparison['at_chance'])}: not ranked.")
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


def _contrast(
    skill: str, sparse: Mapping[str, Any], dense: Mapping[str, Any], score: Mapping[str, Any], drawn: str
) -> str:
    values = [percent(value) for value in score["values"]]
    items = sparse["scores"][skill]["items"]
    return (
        f"{sparse['name']} answers {values[0]} and {dense['name']} {values[1]} of {items:,} {skill} items: "
        f"{_difference(score['difference'], drawn)}."
    )


def _difference(difference: Mapping[str, float], drawn: str) -> str:
    text = f"{points(difference['value'])} points (95% interval {interval(difference)})"
    return text if tells_apart(difference) else f"{text}, which these {drawn} cannot tell from no difference"


def _at_equal_perplexity(comparison: Mapping[str, Any], drawn: str) -> str:
    view = comparison["views"]["loss"]
    subject = f"At equal perplexity ({math.exp(view['at']):.2f}), {comparison['sparse']} over {comparison['dense']}"
    if view["scores"] is None:
        return f"{subject}: not determined, because one of the two was better than that at its first checkpoint."
    parts = [
        f"{skill} {_difference(view['scores'][skill]['difference'], drawn)}" for skill in ("knowledge", "comprehension")
    ]
    return f"{subject}: {'; '.join(parts)}; ratio of relative gains {_value(view)}."


def _ratio(comparison: Mapping[str, Any]) -> str:
    pair = f"{comparison['sparse']} over {comparison['dense']}"
    return (
        f"Relative gain on knowledge ÷ relative gain on comprehension, {pair}: {_value(comparison['views']['tokens'])}."
    )


def _value(view: Mapping[str, Any]) -> str:
    """The ratio of a view with its interval, or why there is none."""
    ratio = view["gain_ratio"]
    if ratio is None:
        gains = [view["scores"][skill]["relative_gain"] for skill in ("knowledge", "comprehension")]
        reason = (
            "the dense model may score zero" if None in gains else "the gain on comprehension cannot be told from zero"
        )
        return f"not determined, because {reason}"
    return ratio_text(ratio)


def ratio_text(ratio: Mapping[str, float]) -> str:
    """A ratio with its interval."""
    value, low, high = (f"{ratio[key]:.1f}".replace("-", "−") for key in ("value", "low", "high"))
    return f"{value} (95% interval {low} to {high})"
