"""Random small architectures for property tests (hypothesis strategies)."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from zoo.config import (
    AttentionConfig,
    MambaConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RelativePositionConfig,
    RopeConfig,
)

RELATIVE = {"relative_positions": RelativePositionConfig(num_buckets=8, max_distance=20)}


@st.composite
def attention_configs(draw: st.DrawFn) -> AttentionConfig:
    num_kv_heads, window = draw(st.integers(1, 3)), draw(st.none() | st.integers(1, 8))
    return AttentionConfig(
        num_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * draw(st.integers(1, 8)),
        qkv_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from([None, "head", "projection"])),
        sliding_window=window,
        full_attention_interval=draw(st.none() | st.integers(2, 3)) if window else None,
        query_scale_dim=draw(st.none() | st.integers(1, 8)),
        **draw(st.sampled_from([{}, {"logit_softcap": 20.0}, {"sinks": True}, {"clip_qkv": 8.0}, RELATIVE])),
    )


@st.composite
def mla_configs(draw: st.DrawFn) -> MLAConfig:
    return MLAConfig(
        num_heads=draw(st.integers(1, 4)),
        kv_lora_rank=draw(st.integers(1, 16)),
        q_lora_rank=draw(st.none() | st.integers(1, 16)),
        qk_nope_head_dim=draw(st.integers(1, 8)),
        qk_rope_head_dim=2 * draw(st.integers(1, 4)),
        v_head_dim=draw(st.integers(1, 8)),
    )


@st.composite
def mamba_configs(draw: st.DrawFn) -> MambaConfig:
    interval = draw(st.integers(2, 4))
    return MambaConfig(
        attention_interval=interval,
        attention_offset=draw(st.integers(0, interval - 1)),
        state_size=draw(st.integers(1, 8)),
        expand=draw(st.integers(1, 3)),
        conv_width=draw(st.integers(1, 4)),
        dt_rank=draw(st.integers(1, 8)),
    )


@st.composite
def moe_configs(draw: st.DrawFn, num_layers: int, gated: bool) -> MoEConfig:
    num_groups, group_size = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    top_k_groups = draw(st.integers(1, num_groups))
    top_k = draw(st.integers(1, top_k_groups * group_size))
    num_shared_experts, ffn = draw(st.integers(0, 2)), draw(st.sampled_from([None, "relu"]))
    return MoEConfig(
        num_experts=num_groups * group_size,
        top_k=top_k,
        moe_intermediate_size=draw(st.integers(1, 32)),
        score_func=draw(st.sampled_from(["softmax", "sigmoid"])),
        norm_topk_prob=top_k > 1 and draw(st.booleans()),
        num_groups=num_groups,
        top_k_groups=top_k_groups,
        group_score=draw(st.sampled_from(["max", "top2_sum"])),
        router_bias=draw(st.booleans()),
        router_logit_bias=draw(st.booleans()),
        ffn=ffn,
        dense_ffn=draw(st.booleans()),
        swiglu_limit=draw(st.none() | st.floats(1, 10)) if gated and ffn is None else None,
        num_shared_experts=num_shared_experts,
        shared_expert_gate=num_shared_experts > 0 and draw(st.booleans()),
        first_k_dense=draw(st.integers(0, num_layers - 1)),
        scaled_input=top_k == 1 and draw(st.booleans()),
    )


@st.composite
def model_configs(draw: st.DrawFn, *, sparse: bool | None = None, max_layers: int = 4) -> ModelConfig:
    """Any valid architecture; ``sparse`` fixes whether it has a moe block."""
    num_layers = draw(st.integers(1, max_layers))
    mixer: dict[str, Any] = (
        {"mla": draw(mla_configs())} if draw(st.booleans()) else {"attention": draw(attention_configs())}
    )
    ffn = draw(st.sampled_from(["swiglu", "relu"]))
    relative = "attention" in mixer and mixer["attention"].relative_positions is not None
    has_moe = draw(st.booleans()) if sparse is None else sparse
    return ModelConfig(
        vocab_size=draw(st.integers(2, 64)),
        hidden_size=draw(st.integers(1, 32)),
        num_layers=num_layers,
        intermediate_size=draw(st.integers(1, 64)),
        max_position_embeddings=64,
        norm_eps=1e-6,
        rope=None if relative else RopeConfig(theta=10000.0),
        mamba=draw(st.none() | mamba_configs()),
        moe=draw(moe_configs(num_layers, gated=ffn == "swiglu")) if has_moe else None,
        ffn=ffn,
        norm=draw(st.sampled_from(["rms", "unit_offset_rms", "layer"])),
        embedding_multiplier=draw(st.none() | st.floats(0.5, 8)),
        logit_softcap=draw(st.none() | st.floats(1, 50)),
        norm_placement=draw(st.sampled_from(["before", "after", "both"])),
        tie_word_embeddings=draw(st.booleans()),
        **mixer,
    )
