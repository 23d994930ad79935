"""Intervals, paired differences and tests against values worked out by hand and by scipy."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy import stats

from zoo.harness.statistics import align, bootstrap, chance_p_value, gain_ratio


def zeros_and_ones(right: int, wrong: int) -> np.ndarray:
    return np.array([1.0] * right + [0.0] * wrong)


def table(*models: np.ndarray) -> np.ndarray:
    return np.stack(models, axis=1)


def test_mean_weighs_tasks_equally_whatever_their_number_of_items() -> None:
    boot = bootstrap([table(zeros_and_ones(10, 10)), table(zeros_and_ones(3, 1))], resamples=200)
    assert boot.score(0).value == pytest.approx((0.5 + 0.75) / 2)


def test_interval_agrees_with_scipys_percentile_bootstrap() -> None:
    scores = zeros_and_ones(70, 130)
    ours = bootstrap([table(scores)]).score(0)
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.006)
    assert ours.high == pytest.approx(theirs.high, abs=0.006)


def test_interval_holds_the_true_rate_about_95_times_in_100() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for repetition in range(200):
        estimate = bootstrap([table(draw.binomial(1, 0.3, size=150).astype(float))], 1000, seed=repetition).score(0)
        covered += not estimate.excludes(0.3)
    assert 180 <= covered <= 199


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    """The second model is right wherever the first is, and on five items more: paired, that is certain."""
    first, second = zeros_and_ones(50, 50), zeros_and_ones(55, 45)
    paired = bootstrap([table(second, first)]).difference(0, 1)
    unpaired = bootstrap([table(second, np.random.default_rng(0).permutation(first))]).difference(0, 1)
    assert paired.value == unpaired.value == pytest.approx(0.05)
    assert paired.low > 0 and unpaired.low < 0


def test_equal_models_do_not_differ() -> None:
    scores = zeros_and_ones(30, 20)
    difference = bootstrap([table(scores, scores)]).difference(0, 1)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_relative_gain_and_ratio_by_hand() -> None:
    knowledge = bootstrap([table(zeros_and_ones(600, 400), zeros_and_ones(400, 600))])
    comprehension = bootstrap([table(zeros_and_ones(880, 120), zeros_and_ones(800, 200))], seed=1)
    gain = knowledge.relative_gain(0, 1)
    assert gain is not None and gain.value == pytest.approx(0.5)
    ratio = gain_ratio(knowledge, comprehension, 0, 1)
    assert ratio is not None
    assert ratio.value == pytest.approx(0.5 / 0.1)
    assert ratio.low < 5 < ratio.high


def test_ratio_is_not_given_where_comprehension_does_not_differ() -> None:
    knowledge = bootstrap([table(zeros_and_ones(60, 40), zeros_and_ones(40, 60))])
    comprehension = bootstrap([table(zeros_and_ones(80, 20), np.roll(zeros_and_ones(80, 20), 7))])
    assert gain_ratio(knowledge, comprehension, 0, 1) is None


def test_relative_gain_over_nothing_is_not_given() -> None:
    assert bootstrap([table(zeros_and_ones(5, 5), zeros_and_ones(0, 10))]).relative_gain(0, 1) is None


@pytest.mark.parametrize(("correct", "items", "chance"), [(0, 10, 0.5), (8, 10, 0.5), (10, 10, 0.5), (3, 40, 0.06)])
def test_chance_test_is_the_exact_binomial_tail(correct: int, items: int, chance: float) -> None:
    p = Fraction(chance)
    by_hand = sum(comb(items, k) * p**k * (1 - p) ** (items - k) for k in range(correct, items + 1))
    assert chance_p_value(correct, items, chance) == pytest.approx(float(by_hand))
    assert chance_p_value(correct, items, chance) == pytest.approx(
        stats.binomtest(correct, items, chance, alternative="greater").pvalue
    )


@pytest.mark.parametrize(("correct", "items", "chance"), [(11, 10, 0.5), (-1, 10, 0.5), (1, 10, 1.5)])
def test_chance_test_refuses_impossible_counts(correct: int, items: int, chance: float) -> None:
    with pytest.raises(ValueError, match=r"correct|chance"):
        chance_p_value(correct, items, chance)


def test_items_are_aligned_by_key_and_must_be_the_same() -> None:
    assert align([{"b": 1.0, "a": 0.0}, {"a": 1.0, "b": 0.0}]).tolist() == [[0.0, 1.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match="other items"):
        align([{"a": 1.0}, {"b": 1.0}])


def test_bootstrap_needs_items_and_the_same_models_everywhere() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])
    with pytest.raises(ValueError, match="same models"):
        bootstrap([np.zeros((3, 1)), np.zeros((3, 2))])
