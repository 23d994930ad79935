"""From measures of arms, seed by seed, to contrasts with intervals and to a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from zoo.claims.claim import Claim, Expectation, Verdict
from zoo.harness.statistics import Estimate, seed_interval

Measures = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Arm → seed → measure → value."""

Outcome = Literal["seen", "refuted", "open"]


@dataclass(frozen=True)
class Finding:
    """An expectation beside what was measured."""

    expectation: Expectation
    by_seed: tuple[float, ...]
    """The contrast of each seed, in the claim's order."""
    estimate: Estimate
    """Their mean with its 95% interval (Student's t over seeds)."""
    outcome: Outcome


def find(expectation: Expectation, measures: Measures, seeds: Sequence[int]) -> Finding:
    """The contrast of an expectation, paired by seed: arms of one seed saw the same tokens in the same order.

    A contrast is *seen* where its whole interval is on the expected side, *refuted* where all of it is on the other.

    Raises:
        ValueError: a measure that is not there, or whose logarithm does not exist.
    """
    by_seed = tuple(
        sum(weight * _value(measures, arm, seed, expectation) for arm, weight in expectation.contrast.items())
        for seed in seeds
    )
    estimate = seed_interval(by_seed)
    return Finding(expectation, by_seed, estimate, _outcome(expectation, estimate))


def _value(measures: Measures, arm: str, seed: int, expectation: Expectation) -> float:
    name = expectation.measure
    value = measures[arm][seed].get(name)
    if value is None:
        raise ValueError(f"arm {arm!r}, seed {seed}: it has no {name}; name a measure that such a model has")
    if not expectation.log:
        return value
    if value <= 0:
        raise ValueError(f"arm {arm!r}, seed {seed}: {name} = {value} has no logarithm; leave out log")
    return math.log(value)


def _outcome(expectation: Expectation, estimate: Estimate) -> Outcome:
    low, high = estimate.low, estimate.high
    if not (math.isfinite(low) and math.isfinite(high)):
        return "open"
    # Nothing that differs is no evidence for a difference of at least nothing.
    if expectation.at_least is not None:
        seen, refuted = low > expectation.at_least, high < expectation.at_least
    elif expectation.at_most is not None:
        seen, refuted = high < expectation.at_most, low > expectation.at_most
    else:
        assert expectation.within is not None
        seen = -expectation.within <= low and high <= expectation.within
        refuted = low > expectation.within or high < -expectation.within
    return "seen" if seen else "refuted" if refuted else "open"


def judge(claim: Claim, measures: Measures) -> tuple[Verdict, list[Finding], list[Finding]]:
    """The verdict, the findings that it rests on, and those on what had to be given.

    A claim *holds here* where all that it expects is seen, and *does not* where any of it is refuted. Otherwise, and
    where the experiment's own conditions are not seen to be met, it is not decidable at this size.
    """
    given = [find(expectation, measures, claim.seeds) for expectation in claim.given]
    found = [find(expectation, measures, claim.seeds) for expectation in claim.expect]
    if any(finding.outcome != "seen" for finding in given):
        return "not decidable at this size", found, given
    if any(finding.outcome == "refuted" for finding in found):
        return "does not hold here", found, given
    if all(finding.outcome == "seen" for finding in found):
        return "holds here", found, given
    return "not decidable at this size", found, given
