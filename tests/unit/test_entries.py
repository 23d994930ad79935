"""Sweeps, sparse variants and shared twins of a study become the models and pairs that they mean."""

from __future__ import annotations

from typing import Any

import pytest

from zoo.accounting import count_parameters
from zoo.config_reading import from_dict, to_dict
from zoo.harness.entries import EntryConfig, Model
from zoo.harness.study import Study, pairs, resolve_models

DENSE = {"name": "dense", "base": "llama-tiny", "sweep": {"width": [64, 128, 256]}}
MOE = {"name": "moe", "variant": {"of": "dense-64"}, "sweep": {"experts": [1, 4, 8], "granularity": [1, 4]}}


def study(*models: dict[str, Any], **more: Any) -> Study:
    content = {
        "name": "s",
        "data": {"facts": {}, "vocab_size": 512},
        "training": {"steps": 1, "batch_size": 1, "sequence_length": 8},
        "models": list(models),
        "tasks": {"knowledge": ["facts_knowledge"], "comprehension": ["facts_boolq"]},
    }
    return from_dict(Study, content | more, "study")


def resolved(of: Study) -> dict[str, Model]:
    return {model.name: model for model in resolve_models(of, 512)}


def test_a_sweep_is_a_model_for_each_combination_under_a_readable_name() -> None:
    models = resolved(study(DENSE, MOE))
    assert list(models) == ["dense-64", "dense-128", "dense-256", "moe-4", "moe-4-g4", "moe-8", "moe-8-g4"]
    moe = models["moe-8-g4"].spec.model.moe
    assert moe is not None and (moe.num_experts, moe.top_k) == (32, 8)
    active = count_parameters(models["dense-64"].spec.model).active
    totals = []
    for name in ("dense-64", "moe-4", "moe-8"):
        parameters = count_parameters(models[name].spec.model)
        assert parameters.active == pytest.approx(active, rel=0.01)
        totals.append(parameters.total)
    assert totals == sorted(totals) and totals[-1] > 1.2 * totals[0]


def test_one_expert_is_the_dense_model_which_starts_the_series() -> None:
    series = {s.name: (s.dial, dict(s.models)) for s in study(DENSE, MOE).series}
    assert series == {
        "dense": ("width", {64: "dense-64", 128: "dense-128", 256: "dense-256"}),
        "moe": ("experts", {1: "dense-64", 4: "moe-4", 8: "moe-8"}),
        "moe-g4": ("experts", {1: "dense-64", 4: "moe-4-g4", 8: "moe-8-g4"}),
    }


def test_a_width_scales_ffn_and_heads_and_keeps_depth_and_head_size() -> None:
    models = {name: model.spec.model for name, model in resolved(study(DENSE)).items()}
    small, base, large = (models[f"dense-{width}"] for width in (64, 128, 256))
    for config, factor in ((small, 0.5), (large, 2)):
        assert config.attention is not None and base.attention is not None
        assert config.intermediate_size == factor * base.intermediate_size
        assert config.attention.num_heads == factor * base.attention.num_heads
        assert config.attention.num_kv_heads == factor * base.attention.num_kv_heads
        assert (config.attention.head_dim, config.num_layers) == (base.attention.head_dim, base.num_layers)


def test_by_default_sparse_models_are_compared_with_their_twins_and_variants_with_their_origin() -> None:
    total = {"name": "large", "twin": {"of": "moe-8", "by": "total"}}
    of = study({"name": "dense", "base": "llama-tiny"}, MOE | {"variant": {"of": "dense"}}, total)
    found = [(pair.first, pair.second, pair.matched_by) for pair in pairs(of, resolve_models(of, 512))]
    assert found == [
        ("moe-8", "large", "total"),
        *((name, "dense", "active") for name in ("moe-4", "moe-4-g4", "moe-8", "moe-8-g4")),
    ]


def test_any_two_models_can_be_compared_and_what_they_share_is_found() -> None:
    of = study(DENSE, MOE, compare=[["moe-8", "dense-256"], ["moe-8-g4", "moe-8"]])
    found = [(pair.first, pair.second, pair.matched_by) for pair in pairs(of, resolve_models(of, 512))]
    assert found == [("moe-8", "dense-256", None), ("moe-8-g4", "moe-8", "active")]


def test_a_twin_of_several_models_must_be_as_large_as_each() -> None:
    dense = {"name": "dense", "base": "llama-tiny"}
    moe = {"name": "moe", "variant": {"of": "dense", "experts": 8}, "sweep": {"granularity": [1, 4]}}
    shared = {"name": "twin", "twin": {"of": ["moe", "moe-g4"], "by": "active"}}
    of = study(dense, moe, shared)
    assert [(p.first, p.second) for p in pairs(of, resolve_models(of, 512))][:2] == [
        ("moe", "twin"),
        ("moe-g4", "twin"),
    ]
    larger = {"name": "larger", "base": "mixtral-tiny", "overrides": {"num_layers": 8}}
    wrong = study(dense, moe, larger, shared | {"twin": {"of": ["moe", "larger"], "by": "active"}})
    with pytest.raises(ValueError, match=r"model 'twin': its active parameters .* are not those of 'larger'"):
        resolve_models(wrong, 512)


def test_entries_are_written_as_they_were_read() -> None:
    for content in (DENSE, MOE):
        entry = from_dict(EntryConfig, content, "entry")
        assert from_dict(EntryConfig, to_dict(entry), "entry") == entry


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([{"name": "a", "base": "llama-tiny", "twin": {"of": "b", "by": "total"}}], "exactly one of base, variant and"),
        ([{"name": "a", "base": "llama-tiny", "sweep": {"experts": [4]}}], "sweep over 'experts'; use width"),
        ([{"name": "a", "base": "llama-tiny", "sweep": {"width": [8, 8]}}], "give each value once"),
        ([DENSE, {"name": "m", "variant": {"of": "dense-64"}}], "give experts once, in its variant or in its sweep"),
        ([DENSE, {"name": "m", "variant": {"of": "dense-64", "experts": 1}}], "is the dense model 'dense-64' itself"),
        ([DENSE, {"name": "m", "variant": {"of": "dense", "experts": 4}}], "variant of 'dense', which is not among"),
        ([DENSE, {"name": "dense-64", "base": "llama-tiny"}], "give each once"),
        ([{"name": "a", "twin": {"of": ["b", "c"], "by": "time"}}], "a twin by time has one model"),
    ],
)
def test_mistakes_in_entries_are_named(models: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(*models)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([{"name": "a", "base": "llama-tiny", "width": 100}], "model 'a': width = 100: of 4 at hidden_size = 128"),
        (
            [DENSE, {"name": "m", "variant": {"of": "dense-64", "experts": 2}}],
            "'m': experts = 2: with active = 2",
        ),
        ([{"name": "a", "variant": {"of": "a", "experts": 4}}], "it is made from itself, by way of a"),
    ],
)
def test_models_that_cannot_be_are_named(models: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_models(study(*models), 512)


@pytest.mark.parametrize(
    ("compare", "message"),
    [([["dense-64"]], "is no pair"), ([["dense-64", "dense-32"]], "compare: 'dense-32' is not among the models")],
)
def test_pairs_that_cannot_be_are_named(compare: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(DENSE, compare=compare)
