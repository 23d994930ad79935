"""The blocks that published configs share: rotary positions, attention and the decoder around them.

Each block has a reader (published fields → our dataclass) and a writer. The writers use the spelling of transformers 4
(``rope_theta``, ``rope_scaling``), which version 5 reads too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from zoo.config import (
    AttentionConfig,
    LinearScaling,
    Llama3Scaling,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    YarnScaling,
    yarn_mscale,
)
from zoo.families.fields import Fields


def read_decoder(
    fields: Fields,
    *,
    rope: RopeConfig | None,
    attention: AttentionConfig | None = None,
    mla: MLAConfig | None = None,
    moe: MoEConfig | None = None,
    activation: str = "silu",
    tied: bool = False,
    width: str = "intermediate_size",
    **fixed: Any,
) -> ModelConfig:
    """The fields around the blocks, which all families spell alike.

    Args:
        fields: of the config.json.
        rope: positions; None for a family without rotary ones.
        attention: or ``mla``.
        mla: or ``attention``.
        moe: of the layers with experts.
        activation: the one name of ``hidden_act`` that the family's FFN has.
        tied: whether the embedding is the output head where the file does not say.
        width: name of the width of the dense FFN.
        fixed: fields of ``ModelConfig`` that follow from the family.
    """
    fields.expect("hidden_act", activation)
    fields.expect("attention_dropout", 0)
    return ModelConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("hidden_size"),
        num_layers=fields.size("num_hidden_layers"),
        intermediate_size=fields.size(width),
        max_position_embeddings=fields.size("max_position_embeddings"),
        norm_eps=fields.take(float, "rms_norm_eps"),
        rope=rope,
        attention=attention,
        mla=mla,
        moe=moe,
        tie_word_embeddings=fields.take(bool, "tie_word_embeddings", tied),
        initializer_range=fields.take(float, "initializer_range", 0.02),
        **fixed,
    )


def write_decoder(config: ModelConfig) -> dict[str, Any]:
    """Inverse of ``read_decoder``, rotary positions included where there are any."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **({} if config.rope is None else _write_rope(config.rope)),
    }


def read_gqa(
    fields: Fields,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: Literal["head", "projection"] | None = None,
    sliding_window: int | None = None,
    **fixed: Any,
) -> AttentionConfig:
    """Heads of multi-head or grouped-query attention; biases, norms and windows are spelled differently by family."""
    num_heads = fields.size("num_attention_heads")
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=fields.take(int, "num_key_value_heads", num_heads),
        head_dim=fields.take(int, "head_dim", fields.size("hidden_size") // num_heads),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=qk_norm,
        sliding_window=sliding_window,
        **fixed,
    )


def write_gqa(config: ModelConfig) -> dict[str, Any]:
    """Inverse of ``read_gqa``.

    Raises:
        ValueError: the model has latent attention.
    """
    if config.attention is None:
        raise ValueError("mla: this family has grouped-query attention only")
    return {
        "num_attention_heads": config.attention.num_heads,
        "num_key_value_heads": config.attention.num_kv_heads,
        "head_dim": config.attention.head_dim,
    }


