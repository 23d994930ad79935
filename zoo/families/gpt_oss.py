"""gpt-oss (arXiv 2508.10925): attention sinks, a sliding window in every other layer, biased and clamped experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.config import ModelConfig, MoEConfig
from zoo.families.base import Family, Layout
from zoo.families.fields import Fields
from zoo.families.parts import (
    expect_alternating_windows,
    read_decoder,
    read_gqa,
    read_rope,
    write_decoder,
    write_gqa,
)
from zoo.families.tensors import decoder_map
from zoo.weights.ops import Op, Rename
from zoo.weights.rearrange import Transpose


def _read(fields: Fields) -> ModelConfig:
    expect_alternating_windows(fields)
    # Their configs say this twice, and where the rotary scaling begins three times.
    top_k = fields.size("num_experts_per_tok")
    fields.expect("experts_per_token", top_k)
    fields.skip("initial_context_length")
    fields.expect("swiglu_alpha", 1.702)
    bias = fields.take(bool, "attention_bias", True)
    return read_decoder(
        fields,
        rope=read_rope(fields, default_theta=150_000.0),
        attention=read_gqa(
            fields,
            qkv_bias=bias,
            output_bias=bias,
            sliding_window=fields.size("sliding_window"),
            full_attention_interval=2,
            sinks=True,
        ),
        moe=MoEConfig(
            num_experts=fields.size("num_local_experts"),
            top_k=top_k,
            moe_intermediate_size=fields.size("intermediate_size"),
            score_func="softmax",
            norm_topk_prob=True,
            router_logit_bias=True,
            swiglu_limit=fields.take(float, "swiglu_limit", 7.0),
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
        "sliding_window": config.attention.sliding_window,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "swiglu_limit": moe.swiglu_limit,
    }


def _map_moe(config: ModelConfig, theirs: str, ours: str) -> Iterator[Op]:
    """Experts are stored transposed, with gate and up interleaved."""
    yield Rename(f"{theirs}.router.weight", f"{ours}.router.weight")
    yield Rename(f"{theirs}.router.bias", f"{ours}.router.logit_bias")
    yield Transpose(f"{theirs}.experts.gate_up_proj", f"{ours}.experts.gate_up", (0, 3, 2, 1), interleaved=2)
    yield Transpose(f"{theirs}.experts.gate_up_proj_bias", f"{ours}.experts.gate_up_bias", (0, 2, 1), interleaved=2)
    yield Transpose(f"{theirs}.experts.down_proj", f"{ours}.experts.down", (0, 2, 1))
    yield Rename(f"{theirs}.experts.down_proj_bias", f"{ours}.experts.down_bias")


def _map_weights(config: ModelConfig, layout: Layout) -> list[Op]:
    return decoder_map(config, layout, moe_map=_map_moe)


FAMILY = Family(
    name="gpt_oss",
    model_type="gpt_oss",
    architectures=("GptOssForCausalLM",),
    read=_read,
    write=_write,
    map_weights=_map_weights,
    quantizations=("mxfp4",),
)
