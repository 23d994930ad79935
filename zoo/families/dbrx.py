"""DBRX (databricks/dbrx-base, published code): clamped q, k and v, LayerNorm, experts stored as three matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from zoo.families.base import Family, Layout
from zoo.families.fields import Fields
from zoo.families.parts import write_gqa
from zoo.weights.ops import Op, Rename, Split, Stack
from zoo.weights.rearrange import Chain, Cut, Transpose

LAYER_NORM_EPS = 1e-5
"""Of torch's LayerNorm, which the published code leaves as it is."""

CLASS_FIELDS = (
    "chunk_size_feed_forward",
    "diversity_penalty",
    "encoder_no_repeat_ngram_size",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "problem_type",
    "pruned_heads",
    "repetition_penalty",
    "temperature",
    "tie_word_embeddings",
    "top_k",
    "top_p",
    "typical_p",
)
"""What transformers writes into a config within another one: defaults of sampling and of other tasks, and no part of
the model, whose embedding is tied or not by the file's own field."""


def _read(fields: Fields) -> ModelConfig:
    fields.expect("resid_pdrop", 0)
    fields.expect("emb_pdrop", 0)
    fields.expect("tie_word_embeddings", False)
    moe = _read_moe(fields)
    attention, theta = _read_attention(fields)
    return ModelConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("d_model"),
        num_layers=fields.size("n_layers"),
        intermediate_size=moe.moe_intermediate_size,
        max_position_embeddings=fields.size("max_seq_len"),
        norm_eps=LAYER_NORM_EPS,
        rope=RopeConfig(theta=theta),
        attention=attention,
        moe=moe,
        norm="layer",
        initializer_range=fields.take(float, "initializer_range", 0.02),
    )


def _read_attention(fields: Fields) -> tuple[AttentionConfig, float]:
    """With the base of the rotary frequencies, which stands in the same section."""
    section = fields.section("attn_config")
    section.skip(*CLASS_FIELDS)
    section.expect("attn_pdrop", 0)
    theta = section.take(float, "rope_theta")
    fields.expect("rope_theta", theta)
    # transformers 5 takes 10 000 where a published file says its base in attn_config only, and writes that down.
    rope = fields.section("rope_parameters")
    rope.expect("rope_theta", theta, 10_000)
    rope.expect("rope_type", "default")
    rope.finish()
    num_heads, num_kv_heads = fields.size("n_heads"), section.size("kv_n_heads")
    fields.expect("num_key_value_heads", num_kv_heads)
    attention = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.size("d_model") // num_heads,
        clip_qkv=section.optional(float, "clip_qkv"),
    )
    section.finish()
    return attention, theta


def _read_moe(fields: Fields) -> MoEConfig:
    section = fields.section("ffn_config")
    # Losses and jitter are of training.
    section.skip(*CLASS_FIELDS, "moe_loss_weight", "moe_jitter_eps")
    section.expect("hidden_size", fields.size("d_model"))
    section.expect("ffn_act_fn", {"name": "silu"})
    # The norm that weights are divided by: with p = 1 the sum.
    section.expect("moe_normalize_expert_weights", 1)
    moe = MoEConfig(
        num_experts=section.size("moe_num_experts"),
        top_k=section.size("moe_top_k"),
        moe_intermediate_size=section.size("ffn_hidden_size"),
        score_func="softmax",
        norm_topk_prob=True,
    )
    section.finish()
    return moe


def _write(config: ModelConfig) -> dict[str, Any]:
    write_gqa(config)
    attention, moe = config.attention, config.moe
    assert attention is not None
    if moe is None:
        raise ValueError("moe = None: every layer of this family has experts")
    if config.rope is None:
        raise ValueError("rope = None: this family has rotary positions")
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": attention.num_heads,
        "max_seq_len": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": False,
        "rope_theta": config.rope.theta,
        "attn_config": {
            "clip_qkv": attention.clip_qkv,
            "kv_n_heads": attention.num_kv_heads,
            "rope_theta": config.rope.theta,
        },
        "ffn_config": {
            "ffn_hidden_size": moe.moe_intermediate_size,
            "moe_num_experts": moe.num_experts,
            "moe_top_k": moe.top_k,
        },
    }


def _map_weights(config: ModelConfig, layout: Layout) -> list[Op]:
    ops: list[Op] = [
        Rename("transformer.wte.weight", "embed_tokens.weight"),
        Rename("transformer.norm_f.weight", "norm.weight"),
        Rename("lm_head.weight", "lm_head.weight"),
    ]
    for i in range(config.num_layers):
        ops.extend(_map_block(config, f"transformer.blocks.{i}", f"layers.{i}"))
    return ops


def _map_block(config: ModelConfig, theirs: str, ours: str) -> Iterator[Op]:
    attention, moe = config.attention, config.moe
    assert attention is not None and moe is not None
    mixer, experts = f"{theirs}.norm_attn_norm", f"{theirs}.ffn.experts.mlp"
    yield Rename(f"{mixer}.norm_1.weight", f"{ours}.mixer_norm.weight")
    yield Rename(f"{mixer}.norm_2.weight", f"{ours}.ffn_norm.weight")
    yield Cut(
        f"{mixer}.attn.Wqkv.weight",
        tuple(f"{ours}.mixer.{part}_proj.weight" for part in "qkv"),
        tuple(heads * attention.head_dim for heads in (attention.num_heads, *[attention.num_kv_heads] * 2)),
    )
    yield Rename(f"{mixer}.attn.out_proj.weight", f"{ours}.mixer.o_proj.weight")
    yield Rename(f"{theirs}.ffn.router.layer.weight", f"{ours}.ffn.router.weight")
    yield Chain(
        (
            Stack((f"{experts}.w1", f"{experts}.v1"), "[2, E·F, D]", leading=(2,)),
            Split("[2, E·F, D]", "[2, E, F, D]", dim=1, parts=moe.num_experts),
            Transpose("[2, E, F, D]", f"{ours}.ffn.experts.gate_up", (1, 0, 2, 3)),
        )
    )
    yield Chain(
        (
            Split(f"{experts}.w2", "[E, F, D]", dim=0, parts=moe.num_experts),
            Transpose("[E, F, D]", f"{ours}.ffn.experts.down", (0, 2, 1)),
        )
    )


FAMILY = Family(
    name="dbrx",
    model_type="dbrx",
    architectures=("DbrxForCausalLM",),
    read=_read,
    write=_write,
    map_weights=_map_weights,
)
