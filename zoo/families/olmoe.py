"""OLMoE-1B-7B (arXiv 2409.02060): RMSNorm of queries and keys over the whole projection, no renormalisation."""

from __future__ import annotations

from typing import Any

from zoo.config import ModelConfig, MoEConfig
from zoo.families.base import Family
from zoo.families.fields import Fields
from zoo.families.parts import read_decoder, read_gqa, read_rope, write_decoder, write_gqa
from zoo.families.tensors import decoder_map


def _read(fields: Fields) -> ModelConfig:
    bias = fields.take(bool, "attention_bias", False)
    # transformers 5 saves num_experts under the name num_local_experts.
    num_experts = fields.optional(int, "num_local_experts") or fields.take(int, "num_experts")
    fields.expect("head_dim", fields.size("hidden_size") // fields.size("num_attention_heads"))
    return read_decoder(
        fields,
        rope=read_rope(fields),
        attention=read_gqa(fields, qkv_bias=bias, output_bias=bias, qk_norm="projection"),
        moe=MoEConfig(
            num_experts=num_experts,
            top_k=fields.take(int, "num_experts_per_tok"),
            moe_intermediate_size=fields.size("intermediate_size"),
            score_func="softmax",
            norm_topk_prob=fields.take(bool, "norm_topk_prob", False),
        ),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = write_gqa(config), config.moe
    assert config.attention is not None
    if moe is None:
        raise ValueError("moe = None: every layer of this family has experts")
    return {
        **write_decoder(config),
        **attention,
        "attention_bias": config.attention.qkv_bias,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.norm_topk_prob,
    }


FAMILY = Family(
    name="olmoe",
    model_type="olmoe",
    architectures=("OlmoeForCausalLM",),
    read=_read,
    write=_write,
    map_weights=decoder_map,
)