def read_mla(fields: Fields) -> MLAConfig:
    """Latent attention; the key and value head counts that DeepSeek's files repeat must agree with it."""
    heads = fields.size("num_attention_heads")
    nope, rope = fields.take(int, "qk_nope_head_dim"), fields.take(int, "qk_rope_head_dim")
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    fields.expect("num_key_value_heads", heads)
    fields.expect("head_dim", rope)
    fields.expect("qk_head_dim", nope + rope)
    # The published code normalises the latents with 1e-6 whatever the config says; with one eps, both must be 1e-6.
    fields.expect("rms_norm_eps", 1e-6)
    return MLAConfig(
        num_heads=heads,
        kv_lora_rank=fields.take(int, "kv_lora_rank"),
        q_lora_rank=fields.optional(int, "q_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=fields.take(int, "v_head_dim"),
    )


def write_mla(config: ModelConfig) -> dict[str, Any]:
    """Inverse of ``read_mla``.

    Raises:
        ValueError: the model has grouped-query attention.
    """
    if config.mla is None:
        raise ValueError("attention: this family has latent attention (mla) only")
    return {
        "num_attention_heads": config.mla.num_heads,
        "num_key_value_heads": config.mla.num_heads,
        "kv_lora_rank": config.mla.kv_lora_rank,
        "q_lora_rank": config.mla.q_lora_rank,
        "qk_nope_head_dim": config.mla.qk_nope_head_dim,
        "qk_rope_head_dim": config.mla.qk_rope_head_dim,
        "v_head_dim": config.mla.v_head_dim,
        "attention_bias": False,
    }


def expect_full_attention(fields: Fields) -> None:
    """Refuse Qwen2's windows, which only some layers have; their size is in the file even where they are off."""
    fields.expect("use_sliding_window", False)
    fields.skip("sliding_window", "max_window_layers")
    for layer_type in fields.sequence("layer_types"):
        if layer_type != "full_attention":
            raise ValueError(f"{fields.where}: layer_types has {layer_type!r}; only 'full_attention' is supported")


def expect_alternating_windows(fields: Fields) -> None:
    """Refuse any ``layer_types`` but a sliding window in the first layer and every other one after it."""
    kinds = fields.sequence("layer_types")
    if kinds and kinds != (["sliding_attention", "full_attention"] * len(kinds))[: len(kinds)]:
        raise ValueError(
            f"{fields.where}: layer_types = {kinds} is not supported; only 'sliding_attention' and 'full_attention' in "
            "turn are"
        )


def leading_dense_layers(fields: Fields) -> int:
    """Number of first layers without experts, from Qwen's ``mlp_only_layers`` and ``decoder_sparse_step``."""
    fields.expect("decoder_sparse_step", 1)
    dense = fields.sequence("mlp_only_layers")
    if dense != list(range(len(dense))):
        raise ValueError(
            f"{fields.where}: mlp_only_layers = {dense} is not supported; dense layers must be the first ones"
        )
    return len(dense)


def read_rope(
    fields: Fields, layout: Literal["split", "interleaved"] = "split", default_theta: float = 10_000.0
) -> RopeConfig:
    """Rotary positions from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4)."""
    where = "rope_parameters" if fields.raw("rope_parameters") else "rope_scaling"
    if fields.raw("rope_parameters") and fields.raw("rope_scaling"):
        raise ValueError(f"{fields.where}: both rope_parameters and rope_scaling are given; remove one")
    scaling = fields.section(where)
    theta = scaling.optional(float, "rope_theta") or fields.take(float, "rope_theta", default_theta)
    fields.expect("partial_rotary_factor", 1)
    scaling.expect("partial_rotary_factor", 1)
    kind = scaling.raw("rope_type", scaling.raw("type", "default"))
    scaling.skip("type")
    readers = {"default": lambda *_: {}, "linear": _read_linear, "llama3": _read_llama3, "yarn": _read_yarn}
    if kind not in readers:
        raise ValueError(f"{scaling.where}: rope_type = {kind!r} is not supported; use one of {', '.join(readers)}")
    rope = RopeConfig(theta=theta, layout=layout, **readers[kind](scaling, fields.size("max_position_embeddings")))
    scaling.finish()
    return rope


def _read_linear(scaling: Fields, max_position: int) -> dict[str, Any]:
    return {"linear": LinearScaling(factor=scaling.take(float, "factor"))}


def _read_llama3(scaling: Fields, max_position: int) -> dict[str, Any]:
    return {
        "llama3": Llama3Scaling(
            factor=scaling.take(float, "factor"),
            low_freq_factor=scaling.take(float, "low_freq_factor"),
            high_freq_factor=scaling.take(float, "high_freq_factor"),
            original_max_position=scaling.size("original_max_position_embeddings", max_position),
        )
    }


def _read_yarn(scaling: Fields, max_position: int) -> dict[str, Any]:
    original = scaling.size("original_max_position_embeddings", max_position)
    # 0 stands for "not given" in DeepSeek's configs.
    mscale = scaling.optional(float, "mscale") or None
    mscale_all_dim = scaling.optional(float, "mscale_all_dim") or None
    if (mscale is None) != (mscale_all_dim is None):
        raise ValueError(
            f"{scaling.where}: mscale = {mscale} with mscale_all_dim = {mscale_all_dim} is not supported: published "
            "implementations disagree about it; give both or neither"
        )
    factor = scaling.take(float, "factor", max_position / original)
    attention_factor = scaling.optional(float, "attention_factor")
    if attention_factor is None:
        attention_factor = yarn_mscale(factor)
        if mscale and mscale_all_dim:
            attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return {
        "yarn": YarnScaling(
            factor=factor,
            original_max_position=original,
            beta_fast=scaling.optional(float, "beta_fast") or 32.0,
            beta_slow=scaling.optional(float, "beta_slow") or 1.0,
            attention_factor=attention_factor,
            mscale_all_dim=mscale_all_dim,
            truncate=scaling.take(bool, "truncate", True),
        )
    }


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if rope.linear:
        scaling = _typed("linear", {"factor": rope.linear.factor})
    elif rope.llama3:
        scaling = _typed("llama3", vars(rope.llama3))
    elif rope.yarn:
        scaling = _typed("yarn", {**vars(rope.yarn), "mscale": _mscale(rope.yarn)})
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _mscale(yarn: YarnScaling) -> float | None:
    """What DeepSeek's code, which knows no ``attention_factor``, divides by the mscale of ``mscale_all_dim`` to get it.

    Without ``mscale_all_dim`` their code scales cos and sin by the paper's factor, and there is nothing to say.
    """
    if yarn.mscale_all_dim is None or yarn.attention_factor == 1 or yarn.factor == 1:
        return yarn.mscale_all_dim
    wanted = yarn.attention_factor * yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return (wanted - 1) / (yarn_mscale(yarn.factor) - 1)


def _typed(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A ``rope_scaling`` block: transformers reads ``rope_type``, the published DeepSeek code ``type``."""
    spelled = {{"original_max_position": "original_max_position_embeddings"}.get(k, k): v for k, v in values.items()}
    return {"rope_type": kind, "type": kind, **{k: v for k, v in spelled.items() if v is not None}}
