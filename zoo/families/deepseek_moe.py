"""DeepSeekMoE 16B (arXiv 2401.06066): fine-grained and shared experts behind Llama's attention.

``read_experts`` and ``write_experts`` serve DeepSeek-V2 and V3 too: they differ in the router only.
"""

from __future__ import annotations

from typing import Any

from zoo.config import ModelConfig, MoEConfig
from zoo.families.base import Family
from zoo.families.fields import Fields
from zoo.families.parts import read_decoder, read_gqa, read_rope, write_decoder, write_gqa
from zoo.families.tensors import decoder_map

EXPERTS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
ROUTER = ("norm_topk_prob", "routed_scaling_factor", "scoring_func", "topk_method", "n_group", "topk_group")


def read_experts(fields: Fields, **router: Any) -> MoEConfig | None:
    """The experts with the given ``router`` fields of ``MoEConfig``; ``None`` where every layer is dense."""
    fields.expect("moe_layer_freq", 1)
    fields.skip("aux_loss_alpha", "seq_aux", "ep_size")
    first_k_dense = fields.take(int, "first_k_dense_replace", 0)
    if first_k_dense >= fields.size("num_hidden_layers"):
        fields.skip(*EXPERTS, *ROUTER)
        return None
    return MoEConfig(
        num_experts=fields.take(int, "n_routed_experts"),
        top_k=fields.take(int, "num_experts_per_tok"),
        moe_intermediate_size=fields.size("moe_intermediate_size"),
        num_shared_experts=fields.take(int, "n_shared_experts", 0),
        first_k_dense=first_k_dense,
        **router,
    )


def write_experts(config: ModelConfig) -> dict[str, Any]:
    """Inverse of ``read_experts``; a dense model is one whose ``first_k_dense_replace`` reaches the last layer."""
    if config.moe is None:
        return {"first_k_dense_replace": config.num_layers, "moe_layer_freq": 1}
    return {
        "first_k_dense_replace": config.moe.first_k_dense,
        "moe_layer_freq": 1,
        "n_routed_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "moe_intermediate_size": config.moe.moe_intermediate_size,
        "n_shared_experts": config.moe.num_shared_experts or None,
        "norm_topk_prob": config.moe.norm_topk_prob,
    }


def _read(fields: Fields) -> ModelConfig:
    fields.expect("scoring_func", "softmax")
    fields.expect("mlp_bias", False)
    bias = fields.take(bool, "attention_bias", False)
    return read_decoder(
        fields,
        rope=read_rope(fields),
        attention=read_gqa(fields, qkv_bias=bias, output_bias=bias),
        moe=read_experts(fields, score_func="softmax", norm_topk_prob=fields.take(bool, "norm_topk_prob", False)),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    attention = write_gqa(config)
    assert config.attention is not None
    return {
        **write_decoder(config),
        **attention,
        **write_experts(config),
        "attention_bias": config.attention.qkv_bias,
        "scoring_func": "softmax",
    }


FAMILY = Family(
    name="deepseek_moe",
    model_type="deepseek",
    architectures=("DeepseekForCausalLM",),
    read=_read,
    write=_write,
    map_weights=decoder_map,
)
