"""``config.json`` of T5, Flan-T5 and Switch Transformers as published, all fields: read, written, counted, refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from zoo.encoder_decoder_accounting import count_stack_parameters
from zoo.encoder_decoder_config import EncoderDecoderConfig, EncoderDecoderSpec
from zoo.families import ENCODER_DECODERS, family_of
from zoo.registry import encoder_decoder_names, find_any_spec, find_spec
from zoo.weights.convert import parameter_shapes
from zoo.weights.ops import source_shapes

PUBLISHED: dict[str, dict[str, Any]] = {
    "t5-small": {
        "architectures": ["T5ForConditionalGeneration"],
        "d_ff": 2048,
        "d_kv": 64,
        "d_model": 512,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "n_positions": 512,
        "num_heads": 8,
        "num_layers": 6,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "task_specific_params": {"summarization": {"num_beams": 4, "prefix": "summarize: "}},
        "vocab_size": 32128,
    },
    "flan-t5-base": {
        "architectures": ["T5ForConditionalGeneration"],
        "d_ff": 2048,
        "d_kv": 64,
        "d_model": 768,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "n_positions": 512,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "num_layers": 12,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "transformers_version": "4.23.1",
        "use_cache": True,
        "vocab_size": 32128,
    },
    "switch-base-8": {
        "add_router_probs": False,
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "batch_prioritized_routing": False,
        "d_ff": 3072,
        "d_kv": 64,
        "d_model": 768,
        "decoder_sparse_step": 2,
        "decoder_start_token_id": 0,
        "dense_act_fn": "relu",
        "dropout_rate": 0.1,
        "encoder_sparse_step": 2,
        "eos_token_id": 1,
        "expert_capacity": 64,
        "feed_forward_proj": "relu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": False,
        "layer_norm_epsilon": 1e-06,
        "model_type": "switch_transformers",
        "num_decoder_layers": 12,
        "num_experts": 8,
        "num_heads": 12,
        "num_layers": 12,
        "num_selected_experts": 1,
        "num_sparse_decoder_layers": 6,
        "num_sparse_encoder_layers": 6,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "router_aux_loss_coef": 0.001,
        "router_bias": False,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "router_jitter_noise": 0.01,
        "router_type": "tokens_masked",
        "router_z_loss_coef": 0.001,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 32128,
    },
}

PARAMETERS = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "flan-t5-small": 76_961_152,
    "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184,
    "flan-t5-xxl": 11_135_332_352,
}
"""Elements of the published checkpoints, each tensor once."""


def spec_of(name: str) -> EncoderDecoderSpec:
    spec = find_any_spec(name)
    assert isinstance(spec, EncoderDecoderSpec)
    return spec


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_config_goes_to_its_family_and_back(name: str) -> None:
    family, spec = family_of(PUBLISHED[name]), spec_of(name)
    config = family.from_hf(PUBLISHED[name])
    assert config == spec.model
    assert family.name == spec.family
    written = family.to_hf(config)
    assert family.from_hf(written) == config
    # As transformers 5 saves it: with a field of its own for the scale of the output.
    respelled = json.loads(AutoConfig.for_model(**written).to_json_string())
    assert family_of(respelled).from_hf(respelled) == config


def many_experts(name: str) -> bool:
    moe = spec_of(name).model.moe
    return moe is not None and moe.num_experts > 16


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * many_experts(n)) for n in encoder_decoder_names()]
)
def test_card_equals_the_model_of_transformers(name: str) -> None:
    spec = spec_of(name)
    family = ENCODER_DECODERS[str(spec.family)]
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**family.to_hf(spec.model)))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    if not spec.model.tie_word_embeddings:  # transformers 5 ties the head of a fresh T5; of a stored one it does not
        shapes["lm_head.weight"] = tuple(model.lm_head.weight.shape)
    assert source_shapes(family.weight_map(spec.model), parameter_shapes(spec.model)) == shapes
    total = count_stack_parameters(spec.model).total
    assert total == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert total == PARAMETERS.get(name, total)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("t5-small", {"feed_forward_proj": "gated-silu"}),
    ("t5-small", {"feed_forward_proj": "gelu"}),
    ("t5-small", {"dense_act_fn": "gelu_new"}),
    ("t5-small", {"is_gated_act": True}),
    ("t5-small", {"is_encoder_decoder": False}),
    ("t5-small", {"is_decoder": True}),
    ("t5-small", {"decoder_start_token_id": 40000}),
    ("t5-small", {"scale_embeddings": True}),
    ("switch-base-8", {"router_bias": True}),
    ("switch-base-8", {"router_dtype": "bfloat16"}),
    ("switch-base-8", {"dense_act_fn": "gelu"}),
    ("switch-base-8", {"num_selected_experts": 2}),
    ("switch-base-8", {"router_type": "experts_masked"}),
    ("switch-base-8", {"num_sparse_encoder_layers": 4}),
    ("switch-base-8", {"num_sparse_decoder_layers": 12}),
    ("switch-base-8", {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("name", "change"), REFUSED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else v)
def test_what_the_blocks_do_not_have_is_refused_by_name(name: str, change: dict[str, Any]) -> None:
    hf = {k: v for k, v in PUBLISHED[name].items() if not k.endswith("_sparse_step")} | change
    with pytest.raises(ValueError) as caught:
        family_of(hf).from_hf(hf, "src/config.json")
    (field,) = change
    assert "src/config.json" in str(caught.value)
    assert {"decoder_start_token_id": "decoder_start_id"}.get(field, field) in str(caught.value)
    assert "\n" not in str(caught.value)


WRONG: list[Any] = ["x", "", -1, 0, 1.5, True, [], ["x"], {}, {"x": 1}, 10**30, float("nan")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_wrong_value_is_refused_or_read(name: str) -> None:
    """No value of any field ends in anything but a model or a ``ValueError`` of one line."""
    for field in PUBLISHED[name]:
        for value in WRONG:
            hf = PUBLISHED[name] | {field: value}
            try:
                family = family_of(hf)
                assert isinstance(family.from_hf(hf), EncoderDecoderConfig)
            except ValueError as error:
                assert "\n" not in str(error), (field, value)


def test_a_family_refuses_what_another_is_for() -> None:
    t5, switch = ENCODER_DECODERS["t5"], ENCODER_DECODERS["switch"]
    with pytest.raises(ValueError, match="family t5 cannot express moe"):
        t5.to_hf(spec_of("switch-base-8").model)
    with pytest.raises(ValueError, match="moe = None: this family has experts"):
        switch.to_hf(spec_of("t5-small").model)
    with pytest.raises(ValueError, match="model: this family is of encoder-decoders"):
        t5.to_hf(find_spec("mixtral-tiny").model)  # type: ignore[arg-type]
