"""Scores read off at a matched loss, number of tokens, compute or time, against interpolation by hand."""

from __future__ import annotations

import numpy as np
import pytest

from zoo.harness.views import Points, contrast, matched_point, read_off

SKILLS = {"knowledge": ["trivia"], "comprehension": ["boolq"]}


def points(loss: list[list[float]], scores: list[list[float]], flops: float = 1.0, items: int = 8) -> Points:
    """``loss`` and mean ``scores`` by seed and checkpoint, after 10, 20, … tokens; every item scores the mean."""
    seeds, checkpoints = np.shape(loss)
    tokens = np.tile(10.0 * np.arange(1, checkpoints + 1), (seeds, 1))
    table = np.repeat(np.array(scores)[:, None, :], items, axis=1)
    return Points(
        {"tokens": tokens, "loss": np.array(loss), "flops": flops * tokens}, {"trivia": table, "boolq": table}
    )


def test_scores_are_interpolated_between_the_checkpoints_around_the_point() -> None:
    model = points([[3.0, 2.0, 1.0], [3.5, 2.5, 1.5]], [[0.2, 0.4, 0.8], [0.1, 0.3, 0.5]])
    scores = read_off(model, "loss", 1.75)
    assert scores is not None
    np.testing.assert_allclose(scores["trivia"][:, 0], [0.4 + 0.25 * 0.4, 0.3 + 0.75 * 0.2])
    exact = read_off(model, "tokens", 20.0)
    assert exact is not None and exact["boolq"][:, 0].tolist() == [0.4, 0.3]


def test_of_a_loss_that_rises_again_its_first_passing_counts() -> None:
    model = points([[3.0, 1.0, 2.0, 1.5]], [[0.0, 0.6, 0.1, 0.2]])
    scores = read_off(model, "loss", 1.5)
    assert scores is not None and scores["trivia"][0, 0] == pytest.approx(0.45)


def test_nothing_is_extrapolated() -> None:
    model = points([[2.0, 1.0]], [[0.5, 0.6]])
    assert read_off(model, "loss", 2.5) is None and read_off(model, "tokens", 5.0) is None
    with pytest.raises(ValueError, match="not reached by any"):
        read_off(model, "loss", 0.5)
    early = points([[5.0, 2.5]], [[0.1, 0.2]])
    assert contrast(model, early, "loss", SKILLS) == {"at": 2.5, "scores": None, "gain_ratio": None}


def test_matched_point_is_the_furthest_that_every_seed_of_both_reaches() -> None:
    first = points([[3.0, 1.0], [3.0, 1.2]], [[0.0, 0.0]] * 2)
    second = points([[3.0, 0.8], [3.0, 1.1]], [[0.0, 0.0]] * 2, flops=3.0)
    assert matched_point(first, second, "loss") == 1.2
    assert matched_point(first, second, "flops") == 20.0


def test_one_pair_of_runs_looks_different_at_equal_tokens_and_at_equal_loss() -> None:
    """The first model is ahead throughout in tokens, and both know equally much at any loss."""
    loss = np.linspace(3, 1, 5)
    first, second = (
        points([loss.tolist()], [(1 - loss / 4).tolist()]),
        points([(loss + 0.2).tolist()], [(1 - (loss + 0.2) / 4).tolist()]),
    )
    tokens, matched = (contrast(first, second, axis, SKILLS)["scores"]["trivia"] for axis in ("tokens", "loss"))
    assert tokens["difference"]["value"] == pytest.approx(0.05) and tokens["difference"]["low"] > 0
    assert matched["values"] == pytest.approx([0.7, 0.7])


def test_the_bootstrap_carries_through_to_the_interpolated_scores() -> None:
    """Halfway between two checkpoints an item counts half of each; its interval is that of those half scores."""
    draw = np.random.default_rng(0)
    table = draw.binomial(1, 0.5, size=(1, 400, 2)).astype(float)
    axes = {"loss": np.array([[2.0, 1.0]])}
    halfway = Points(axes, {"trivia": table, "boolq": table})
    floor = Points({"loss": np.array([[2.0, 1.5]])}, {"trivia": 0 * table, "boolq": 0 * table})
    found = contrast(halfway, floor, "loss", SKILLS)["scores"]["trivia"]["difference"]
    half = table[0].mean(axis=1)
    assert found["value"] == pytest.approx(half.mean())
    error = half.std(ddof=1) / 20
    assert (found["low"], found["high"]) == pytest.approx(
        (half.mean() - 1.96 * error, half.mean() + 1.96 * error), abs=0.004
    )
