"""``config.json`` as published on the hub, all fields, against the zoo's own configs and transformers.

The files are in ``published/``. They were written from knowledge, and on 2026-11-22 compared with copies in public
code. Whole files: DeepSeek-V2-Lite, DeepSeek-V3, gpt-oss, Mixtral (maxtext, ``hf_model_configs.py``), Mistral (mlc-llm,
``model_preset.py``), Jamba 1.5 (onnx-diagnostic), Grok-1 and but for its depth Maverick (TensorRT-LLM), Gemma-2-27B,
OLMoE, DeepSeek-R1, DeepSeek-Coder 1.3B (a log of veRL's, as transformers 4.48 completes it). Sizes alone: Qwen3, Llama
2 and 3.1, DBRX, OLMo-2-1B, Gemma-2-9B, DeepSeek-Coder 6.7B and 33B (arXiv 2401.14196, table 2; positions: section 3.6).
Not found: Jamba v0.1, and Scout after its instruction tuning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from zoo.families import FAMILIES, expressible, family_of, get_family
from zoo.registry import find_spec, model_names
from zoo.weights.convert import parameter_shapes
from zoo.weights.ops import source_shapes

FILES = {path.stem: path for path in sorted((Path(__file__).parent / "published").glob("*.json"))}
"""Model → ``config.json``; of Llama 4 the ``text_config`` in it."""

R1_FILE = FILES.pop("deepseek-r1")

PUBLISHED: dict[str, dict[str, Any]] = {name: json.loads(path.read_text()) for name, path in FILES.items()}

_CLASS_DEFAULTS = {
    "chunk_size_feed_forward": 0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "length_penalty": 1.0,
    "max_length": 20,
    "num_beams": 1,
    "output_hidden_states": False,
    "pruned_heads": {},
    "return_dict": True,
    "temperature": 1.0,
    "tie_word_embeddings": True,
    "top_k": 50,
    "torch_dtype": None,
    "typical_p": 1.0,
}
"""What transformers 4.39 wrote into each config within another one."""

SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": (
        "llama-3.1-8b",
        {
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 32,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "vocab_size": 32000,
        },
    ),
    "llama-3-8b": ("llama-3.1-8b", {"max_position_embeddings": 8192, "rope_scaling": None}),
    "deepseek-coder-6.7b": (
        "deepseek-coder-1.3b",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
        | {"num_key_value_heads": 32},
    ),
    "deepseek-coder-33b": (
        "deepseek-coder-1.3b",
        {"hidden_size": 7168, "intermediate_size": 19200, "num_attention_heads": 56, "num_hidden_layers": 62}
        | {"num_key_value_heads": 8},
    ),
    "mixtral-8x22b": (
        "mixtral-8x7b",
        {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "max_position_embeddings": 65536,
            "num_attention_heads": 48,
            "num_hidden_layers": 56,
            "router_aux_loss_coef": 0.001,
        },
    ),
    "qwen3-235b-a22b": (
        "qwen3-30b-a3b",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_window_layers": 94,
            "moe_intermediate_size": 1536,
            "num_attention_heads": 64,
            "num_hidden_layers": 94,
        },
    ),
    "qwen3-32b": (
        "qwen3-8b",
        {"hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64, "num_hidden_layers": 64},
    ),
    "gpt-oss-120b": (
        "gpt-oss-20b",
        {
            "layer_types": ["sliding_attention", "full_attention"] * 18,
            "num_hidden_layers": 36,
            "num_local_experts": 128,
        },
    ),
    "llama-4-maverick": (
        "llama-4-scout",
        {
            "interleave_moe_layer_step": 2,
            "max_position_embeddings": 1048576,
            "no_rope_layers": [],
            "num_local_experts": 128,
            "rope_scaling": None,
            "use_qk_norm": False,
        },
    ),
    "gemma-2-9b": (
        "gemma-2-27b",
        {
            "_attn_implementation": "eager",
            "head_dim": 256,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "query_pre_attn_scalar": 256,
            "sliding_window_size": 4096,
        },
    ),
    "olmo-2-1b": (
        "olmo-2-7b",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16}
        | {"num_hidden_layers": 16},
    ),
    "dbrx": (
        "dbrx",
        {
            "attn_config": _CLASS_DEFAULTS | {"attn_pdrop": 0} | PUBLISHED["dbrx"]["attn_config"],
            "ffn_config": _CLASS_DEFAULTS
            | PUBLISHED["dbrx"]["ffn_config"]
            | {
                "ffn_act_fn": {"name": "silu"},
                "moe_jitter_eps": 0,
                "moe_normalize_expert_weights": 1,
                "uniform_expert_assignment": False,
            },
        },
    ),
}
"""Size of a family → the file of another one, and what is different: further sizes, and files that say more."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_the_one_of_the_zoo(name: str) -> None:
    family = family_of(PUBLISHED[name])
    assert family.name == find_spec(name).family
    assert family.from_hf(PUBLISHED[name]) == find_spec(name).model


@pytest.mark.parametrize("name", SIZES)
def test_further_sizes_are_those_of_the_zoo(name: str) -> None:
    other, change = SIZES[name]
    hf = PUBLISHED[other] | change
    assert family_of(hf).from_hf(hf) == find_spec(name).model


def test_deepseek_r1_is_deepseek_v3_with_other_weights() -> None:
    """Its file, to the byte: the hash is the one that users of the model have written down of theirs."""
    file = R1_FILE.read_bytes()
    assert hashlib.sha256(file).hexdigest() == "79ddea672a62e95d3f0be27be434375538e1988975971cffcf87c96c1de84a65"
    hf = json.loads(file)
    assert family_of(hf).from_hf(hf) == find_spec("deepseek-v3").model


