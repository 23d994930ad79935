"""Exact tests against textbooks, fractions and scipy."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy import stats

from zoo.harness.significance import chance_p_value, combine, holm, mcnemar_p_value


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


def discordant(only_first: int, only_second: int, both: int = 7) -> tuple[np.ndarray, np.ndarray]:
    first = [1.0] * only_first + [0.0] * only_second + [1.0] * both + [0.0] * 3
    second = [0.0] * only_first + [1.0] * only_second + [1.0] * both + [0.0] * 3
    return np.array(first), np.array(second)


@pytest.mark.parametrize(("only_first", "only_second"), [(150, 86), (0, 6), (1, 7), (5, 5)])
def test_mcnemar_is_the_two_sided_tail_of_a_fair_coin(only_first: int, only_second: int) -> None:
    """(150, 86): the approval ratings of Agresti (2002), table 10.1."""
    number, fewer = only_first + only_second, min(only_first, only_second)
    by_hand = min(Fraction(1), Fraction(2 * sum(comb(number, k) for k in range(fewer + 1)), 2**number))
    assert mcnemar_p_value(*discordant(only_first, only_second)) == pytest.approx(float(by_hand))


def test_mcnemar_of_agrestis_table_is_near_its_chi_square() -> None:
    statistic = (86 - 150) ** 2 / (86 + 150)
    assert statistic == pytest.approx(17.36, abs=0.005)  # as printed
    p = mcnemar_p_value(*discordant(150, 86))
    assert p == pytest.approx(stats.chi2.sf(statistic, 1), rel=0.3) and p < 1e-4


def test_mcnemar_depends_on_the_discordant_items_alone_and_takes_only_right_and_wrong() -> None:
    assert mcnemar_p_value(*discordant(2, 9, both=0)) == mcnemar_p_value(*discordant(2, 9, both=500))
    assert mcnemar_p_value(*discordant(0, 0)) == 1.0
    with pytest.raises(ValueError, match="a 0 or a 1"):
        mcnemar_p_value(np.array([0.5, 1.0]), np.array([1.0, 1.0]))


def test_holm_agrees_with_rs_p_adjust() -> None:
    """``p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")`` is 0.03 0.06 0.06 0.02."""
    p_values = dict(zip("abcd", (0.01, 0.04, 0.03, 0.005), strict=True))
    assert holm(p_values) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.8, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_p_values_of_seeds_combine_to_about_twice_their_median() -> None:
    assert combine([0.03]) == 0.03
    assert combine([0.01, 0.5]) == pytest.approx(0.02)
    assert combine([0.9, 0.02, 0.001]) == pytest.approx(0.03)
    assert combine([0.9, 0.9, 0.9]) == 1.0
    with pytest.raises(ValueError, match="at least one"):
        combine([])
