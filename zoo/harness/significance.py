"""Exact tests of accuracy, and how their p-values are put together over seeds and tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import binom, binomtest

from zoo.harness.statistics import Array

SIGNIFICANCE = 0.05
"""Largest p-value, after correction for the number of tasks, at which a task counts as told apart."""


def chance_p_value(correct: int, items: int, chance: float) -> float:
    """Probability of ``correct`` or more right answers to ``items`` by guessing: the exact one-sided binomial test.

    Where items differ in their guess rate, ``chance`` is the mean rate. The test is then conservative for
    counts above the mean (Hoeffding, 1956, theorem 5).

    Raises:
        ValueError: ``chance`` is not a probability, or ``correct`` is not between 0 and ``items``.
    """
    if not 0 <= chance <= 1:
        raise ValueError(f"chance = {chance}: give a probability")
    if not 0 <= correct <= items:
        raise ValueError(f"correct = {correct}: it must lie between 0 and the {items} items")
    return float(binom.sf(correct - 1, items, chance))


def mcnemar_p_value(first: Array, second: Array) -> float:
    """Exact two-sided test that two trained models are right equally often, from the items on which they differ.

    McNemar (1947) in its binomial form: of the items that only one of the two gets right, each has half of them.

    Args:
        first: [N] ones and zeros.
        second: [N], of the same items.

    Raises:
        ValueError: a score is neither 0 nor 1, or the two have different numbers of items.
    """
    if first.shape != second.shape or not (is_accuracy(first) and is_accuracy(second)):
        raise ValueError("scores: McNemar's test takes a 0 or a 1 for each item, the same items for both models")
    only_first, only_second = int((first > second).sum()), int((second > first).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def is_accuracy(scores: Array) -> bool:
    """Whether every score says right or wrong."""
    return bool(np.isin(scores, (0.0, 1.0)).all())


def combine(p_values: Sequence[float]) -> float:
    """One p-value of tests on the same items, one for each seed, however they depend on each other.

    Twice the median or a little less: the k-th smallest of S, times S/k, with k = ⌈S/2⌉ (Rüger, 1978). It tests
    that none of the pairs of trained models differs; that architectures differ is for an interval over seeds to say.

    Raises:
        ValueError: there is none.
    """
    if not p_values:
        raise ValueError("p_values: give at least one")
    rank = math.ceil(len(p_values) / 2)
    return min(1.0, sorted(p_values)[rank - 1] * len(p_values) / rank)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values: those at most α are rejected together, with a chance of at most α that any is wrong.

    Holm (1979), in the step-down form that R's ``p.adjust`` has.
    """
    adjusted = holm_array(np.array(list(p_values.values()), dtype=np.float64))
    return dict(zip(p_values, adjusted.tolist(), strict=True))


def holm_array(p_values: Array) -> Array:
    """``holm`` of p-values in an array of any shape, which are one family."""
    flat = p_values.ravel()
    order = np.argsort(flat, kind="stable")
    adjusted = np.empty_like(flat)
    steps = np.arange(len(flat), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, steps * flat[order]))
    return adjusted.reshape(p_values.shape)
