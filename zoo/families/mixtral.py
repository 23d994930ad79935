"""Mixtral (arXiv 2401.04088): Mistral with 8 experts in every layer, top-2, weights renormalised."""

from __future__ import annotations

from typing import Any

from zoo.config import ModelConfig, MoEConfig
from zoo.families.base import Family, Layout
from zoo.families.fields import Fields
from zoo.families.parts import read_decoder, read_gqa, read_rope, write_decoder, write_gqa
from zoo.families.tensors import MoENames, decoder_map
from zoo.weights.ops import Op

NAMES = MoENames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def _read(fields: Fields) -> ModelConfig:
    fields.expect("router_jitter_noise", 0)
    window = fields.optional(int, "sliding_window")
    return read_decoder(
        fields,
        rope=read_rope(fields, default_theta=1_000_000.0),
        attention=read_gqa(fields, sliding_window=window),
        moe=MoEConfig(
            num_experts=fields.take(int, "num_local_experts"),
            top_k=fields.take(int, "num_experts_per_tok"),
            moe_intermediate_size=fields.take(int, "intermediate_size"),
            score_func="softmax",
            norm_topk_prob=True,
        ),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    attention = write_gqa(config)
    assert config.attention is not None
    if config.moe is None:
        raise ValueError("moe = None: every layer of this family has experts")
    return {
        **write_decoder(config),
        **attention,
        "sliding_window": config.attention.sliding_window,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
    }


def _map_weights(config: ModelConfig, layout: Layout) -> list[Op]:
    return decoder_map(config, layout, NAMES)


FAMILY = Family(
    name="mixtral",
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    read=_read,
    write=_write,
    map_weights=_map_weights,
)
