"""Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B (arXiv 2407.10671): a shared expert behind a sigmoid gate."""

from __future__ import annotations

from typing import Any

from zoo.config import ModelConfig, MoEConfig
from zoo.families.base import Family, Layout
from zoo.families.fields import Fields
from zoo.families.parts import (
    expect_full_attention,
    leading_dense_layers,
    read_decoder,
    read_gqa,
    read_rope,
    write_decoder,
    write_gqa,
)
from zoo.families.tensors import MoENames, decoder_map
from zoo.weights.ops import Op

NAMES = MoENames(shared_experts="shared_expert")


def _read(fields: Fields) -> ModelConfig:
    expect_full_attention(fields)
    return read_decoder(
        fields,
        rope=read_rope(fields),
        attention=read_gqa(fields, qkv_bias=fields.take(bool, "qkv_bias", True)),
        moe=_read_moe(fields),
    )


def _read_moe(fields: Fields) -> MoEConfig:
    width = fields.size("moe_intermediate_size")
    shared = fields.size("shared_expert_intermediate_size")
    if shared % width:
        raise ValueError(
            f"{fields.where}: shared_expert_intermediate_size = {shared} is not supported; "
            f"it must be a multiple of moe_intermediate_size = {width}"
        )
    return MoEConfig(
        num_experts=fields.take(int, "num_experts"),
        top_k=fields.take(int, "num_experts_per_tok"),
        moe_intermediate_size=width,
        score_func="softmax",
        norm_topk_prob=fields.take(bool, "norm_topk_prob", False),
        num_shared_experts=shared // width,
        shared_expert_gate=True,
        first_k_dense=leading_dense_layers(fields),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = write_gqa(config), config.moe
    assert config.attention is not None
    if moe is None:
        raise ValueError("moe = None: use the dense family qwen2")
    return {
        **write_decoder(config),
        **attention,
        "qkv_bias": config.attention.qkv_bias,
        "use_sliding_window": False,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "shared_expert_intermediate_size": moe.num_shared_experts * moe.moe_intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(moe.first_k_dense)),
    }


def _map_weights(config: ModelConfig, layout: Layout) -> list[Op]:
    return decoder_map(config, layout, NAMES)


FAMILY = Family(
    name="qwen2_moe",
    model_type="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    read=_read,
    write=_write,
    map_weights=_map_weights,
)
