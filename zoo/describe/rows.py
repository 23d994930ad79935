"""An architecture as the rows of a table that a person would put into a paper.

Every field of ``ModelConfig`` has its row: those of ``LABELS`` under their usual names, others under their own. A field
that is left at its default has none, so that what two models both lack does not fill the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zoo.accounting import cache_elements_per_token, count_parameters, forward_flops
from zoo.cli.text import short
from zoo.config import AttentionConfig, ModelConfig

NONE = "–"
"""What a table shows where a model has no such row."""

FLOPS_AT = 4096
"""Tokens of the sequence that FLOPs are averaged over."""

LABELS: dict[str, tuple[str, str]] = {
    "num_layers": ("Model", "layers"),
    "hidden_size": ("Model", "hidden size"),
    "vocab_size": ("Model", "vocabulary"),
    "max_position_embeddings": ("Model", "context, tokens"),
    "tie_word_embeddings": ("Model", "tied embeddings"),
    "mtp_depth": ("Model", "MTP modules"),
    "norm": ("Model", "norm"),
    "norm_placement": ("Model", "norms stand"),
    "norm_eps": ("Model", "norm ε"),
    "embedding_multiplier": ("Model", "embedding multiplier"),
    "logit_multiplier": ("Model", "logit multiplier"),
    "logit_softcap": ("Model", "logit soft cap"),
    "initializer_range": ("Model", "initial deviation"),
    "mixer": ("Attention", "kind"),
    "attention.num_heads": ("Attention", "heads"),
    "mla.num_heads": ("Attention", "heads"),
    "attention.num_kv_heads": ("Attention", "key/value heads"),
    "attention.head_dim": ("Attention", "head size"),
    "mla.qk_nope_head_dim": ("Attention", "query/key size without positions"),
    "mla.qk_rope_head_dim": ("Attention", "query/key size with rotary"),
    "mla.v_head_dim": ("Attention", "value size"),
    "mla.kv_lora_rank": ("Attention", "key/value latent"),
    "mla.q_lora_rank": ("Attention", "query latent"),
    "attention.qkv_bias": ("Attention", "biases of q, k, v"),
    "attention.output_bias": ("Attention", "bias of the output"),
    "attention.qk_norm": ("Attention", "RMSNorm of q and k over"),
    "attention.sliding_window": ("Attention", "sliding window"),
    "attention.full_attention_interval": ("Attention", "without window: every so-manieth layer"),
    "attention.query_scale_dim": ("Attention", "scores divided by the root of"),
    "attention.logit_softcap": ("Attention", "score soft cap"),
    "attention.sinks": ("Attention", "sinks"),
    "attention.clip_qkv": ("Attention", "q, k, v clamped to ±"),
    "mamba_layers": ("Mamba", "layers in place of attention"),
    "mamba.attention_interval": ("Mamba", "attention in every so-manieth layer"),
    "mamba.attention_offset": ("Mamba", "first layer with attention, from 0"),
    "mamba.state_size": ("Mamba", "state of a channel"),
    "mamba.expand": ("Mamba", "channels over hidden size"),
    "mamba.conv_width": ("Mamba", "convolution, tokens"),
    "mamba.dt_rank": ("Mamba", "rank of the time steps"),
    "attention.relative_positions.num_buckets": ("Positions", "relative, buckets of distances"),
    "attention.relative_positions.max_distance": ("Positions", "relative, last bucket from, tokens"),
    "rope.theta": ("Positions", "rotary base θ"),
    "rope.layout": ("Positions", "rotary pairs"),
    "rope.yarn.factor": ("Positions", "YaRN factor"),
    "rope.yarn.original_max_position": ("Positions", "YaRN from, tokens"),
    "rope.yarn.beta_fast": ("Positions", "YaRN β fast, turns"),
    "rope.yarn.beta_slow": ("Positions", "YaRN β slow, turns"),
    "rope.yarn.attention_factor": ("Positions", "YaRN factor on cos and sin"),
    "rope.yarn.mscale_all_dim": ("Positions", "YaRN mscale_all_dim"),
    "rope.llama3.factor": ("Positions", "Llama 3 factor"),
    "rope.llama3.original_max_position": ("Positions", "Llama 3 from, tokens"),
    "ffn": ("Feed-forward", "FFN"),
    "intermediate_size": ("Feed-forward", "dense width"),
    "moe_layers": ("Experts", "layers with experts"),
    "moe.first_k_dense": ("Experts", "first layers without"),
    "moe.layer_interval": ("Experts", "only every so-manieth layer"),
    "moe.num_experts": ("Experts", "experts"),
    "moe.top_k": ("Experts", "of them for a token"),
    "moe.num_shared_experts": ("Experts", "shared experts"),
    "moe.shared_expert_gate": ("Experts", "gate of the shared experts"),
    "moe.moe_intermediate_size": ("Experts", "width of one"),
    "moe.ffn": ("Experts", "FFN of one"),
    "moe.dense_ffn": ("Experts", "dense FFN after them"),
    "moe.score_func": ("Experts", "router scores"),
    "moe.router_logit_bias": ("Experts", "bias of the logits"),
    "moe.router_bias": ("Experts", "selection bias"),
    "moe.num_groups": ("Experts", "groups"),
    "moe.top_k_groups": ("Experts", "of them for a token (groups)"),
    "moe.group_score": ("Experts", "score of a group"),
    "moe.norm_topk_prob": ("Experts", "weights renormalised"),
    "moe.routed_scaling_factor": ("Experts", "weights multiplied by"),
    "moe.scaled_input": ("Experts", "weight on the input"),
    "moe.swiglu_limit": ("Experts", "biases, and gate clamped to ±"),
    "total": ("Cost", "parameters"),
    "active": ("Cost", "active parameters"),
    "flops": ("Cost", f"forward FLOPs per token at {FLOPS_AT:,}"),
    "cache": ("Cost", "KV cache per token in bf16, bytes"),
}
"""Path of a field, or name of a derived row → (section, label), in the order of the table."""

WORDS = {
    "rms": "RMSNorm",
    "unit_offset_rms": "RMSNorm, 1 + γ",
    "layer": "LayerNorm",
    "swiglu": "SwiGLU",
    "geglu": "GEGLU",
    "relu": "ReLU without gate",
    "top2_sum": "sum of its two best",
    "max": "its best",
    "before": "before sub-blocks",
    "after": "after sub-blocks",
    "both": "before and after",
    "head": "each head",
    "projection": "all heads",
    "split": "i, i + d/2",
    "interleaved": "2i, 2i + 1",
}
"""Values of fields that list theirs, as papers write them."""

COUNTED = ("total", "active", "flops")


@dataclass(frozen=True)
class Row:
    """One property of one model."""

    section: str
    label: str
    value: Any
    """As a script reads it."""
    text: str
    """As a person does."""


def describe(config: ModelConfig) -> dict[tuple[str, str], Row]:
    """(section, label) → row, in the order of the table."""
    values = dict(_fields(config)) | dict(_derived(config))
    order = {path: i for i, path in enumerate(LABELS)}
    found = {}
    for path in sorted(values, key=lambda p: order.get(p, len(order))):
        section, label = LABELS.get(path) or _own_label(path)
        found[section, label] = Row(section, label, values[path], _text(path, values[path]))
    return found


def attention_kind(attention: AttentionConfig) -> str:
    """The usual name, by the number of key/value heads."""
    if attention.num_kv_heads == attention.num_heads:
        return "multi-head"
    return "multi-query" if attention.num_kv_heads == 1 else "grouped-query"


def _fields(block: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of what is given in ``block`` and the blocks in it: required, listed or off its default."""
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        elif value != field.default or isinstance(value, str):
            yield f"{prefix}{field.name}", value


