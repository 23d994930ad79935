"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783), and models built the same way such as DeepSeek LLM 7B."""

from __future__ import annotations

from typing import Any

from zoo.config import ModelConfig
from zoo.families.base import Family
from zoo.families.fields import Fields
from zoo.families.parts import read_decoder, read_gqa, read_rope, write_decoder, write_gqa
from zoo.families.tensors import decoder_map


def _read(fields: Fields) -> ModelConfig:
    fields.expect("mlp_bias", False)
    bias = fields.take(bool, "attention_bias", False)
    return read_decoder(fields, rope=read_rope(fields), attention=read_gqa(fields, qkv_bias=bias, output_bias=bias))


def _write(config: ModelConfig) -> dict[str, Any]:
    attention = write_gqa(config)
    assert config.attention is not None
    return {
        **write_decoder(config),
        **attention,
        "attention_bias": config.attention.qkv_bias,
        "mlp_bias": False,
    }


FAMILY = Family(
    name="llama",
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    read=_read,
    write=_write,
    map_weights=decoder_map,
)
