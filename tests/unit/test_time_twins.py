"""A twin by time is timed once; the study's directory keeps what was found and what was timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from zoo.config import ModelConfig
from zoo.config_reading import from_dict
from zoo.harness.match import measure
from zoo.harness.match_time import Timing
from zoo.harness.study import Study, pairs, resolve_models
from zoo.harness.time_twins import TimeTwins

STUDY = from_dict(
    Study,
    {
        "name": "s",
        "data": {"facts": {}, "vocab_size": 512},
        "training": {"steps": 1, "batch_size": 4, "sequence_length": 64},
        "models": [
            {"name": "sparse", "base": "mixtral-tiny"},
            {"name": "dense", "twin": {"of": "sparse", "by": "time"}},
        ],
        "tasks": {"knowledge": ["facts_knowledge"], "comprehension": ["facts_boolq"]},
    },
    "study",
)


def twice_as_slow(sparse: ModelConfig, dense: ModelConfig) -> Timing:
    """A machine on which a sparse model's FLOPs take twice as long as a dense one's."""
    ratio = measure(dense, "flops", 64) / (2 * measure(sparse, "flops", 64))
    return Timing(1.0, ratio, ratio, ratio, ratio, 9)


def never(sparse: ModelConfig, dense: ModelConfig) -> Timing:
    raise AssertionError("timed again")


def test_a_twin_by_time_is_timed_once_and_recorded(tmp_path: Path) -> None:
    said: list[str] = []
    models = resolve_models(STUDY, 512, TimeTwins(STUDY, tmp_path, 1, said.append, twice_as_slow))
    sparse, dense = (measure(model.spec.model, "flops", 64) for model in models)
    assert dense == pytest.approx(2 * sparse, rel=0.01) and said == ["timing training steps of sparse and its twin"]
    assert [(pair.first, pair.second, pair.matched_by) for pair in pairs(STUDY, models)] == [
        ("sparse", "dense", "time")
    ]
    record = json.loads((tmp_path / "twins" / "sparse-time.json").read_text(encoding="utf-8"))
    assert (record["batch_size"], record["sequence_length"], record["threads"], record["device"]) == (4, 64, 1, "cpu")
    assert record["timing"]["ratio"] == pytest.approx(1, abs=0.01)
    again = resolve_models(STUDY, 512, TimeTwins(STUDY, tmp_path, 1, said.append, never))
    assert again == models and len(said) == 1


def test_the_recorded_twin_of_another_model_is_refused(tmp_path: Path) -> None:
    resolve_models(STUDY, 512, TimeTwins(STUDY, tmp_path, 1, print, twice_as_slow))
    (spec, *_) = (model.spec for model in resolve_models(STUDY, 512))
    other = replace(spec, model=replace(spec.model, num_layers=2))
    with pytest.raises(ValueError, match=r"sparse-time.json: the twin of another model than 'sparse'"):
        TimeTwins(STUDY, tmp_path, 1, print, never)(other)


def test_without_timing_a_twin_equal_in_flops_stands_in() -> None:
    sparse, dense = (measure(model.spec.model, "flops", 64) for model in resolve_models(STUDY, 512))
    assert dense == pytest.approx(sparse, rel=0.01)
