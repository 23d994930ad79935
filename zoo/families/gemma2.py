"""Gemma-2 (arXiv 2408.00118): norms on both sides, soft caps, a sliding window in every other layer, GEGLU."""

from __future__ import annotations

from typing import Any

from zoo.config import ModelConfig
from zoo.families.base import Family
from zoo.families.fields import Fields
from zoo.families.parts import (
    expect_alternating_windows,
    read_decoder,
    read_gqa,
    read_rope,
    write_decoder,
    write_gqa,
)
from zoo.families.tensors import decoder_map

GELU = "gelu_pytorch_tanh"


def _read(fields: Fields) -> ModelConfig:
    fields.skip("cache_implementation")
    fields.expect("hidden_activation", GELU)
    fields.expect("attention_bias", False)
    fields.expect("use_bidirectional_attention", False)
    expect_alternating_windows(fields)
    window = fields.size("sliding_window")
    fields.expect("sliding_window_size", window)
    scale_dim = fields.size("query_pre_attn_scalar")
    attention = read_gqa(
        fields,
        sliding_window=window,
        full_attention_interval=2,
        query_scale_dim=None if scale_dim == fields.take(int, "head_dim") else scale_dim,
        logit_softcap=fields.take(float, "attn_logit_softcapping"),
    )
    return read_decoder(
        fields,
        rope=read_rope(fields),
        attention=attention,
        activation=GELU,
        tied=True,
        norm="unit_offset_rms",
        norm_placement="both",
        ffn="geglu",
        embedding_multiplier=fields.size("hidden_size") ** 0.5,
        logit_softcap=fields.take(float, "final_logit_softcapping"),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    attention = write_gqa(config)
    assert config.attention is not None
    return {
        **write_decoder(config),
        **attention,
        "hidden_act": GELU,
        "hidden_activation": GELU,
        "attention_bias": False,
        "sliding_window": config.attention.sliding_window,
        "query_pre_attn_scalar": config.attention.query_scale_dim or config.attention.head_dim,
        "attn_logit_softcapping": config.attention.logit_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


FAMILY = Family(
    name="gemma2",
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM",),
    read=_read,
    write=_write,
    map_weights=decoder_map,
)
