"""Qwen3-30B-A3B and its siblings (arXiv 2505.09388): RMSNorm on query and key heads, no shared expert."""

from __future__ import annotations

from typing import Any

from zoo.config import ModelConfig, MoEConfig
from zoo.families.base import Family
from zoo.families.fields import Fields
from zoo.families.parts import leading_dense_layers, read_decoder, read_gqa, read_rope, write_decoder, write_gqa
from zoo.families.tensors import decoder_map

EXPERTS = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")


def _read(fields: Fields) -> ModelConfig:
    fields.skip("max_window_layers")
    window = fields.optional(int, "sliding_window") if fields.take(bool, "use_sliding_window", False) else None
    fields.skip("sliding_window")
    bias = fields.take(bool, "attention_bias", False)
    return read_decoder(
        fields,
        rope=read_rope(fields),
        attention=read_gqa(fields, qkv_bias=bias, output_bias=bias, qk_norm="head", sliding_window=window),
        moe=_read_moe(fields),
    )


def _read_moe(fields: Fields) -> MoEConfig | None:
    first_k_dense = leading_dense_layers(fields)
    if first_k_dense == fields.size("num_hidden_layers"):
        fields.skip(*EXPERTS)
        return None
    # transformers 5 saves num_experts under the name num_local_experts.
    num_experts = fields.optional(int, "num_local_experts") or fields.take(int, "num_experts")
    return MoEConfig(
        num_experts=num_experts,
        top_k=fields.take(int, "num_experts_per_tok"),
        moe_intermediate_size=fields.size("moe_intermediate_size"),
        score_func="softmax",
        norm_topk_prob=fields.take(bool, "norm_topk_prob", False),
        first_k_dense=first_k_dense,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = write_gqa(config), config.moe
    assert config.attention is not None
    published = {
        **write_decoder(config),
        **attention,
        "attention_bias": config.attention.qkv_bias,
        "use_sliding_window": config.attention.sliding_window is not None,
        "sliding_window": config.attention.sliding_window,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(moe.first_k_dense if moe else config.num_layers)),
    }
    if moe is None:
        return published
    return published | {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
    }


FAMILY = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    read=_read,
    write=_write,
    quantizations=("fp8",),
    map_weights=decoder_map,
)
