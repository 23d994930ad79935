"""Dense Qwen3 (arXiv 2505.09388): RMSNorm on query and key heads."""

from __future__ import annotations

from typing import Any

from zoo.config import ModelConfig
from zoo.families.base import Family
from zoo.families.fields import Fields
from zoo.families.parts import expect_full_attention, read_decoder, read_gqa, read_rope, write_decoder, write_gqa
from zoo.families.tensors import decoder_map


def _read(fields: Fields) -> ModelConfig:
    expect_full_attention(fields)
    bias = fields.take(bool, "attention_bias", False)
    attention = read_gqa(fields, qkv_bias=bias, output_bias=bias, qk_norm="head")
    return read_decoder(fields, rope=read_rope(fields), attention=attention)


def _write(config: ModelConfig) -> dict[str, Any]:
    attention = write_gqa(config)
    assert config.attention is not None
    return {
        **write_decoder(config),
        **attention,
        "attention_bias": config.attention.qkv_bias,
        "use_sliding_window": False,
    }


FAMILY = Family(
    name="qwen3",
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    read=_read,
    write=_write,
    quantizations=("fp8",),
    map_weights=decoder_map,
)
