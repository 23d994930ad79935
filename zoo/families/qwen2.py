"""Dense Qwen1.5, Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on queries, keys and values only."""

from __future__ import annotations

from typing import Any

from zoo.config import ModelConfig
from zoo.families.base import Family
from zoo.families.fields import Fields
from zoo.families.parts import expect_full_attention, read_decoder, read_gqa, read_rope, write_decoder, write_gqa
from zoo.families.tensors import decoder_map


def _read(fields: Fields) -> ModelConfig:
    expect_full_attention(fields)
    return read_decoder(fields, rope=read_rope(fields), attention=read_gqa(fields, qkv_bias=True))


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(config), **write_gqa(config), "use_sliding_window": False}


FAMILY = Family(
    name="qwen2",
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    read=_read,
    write=_write,
    map_weights=decoder_map,
)