@pytest.mark.parametrize("name", PUBLISHED)
def test_spelling_of_transformers_5_means_the_same(name: str) -> None:
    respelled = json.loads(AutoConfig.for_model(**PUBLISHED[name]).to_json_string())
    assert ("rope_parameters" in respelled) == (find_spec(name).model.rope is not None)
    assert "rope_scaling" not in respelled
    assert family_of(respelled).from_hf(respelled) == find_spec(name).model


@pytest.mark.parametrize("name", model_names())
def test_every_config_goes_to_its_family_and_back(name: str) -> None:
    spec = find_spec(name)
    family = get_family(spec.family)
    assert family.from_hf(family.to_hf(spec.model)) == spec.model
    assert expressible(spec.model) in FAMILIES


@pytest.mark.parametrize("name", [n for n in model_names() if find_spec(n).family not in ("deepseek_moe", "grok1")])
def test_every_tensor_has_its_name_and_shape_in_transformers(name: str) -> None:
    """At full width; four layers are enough to have each kind, or as many as there are up to an attention layer."""
    spec = find_spec(name)
    layers = spec.model.mamba.attention_offset + 1 if spec.model.mamba else 4
    # Without MTP modules, which transformers does not keep in the model: tests/parity/test_mtp_weights.py.
    config, family = dataclasses.replace(spec.model, num_layers=layers, mtp_depth=0), get_family(spec.family)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family.to_hf(config))).state_dict()
    if config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    ours = source_shapes(family.weight_map(config, "fused"), parameter_shapes(config))
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("mixtral-8x7b", {"hidden_act": "gelu"}),
    ("mixtral-8x7b", {"router_jitter_noise": 0.1}),
    ("mixtral-8x7b", {"attention_chunk_size": 8192}),
    ("mixtral-8x7b", {"partial_rotary_factor": 0.5}),
    ("mixtral-8x7b", {"final_logit_softcapping": 30.0}),
    ("mixtral-8x7b", {"quantization_config": {"quant_method": "fp8"}}),
    ("mixtral-8x7b", {"num_hidden_layers": "32"}),
    ("mixtral-8x7b", {"rms_norm_eps": None}),
    ("llama-3.1-8b", {"mlp_bias": True}),
    ("llama-3.1-8b", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("llama-3.1-8b", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}),
    ("qwen1.5-moe-a2.7b", {"decoder_sparse_step": 2}),
    ("qwen1.5-moe-a2.7b", {"mlp_only_layers": [3]}),
    ("qwen1.5-moe-a2.7b", {"use_sliding_window": True}),
    ("qwen1.5-moe-a2.7b", {"shared_expert_intermediate_size": 5000}),
    ("gemma-2-27b", {"layer_types": ["full_attention"] * 46}),
    ("gemma-2-27b", {"attn_logit_softcapping": None}),
    ("gpt-oss-20b", {"swiglu_alpha": 1.0}),
    ("gpt-oss-20b", {"experts_per_token": 2}),
    ("dbrx", {"resid_pdrop": 0.1}),
    ("dbrx", {"rope_theta": 10000.0}),
    ("llama-4-scout", {"no_rope_layers": [1] * 48}),
    ("llama-4-scout", {"moe_layers": [3]}),
    ("jamba-v0.1", {"expert_layer_offset": 0}),
    ("jamba-v0.1", {"mamba_proj_bias": True}),
    ("jamba-v0.1", {"mamba_inner_layernorms": False}),
    ("jamba-v0.1", {"rope_theta": 10000.0}),
    ("llama-4-scout", {"attn_temperature_tuning": False}),
    ("olmoe-1b-7b", {"clip_qkv": 8.0}),
    ("deepseek-v2-lite", {"topk_method": "noaux_tc"}),
    ("deepseek-v2-lite", {"norm_topk_prob": True}),
    ("deepseek-v2-lite", {"moe_layer_freq": 2}),
    ("deepseek-v2-lite", {"rms_norm_eps": 1e-5}),
    ("deepseek-v3", {"scoring_func": "softmax"}),
    ("deepseek-v3", {"attention_bias": True}),
]


@pytest.mark.parametrize(("name", "change"), REFUSED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else v)
def test_what_the_blocks_do_not_have_is_refused_by_name(name: str, change: dict[str, Any]) -> None:
    hf = PUBLISHED[name] | change
    with pytest.raises(ValueError) as caught:
        family_of(hf).from_hf(hf, "src/config.json")
    message = str(caught.value)
    (field,) = change
    assert "src/config.json" in message
    assert (field if field != "rope_scaling" else "rope_type") in message
    assert "\n" not in message


WRONG: list[Any] = [
    "x",
    "",
    -1,
    0,
    1.5,
    True,
    [],
    ["x"],
    [0, 0],
    {},
    {"x": 1},
    {"rope_type": "yarn"},
    10**30,
    float("nan"),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_wrong_value_is_refused_or_read(name: str) -> None:
    """No value of any field ends in anything but a model or a ``ValueError`` of one line."""
    for field in PUBLISHED[name]:
        for value in WRONG:
            hf = PUBLISHED[name] | {field: value}
            try:
                family = family_of(hf)
                family.from_hf(hf)
                family.ignored(hf)
            except ValueError as error:
                assert "\n" not in str(error), (field, value)


def test_unknown_model_type_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type = 'gpt2' is not supported; it must be one of llama,"):
        family_of({"model_type": "gpt2"})


def test_export_refuses_what_a_family_cannot_express() -> None:
    with pytest.raises(ValueError, match=r"family mistral cannot express .*moe"):
        get_family("mistral").to_hf(find_spec("mixtral-tiny").model)
    with pytest.raises(ValueError, match=r"family llama cannot express attention.qkv_bias = True|output_bias"):
        get_family("llama").to_hf(find_spec("qwen2-tiny").model)
