"""Intervals, paired differences and tests against values worked out by hand and by scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from zoo.harness.statistics import align, bootstrap, gain_ratio, quotient


def zeros_and_ones(right: int, wrong: int) -> np.ndarray:
    return np.array([1.0] * right + [0.0] * wrong)


def table(*models: np.ndarray) -> np.ndarray:
    """Scores [1, N, M] of one seed."""
    return np.stack(models, axis=1)[None]


def test_mean_weighs_tasks_equally_whatever_their_number_of_items() -> None:
    boot = bootstrap([table(zeros_and_ones(10, 10)), table(zeros_and_ones(3, 1))], resamples=200)
    assert boot.score(0).value == pytest.approx((0.5 + 0.75) / 2)


def test_interval_agrees_with_scipys_percentile_bootstrap() -> None:
    scores = zeros_and_ones(70, 130)
    ours = bootstrap([table(scores)]).score(0)
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.006)
    assert ours.high == pytest.approx(theirs.high, abs=0.006)


def test_interval_over_seeds_alone_is_students() -> None:
    """Models that are right on all items or none: only the seeds vary. With 3 of them t(2) = 4.303."""
    differences = np.array([0.1, 0.2, 0.6])
    seeds = np.stack([np.full((3, 40), 0.0) + differences[:, None], np.zeros((3, 40))], axis=2)
    ours = bootstrap([seeds]).difference(0, 1)
    theirs = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert ours.value == pytest.approx(0.3)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_interval_over_seeds_and_items_has_the_variance_of_crossed_effects() -> None:
    """Against the moment estimates of Searle, Casella and McCulloch, from an analysis of variance written out."""
    draw = np.random.default_rng(0)
    seeds, items = 40, 300  # so many seeds that t is normal
    scores = (
        0.02 * draw.normal(size=(seeds, 1)) + 0.3 * draw.normal(size=items) + 0.2 * draw.normal(size=(seeds, items))
    )
    by_seed, by_item = scores.mean(axis=1), scores.mean(axis=0)
    error = scores - by_seed[:, None] - by_item + scores.mean()
    squares = items * by_seed.var(ddof=1), seeds * by_item.var(ddof=1), (error**2).sum() / ((seeds - 1) * (items - 1))
    expected = (squares[0] + squares[1] - squares[2]) / (seeds * items)
    assert bootstrap([scores[..., None]]).replicates.var() == pytest.approx(expected, rel=0.1)


def test_seeds_that_are_good_for_both_models_do_not_widen_their_difference() -> None:
    second = np.repeat([[0.1], [0.5], [0.9]], 50, axis=1)
    boot = bootstrap([np.stack([second + 0.1, second], axis=2)])
    assert boot.difference(0, 1).low == pytest.approx(0.1) == boot.difference(0, 1).high
    assert boot.score(0).low == 0 and boot.score(0).high == 1, "three seeds so far apart say little of a fourth"


def test_items_drawn_in_groups_of_equal_scores_are_items_drawn_one_by_one() -> None:
    """Distinct scores make groups of one; equal ones the same distribution."""
    scores = zeros_and_ones(70, 130)
    apart = bootstrap([table(scores + np.arange(200) * 1e-9)]).score(0)
    together = bootstrap([table(scores)]).score(0)
    assert (together.low, together.high) == pytest.approx((apart.low, apart.high), abs=0.006)


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


def test_quotient_is_fiellers_set() -> None:
    """Independent normal numerator and denominator: Fieller (1954) in closed form."""
    draw = np.random.default_rng(0)
    above, below, error = 3.0, 2.0, 0.4
    numerators, denominators = (centre + error * draw.normal(size=400_000) for centre in (above, below))
    ours = quotient(above, numerators, below, denominators)
    z = stats.norm.ppf(0.975)
    g = (z * error / below) ** 2
    half = z * error / below * np.sqrt(1 + (above / below) ** 2 - g)
    assert ours is not None and ours.value == 1.5
    assert (ours.low, ours.high) == pytest.approx(((1.5 - half) / (1 - g), (1.5 + half) / (1 - g)), rel=0.01)
    assert quotient(above, numerators, 0.5, denominators - 1.5) is None, "0.5 ± 0.78 may be zero: unbounded"
    mirrored = quotient(-above, -numerators, -below, -denominators)
    assert mirrored == ours


def test_relative_gain_over_nothing_is_not_given() -> None:
    assert bootstrap([table(zeros_and_ones(5, 5), zeros_and_ones(0, 10))]).relative_gain(0, 1) is None


def test_items_are_aligned_by_key_and_must_be_the_same() -> None:
    assert align([{"b": 1.0, "a": 0.0}, {"a": 1.0, "b": 0.0}]).tolist() == [[0.0, 1.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match="other items"):
        align([{"a": 1.0}, {"b": 1.0}])


def test_bootstrap_needs_items_and_the_same_models_everywhere() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])
    with pytest.raises(ValueError, match="same models"):
        bootstrap([np.zeros((1, 3, 1)), np.zeros((1, 3, 2))])
    with pytest.raises(ValueError, match="same seeds"):
        bootstrap([np.zeros((1, 3, 2)), np.zeros((2, 3, 2))])
