"""Mistral 7B (arXiv 2310.06825): Llama with a sliding window in every layer."""

from __future__ import annotations

from typing import Any

from zoo.config import ModelConfig
from zoo.families.base import Family
from zoo.families.fields import Fields
from zoo.families.parts import read_decoder, read_gqa, read_rope, write_decoder, write_gqa
from zoo.families.tensors import decoder_map


def _read(fields: Fields) -> ModelConfig:
    window = fields.optional(int, "sliding_window")
    return read_decoder(fields, rope=read_rope(fields), attention=read_gqa(fields, sliding_window=window))


def _write(config: ModelConfig) -> dict[str, Any]:
    attention = write_gqa(config)
    assert config.attention is not None
    return {**write_decoder(config), **attention, "sliding_window": config.attention.sliding_window}


FAMILY = Family(
    name="mistral",
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    read=_read,
    write=_write,
    map_weights=decoder_map,
)
