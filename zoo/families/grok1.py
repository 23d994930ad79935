"""Grok-1 (xai-org/grok-1, published code): GELU-gated experts, soft-capped attention, scaled embedding and logits.

xAI publishes JAX arrays in 8 bits. Names and fields here are those of the conversion to safetensors hpcai-tech/grok-1.
That port's own code takes the exact GELU; this is the tanh form of ``jax.nn.gelu``, with which the model was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.config import ModelConfig, MoEConfig, RopeConfig
from zoo.families.base import Family, Layout
from zoo.families.fields import Fields
from zoo.families.parts import read_decoder, read_gqa, write_decoder, write_gqa
from zoo.weights.ops import Op, Rename, Stack

THETA = 10_000.0
"""Base of the rotary frequencies, which the published code does not read from its config."""

NORMS = {
    "pre_attn_norm": "mixer_norm",
    "post_attn_norm": "mixer_post_norm",
    "pre_moe_norm": "ffn_norm",
    "post_moe_norm": "ffn_post_norm",
}


def _read(fields: Fields) -> ModelConfig:
    fields.expect("rope_theta", THETA)
    attention = read_gqa(fields, logit_softcap=fields.take(float, "max_attn_value"))
    scale = fields.take(float, "attn_output_multiplier")
    if scale != attention.head_dim**-0.5:
        raise ValueError(
            f"{fields.where}: attn_output_multiplier = {scale} is not supported; only 1 / √head_dim = "
            f"{attention.head_dim**-0.5} is"
        )
    return read_decoder(
        fields,
        rope=RopeConfig(theta=THETA),
        attention=attention,
        moe=MoEConfig(
            num_experts=fields.size("num_experts"),
            top_k=fields.size("num_experts_per_tok"),
            moe_intermediate_size=fields.size("intermediate_size"),
            score_func="softmax",
            norm_topk_prob=False,
        ),
        activation="gelu",
        tied=True,
        norm_placement="both",
        ffn="geglu",
        embedding_multiplier=fields.take(float, "embedding_multiplier_scale"),
        logit_multiplier=fields.take(float, "output_multiplier_scale"),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    attention = write_gqa(config)
    assert config.attention is not None
    if config.moe is None:
        raise ValueError("moe = None: every layer of this family has experts")
    return {
        **write_decoder(config),
        **attention,
        "hidden_act": "gelu",
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "attn_output_multiplier": config.attention.head_dim**-0.5,
        "max_attn_value": config.attention.logit_softcap,
        "embedding_multiplier_scale": config.embedding_multiplier,
        "output_multiplier_scale": config.logit_multiplier,
    }


def _map_weights(config: ModelConfig, layout: Layout) -> list[Op]:
    ops: list[Op] = [
        Rename("model.embed_tokens.weight", "embed_tokens.weight"),
        Rename("model.norm.scale", "norm.weight"),
    ]
    if not config.tie_word_embeddings:
        ops.append(Rename("lm_head.weight", "lm_head.weight"))
    for i in range(config.num_layers):
        ops.extend(_map_block(config, f"model.layers.{i}", f"layers.{i}"))
    return ops


def _map_block(config: ModelConfig, theirs: str, ours: str) -> Iterator[Op]:
    """``linear`` is the gate, ``linear_v`` what it gates, ``linear_1`` the way down."""
    assert config.moe is not None
    for their_norm, our_norm in NORMS.items():
        yield Rename(f"{theirs}.{their_norm}.scale", f"{ours}.{our_norm}.weight")
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield Rename(f"{theirs}.attn.{part}.weight", f"{ours}.mixer.{part}.weight")
    yield Rename(f"{theirs}.moe_block.gate.weight", f"{ours}.ffn.router.weight")
    experts = [f"{theirs}.moe_block.experts.{e}" for e in range(config.moe.num_experts)]
    gate_up = tuple(f"{expert}.{part}.weight" for expert in experts for part in ("linear", "linear_v"))
    yield Stack(gate_up, f"{ours}.ffn.experts.gate_up", leading=(config.moe.num_experts, 2))
    down = tuple(f"{expert}.linear_1.weight" for expert in experts)
    yield Stack(down, f"{ours}.ffn.experts.down", leading=(config.moe.num_experts,))


FAMILY = Family(
    name="grok1",
    model_type="grok-1",
    architectures=("Grok1ModelForCausalLM",),
    read=_read,
    write=_write,
    map_weights=_map_weights,
)