def _derived(config: ModelConfig) -> Iterator[tuple[str, Any]]:
    if config.mla:
        yield "mixer", "latent (MLA)"
    elif config.attention:
        yield "mixer", attention_kind(config.attention)
    if config.mamba:
        layers = sum(config.is_mamba_layer(layer) for layer in range(config.num_layers))
        yield "mamba_layers", f"{layers} of {config.num_layers}"
    experts = sum(config.is_moe_layer(layer) for layer in range(config.num_layers))
    if experts:
        yield "moe_layers", f"{experts} of {config.num_layers}"
    if experts == config.num_layers:
        yield "intermediate_size", None  # nothing has this width
    if config.moe and config.moe.num_groups == 1:
        yield "moe.group_score", None
    parameters = count_parameters(config)
    yield "total", parameters.total
    yield "active", parameters.active
    yield "flops", forward_flops(config, FLOPS_AT)
    yield "cache", 2 * cache_elements_per_token(config)


def _own_label(path: str) -> tuple[str, str]:
    """Of a field that has no other name: the block that it stands in, and its own."""
    *blocks, name = path.split(".")
    section = {"attention": "Attention", "mla": "Attention", "rope": "Positions", "moe": "Experts"}
    first = section.get(blocks[0], blocks[0].capitalize()) if blocks else "Model"
    return first, " ".join([*blocks[1:], name]).replace("_", " ")


def _text(path: str, value: Any) -> str:
    if path in COUNTED:
        return short(value)
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return WORDS.get(value, value.replace("_", " "))
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """All digits of ``value``, as short as they are: 10,000 and 1e-06."""
    if value == int(value) and 1 <= abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
