"""What is read from an evaluation, and the tests and intervals that a study's scores become."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoo.harness.compare import Run, fit_config
from zoo.harness.measure import guess_rate, item_scores
from zoo.harness.study import TrainingConfig, load_study, resolve_models
from zoo.harness.summary import mcnemar, not_ranked, skill_scores, task_scores

SKILLS = {"knowledge": ["trivia"], "comprehension": ["boolq", "copa"]}
GUESSES = {"trivia": 0.05, "boolq": 0.6, "copa": 0.5}


def right(items: int, *correct: int) -> np.ndarray:
    """Scores [S, N] with so many right answers for each seed."""
    return np.array([[1.0] * c + [0.0] * (items - c) for c in correct])


def results(
    targets: list[Any], choices: int, output_type: str = "multiple_choice", **scores: list[Any]
) -> dict[str, Any]:
    samples = [
        {"doc_id": i, "doc_hash": f"h{i}", "target": target, "filtered_resps": [(0.0, False)] * choices}
        | {name: values[i] for name, values in scores.items()}
        for i, target in enumerate(targets)
    ]
    config = {"output_type": output_type, "metric_list": [{"metric": name} for name in scores]}
    return {"samples": {"task": samples}, "configs": {"task": config, "group": config}}


def test_guessing_is_the_better_of_chance_and_one_constant_answer() -> None:
    assert guess_rate(results([0, 1, 1, 1], choices=2), "task") == 0.75
    assert guess_rate(results([0, 1, 2, 3], choices=4), "task") == 0.25
    assert guess_rate(results([0, 1, 2, 3, 4, 5], choices=3), "task") == pytest.approx(1 / 3)
    assert guess_rate(results(["Paris", "Paris", "Rome", "Oslo"], 1, "generate_until"), "task") == 0.5


def test_items_are_scored_by_the_first_metric_and_named_by_number_and_hash() -> None:
    assert item_scores(results([0, 1], 2, acc=[1.0, 0.0], f1=[0.3, 0.2]), "task") == {"0/h0": 1.0, "1/h1": 0.0}
    with pytest.raises(ValueError, match="'f1', has no score for each item"):
        item_scores(results([0], 2, f1=[(0, 1)]), "task")
    with pytest.raises(ValueError, match="task 'group': it has no items"):
        item_scores(results([0], 2, acc=[1.0]), "group")


def test_a_task_is_at_chance_unless_every_seed_beats_guessing_after_holm() -> None:
    scores = {"trivia": right(100, 30, 35), "boolq": right(100, 90, 62), "copa": right(100, 80, 75)}
    found = task_scores(scores, GUESSES)
    assert {task: found[task]["at_chance"] for task in scores} == {"trivia": False, "boolq": True, "copa": False}
    assert found["boolq"]["p_value"] == found["boolq"]["p_holm"] > 0.3, "the worse seed counts; Holm leaves the last"
    skills = skill_scores(scores, SKILLS, GUESSES)
    assert skills["comprehension"]["value"] == pytest.approx((0.76 + 0.775) / 2)
    assert skills["comprehension"]["guess"] == pytest.approx(0.55) and skills["comprehension"]["items"] == 200


def test_a_task_is_left_out_where_no_model_is_above_chance() -> None:
    weak, strong = ({"trivia": right(100, 4), "boolq": right(100, n), "copa": right(100, 80)} for n in (50, 90))
    by_task = {name: task_scores(scores, GUESSES) for name, scores in {"weak": weak, "strong": strong}.items()}
    assert not_ranked(by_task) == ["trivia"]
    assert not_ranked({"weak": by_task["weak"]}) == ["trivia", "boolq"]
    untested = task_scores({"f1": right(100, 50) * 0.5}, {"f1": 0.9})
    assert not_ranked({"any": untested}) == [], "what cannot be tested is not said to be at chance"


def test_scores_that_are_not_right_or_wrong_are_not_tested() -> None:
    scores = {"trivia": right(100, 30), "boolq": right(100, 90) * 0.5, "copa": right(100, 80)}
    found = task_scores(scores, GUESSES)
    assert found["boolq"]["p_value"] is None and found["boolq"]["at_chance"] is None
    assert skill_scores(scores, SKILLS, GUESSES)["comprehension"]["p_value"] is None and found["copa"]["p_holm"] < 1e-6
    assert list(mcnemar({task: (table, table) for task, table in scores.items()})) == ["trivia", "copa"]


def test_mcnemar_is_corrected_over_the_tasks() -> None:
    pairs = {"a": (right(20, 8), right(20, 0)), "b": (right(20, 6), right(20, 0)), "c": (right(20, 5), right(20, 5))}
    found = mcnemar(pairs)
    p = pytest.approx(2 / 256)
    assert found["a"] == {"by_seed": [p], "p_value": p, "p_holm": pytest.approx(6 / 256)}
    assert found["b"]["p_holm"] == pytest.approx(2 * 2 / 64) and found["c"]["p_holm"] == 1


def test_checkpoints_are_spread_evenly_and_end_with_the_training() -> None:
    budget = {"batch_size": 2, "sequence_length": 8}
    assert TrainingConfig(steps=100, checkpoints=4, **budget).evaluated_steps == (25, 50, 75, 100)
    assert TrainingConfig(steps=7, checkpoints=7, **budget).evaluated_steps == (1, 2, 3, 4, 5, 6, 7)
    assert TrainingConfig(steps=7, **budget).evaluated_steps == (7,)
    with pytest.raises(ValueError, match="checkpoints = 8: give at most one"):
        TrainingConfig(steps=7, checkpoints=8, **budget)


def test_a_study_with_checkpoints_trains_as_one_without_but_for_the_callback(repository: Path) -> None:
    study = load_study(repository / "configs" / "studies" / "quickstart.yaml")
    run = Run(resolve_models(study, 1000)[0], 0, Path("out"))
    plain = fit_config(study, run, Path("data"))
    kept = fit_config(replace(study, training=replace(study.training, checkpoints=4)), run, Path("data"))
    (callback,) = kept["trainer"].pop("callbacks")
    assert callback["init_args"] == {"steps": [200, 400, 600, 800]}
    assert kept == plain
