"""Reading architectures: what is refused, with the value, the place and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from zoo.config import ModelSpec, load_spec, save_spec
from zoo.config_reading import from_dict, load_yaml, to_dict

SPEC: dict[str, Any] = {
    "name": "little",
    "family": "mixtral",
    "model": {
        "vocab_size": 100,
        "hidden_size": 16,
        "num_layers": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "norm_eps": "1e-5",
        "rope": {"theta": 10000},
        "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
        "moe": {
            "num_experts": 4,
            "top_k": 2,
            "moe_intermediate_size": 8,
            "score_func": "softmax",
            "norm_topk_prob": True,
        },
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    tree = OmegaConf.create(SPEC)
    OmegaConf.update(tree, path, value, force_add=True)
    result = OmegaConf.to_container(tree)
    assert isinstance(result, dict)
    return result


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    spec = from_dict(ModelSpec, SPEC)
    assert spec.model.norm_eps == 1e-5  # YAML reads 1e-5 as a string
    save_spec(spec, tmp_path / "zoo.yaml")
    assert load_spec(tmp_path / "zoo.yaml") == spec
    assert from_dict(ModelSpec, to_dict(spec)) == spec


HEADS = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
MAMBA = {
    "attention_interval": 8,
    "attention_offset": 4,
    "state_size": 4,
    "expand": 2,
    "conv_width": 4,
    "dt_rank": 2,
}
YARN = {"factor": 4, "original_max_position": 64, "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0}

REFUSED = [
    ("model.moe.num_expert", 4, r"spec: model: moe: unknown key 'num_expert'; did you mean 'num_experts'\?"),
    ("model.moe.top_k", 5, r"top_k = 5: it must be between 1 and num_experts = 4"),
    ("model.moe.top_k", 1, r"top_k = 1: with norm_topk_prob = true .* set norm_topk_prob: false or top_k >= 2"),
    ("model.moe.score_func", "relu", r"score_func = 'relu': use one of 'softmax', 'sigmoid'"),
    ("model.moe.num_groups", 3, r"num_groups = 3: it must divide num_experts = 4"),
    ("model.moe.top_k_groups", 2, r"top_k_groups = 2: it must be between 1 and num_groups = 1"),
    ("model.moe.shared_expert_gate", True, r"set num_shared_experts >= 1"),
    ("model.moe.first_k_dense", 2, r"at least one of the 2 layers must be MoE"),
    ("model.attention.num_kv_heads", 3, r"num_kv_heads = 3: it must divide num_heads = 2"),
    ("model.attention.head_dim", 7, r"head_dim = 7: rotary needs an even size"),
    ("model.rope.theta", 0, r"rope.theta = 0.0: give a positive number"),
    (
        "model.mamba",
        MAMBA | {"attention_offset": 8},
        r"offset = 8: it must lie between 0 and attention_interval - 1",
    ),
    ("model.mamba", MAMBA | {"state_size": 0}, r"mamba.state_size = 0: give 1 or more"),
    (
        "model.attention",
        HEADS | {"logit_softcap": 30, "sinks": True},
        r"logit_softcap \+ sinks: give at most one",
    ),
    ("model", {"rope": None, "attention": HEADS | {"sinks": True}}, r"rope = None: only plain attention goes without"),
    (
        "model",
        {"logit_multiplier": 0.5, "logit_softcap": 30},
        r"logit_multiplier \+ logit_softcap: give at most",
    ),
    ("model.logit_multiplier", 0, r"logit_multiplier = 0.0: give a positive factor, or null"),
    ("model", {"ffn": "geglu", "moe": {"swiglu_limit": 7}}, r"ffn = geglu: experts with a swiglu_limit are swiglu"),
    ("model.rope.linear", {"factor": 0}, r"rope.linear.factor = 0.0: give how many times longer, at least 1"),
    (
        "model.rope.yarn",
        YARN | {"original_max_position": 0},
        r"rope.yarn.original_max_position = 0: give a positive number of tokens",
    ),
    (
        "model.rope.yarn",
        YARN | {"beta_fast": 1, "beta_slow": 32},
        r"rope.yarn.beta_slow = 32.0: it must lie between 0 and beta_fast = 1.0",
    ),
    ("model.rope.yarn", YARN | {"attention_factor": 0}, r"rope.yarn.attention_factor = 0.0: give a positive factor"),
    (
        "model.rope.llama3",
        {"factor": 8, "low_freq_factor": 4, "high_freq_factor": 1, "original_max_position": 64},
        r"rope.llama3.low_freq_factor = 4.0: it must lie between 0 and high_freq_factor = 1.0",
    ),
    ("model.attention", None, r"attention / mla = neither: give exactly one"),
    ("model.hidden_size", "wide", r"hidden_size = 'wide': expected int"),
    ("model.hidden_size", 0, r"hidden_size = 0: give a positive integer"),
    ("model.tie_word_embeddings", 1, r"tie_word_embeddings = 1: expected bool"),
    ("model.moe", 3, r"moe: expected a mapping"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[f"{p}={v}" for p, v, _ in REFUSED])
def test_bad_values_are_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        from_dict(ModelSpec, changed(path, value), "spec")
    assert "\n" not in str(error.value)


def test_row_12_top_1_without_renormalisation_is_fine() -> None:
    tree = changed("model.moe.top_k", 1)
    tree["model"]["moe"]["norm_topk_prob"] = False
    assert from_dict(ModelSpec, tree).model.moe is not None


def test_a_missing_key_and_two_rope_scalings_are_named() -> None:
    tree = changed("model.rope.linear", {"factor": 2})
    tree["model"]["rope"]["yarn"] = YARN
    with pytest.raises(ValueError, match=r"rope = linear \+ yarn: give at most one"):
        from_dict(ModelSpec, tree)
    del tree["model"]["vocab_size"]
    with pytest.raises(ValueError, match="missing 'vocab_size'"):
        from_dict(ModelSpec, tree)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "cannot be read as YAML"),
        (b"\xff\xfe\x00a", "cannot be read as YAML"),
        (b"- 1\n", "expected a mapping"),
    ],
)
def test_files_that_are_not_a_yaml_mapping(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_yaml(path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        load_yaml(tmp_path / "missing.yaml")
