"""OLMo-2 (arXiv 2501.00656, section 3.3): norms after mixer and FFN, and over all query and all key heads together."""

from __future__ import annotations

from typing import Any

from zoo.config import ModelConfig
from zoo.families.base import Family
from zoo.families.fields import Fields
from zoo.families.parts import read_decoder, read_gqa, read_rope, write_decoder, write_gqa
from zoo.families.tensors import decoder_map


def _read(fields: Fields) -> ModelConfig:
    bias = fields.take(bool, "attention_bias", False)
    attention = read_gqa(fields, qkv_bias=bias, output_bias=bias, qk_norm="projection")
    return read_decoder(fields, rope=read_rope(fields), attention=attention, norm_placement="after")


def _write(config: ModelConfig) -> dict[str, Any]:
    attention = write_gqa(config)
    assert config.attention is not None
    return {**write_decoder(config), **attention, "attention_bias": config.attention.qkv_bias}


FAMILY = Family(
    name="olmo2",
    model_type="olmo2",
    architectures=("Olmo2ForCausalLM",),
    read=_read,
    write=_write,
    map_weights=decoder_map,
)
