"""What ``zoo.config`` refuses: values that no model can have, and blocks that do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.config import (
        AttentionConfig,
        InterleavedRopeConfig,
        MambaConfig,
        ModelConfig,
        MoEConfig,
        RelativePositionConfig,
        RopeConfig,
    )
    from zoo.config_routing import RoutingConfig


def validate(c: ModelConfig) -> None:
    """Raise ``ValueError`` naming the field, its value and the fix."""
    sizes = ("vocab_size", "hidden_size", "num_layers", "intermediate_size", "max_position_embeddings")
    for field in sizes:
        _require(getattr(c, field) >= 1, field, getattr(c, field), "give a positive integer")
    _require(c.mtp_depth >= 0, "mtp_depth", c.mtp_depth, "give how many tokens beyond the next are predicted, or 0")
    _require(c.norm_eps > 0, "norm_eps", c.norm_eps, "give a positive number such as 1e-6")
    _require(
        (c.attention is None) != (c.mla is None),
        "attention / mla",
        "both" if c.attention else "neither",
        "give exactly one of the two blocks",
    )
    _require(
        c.embedding_multiplier is None or c.embedding_multiplier > 0,
        "embedding_multiplier",
        c.embedding_multiplier,
        "give a positive factor, or null for none",
    )
    _require(
        c.logit_multiplier is None or c.logit_multiplier > 0,
        "logit_multiplier",
        c.logit_multiplier,
        "give a positive factor, or null for none",
    )
    _require(
        c.logit_softcap is None or c.logit_softcap > 0, "logit_softcap", c.logit_softcap, "give a positive cap, or null"
    )
    scalings = [name for name in ("logit_multiplier", "logit_softcap") if getattr(c, name) is not None]
    _require(len(scalings) <= 1, "logits", " + ".join(scalings), "give at most one of these")
    if c.attention:
        _validate_attention(c.attention)
    if c.mla:
        _require(
            c.mla.qk_rope_head_dim % 2 == 0, "mla.qk_rope_head_dim", c.mla.qk_rope_head_dim, "rotary needs an even size"
        )
    if c.mamba:
        _validate_mamba(c.mamba)
    relative = c.attention is not None and c.attention.relative_positions is not None
    if c.rope:
        _validate_rope(c.rope)
        _require(not relative, "rope", "given", "attention.relative_positions take its place; give rope: null")
    else:
        plain = c.attention is not None and not _kinds(c.attention)
        _require(plain or relative, "rope", None, "only plain attention goes without; give its theta")
    _require(0 <= c.dropout < 1, "dropout", c.dropout, "give a probability below 1, or 0 for none")
    if c.moe:
        _validate_moe(c.moe, c.num_layers)
        _validate_experts(c, c.moe)
        hashed = c.moe.routing is not None and c.moe.routing.choice == "hash"
        _require(not (hashed and c.mtp_depth), "mtp_depth", c.mtp_depth, "MTP modules cannot hash the tokens ahead; 0")


def _validate_experts(c: ModelConfig, m: MoEConfig) -> None:
    """What an expert computes."""
    _require(
        m.swiglu_limit is None or c.expert_ffn == "swiglu",
        "ffn",
        c.expert_ffn,
        "experts with a swiglu_limit are swiglu; use that, or drop the limit",
    )
    _require(
        not m.expert_dropout or (m.swiglu_limit is None and c.expert_ffn != "relu"),
        "moe.expert_dropout",
        m.expert_dropout,
        "experts with a swiglu_limit or without a gate have none; set it to 0",
    )
    _require(
        not (m.dense_ffn and c.mtp_depth), "mtp_depth", c.mtp_depth, "MTP modules have no FFN after their experts; 0"
    )


def _validate_mamba(m: MambaConfig) -> None:
    least = {"attention_interval": 2, "state_size": 1, "expand": 1, "conv_width": 1, "dt_rank": 1}
    for field, smallest in least.items():
        value = getattr(m, field)
        _require(value >= smallest, f"mamba.{field}", value, f"give {smallest} or more")
    _require(
        0 <= m.attention_offset < m.attention_interval,
        "mamba.attention_offset",
        m.attention_offset,
        f"it must lie between 0 and attention_interval - 1 = {m.attention_interval - 1}",
    )


def _validate_rope(r: RopeConfig) -> None:
    _require(r.theta > 0, "rope.theta", r.theta, "give a positive number such as 10000.0")
    scalings = [(n, getattr(r, n)) for n in ("linear", "llama3", "yarn") if getattr(r, n) is not None]
    _require(len(scalings) <= 1, "rope", " + ".join(n for n, _ in scalings), "give at most one scaling")
    for name, scaling in scalings:
        _require(scaling.factor >= 1, f"rope.{name}.factor", scaling.factor, "give how many times longer, at least 1")
        if name != "linear":
            length = scaling.original_max_position
            _require(length >= 1, f"rope.{name}.original_max_position", length, "give a positive number of tokens")
    if r.llama3:
        low, high = r.llama3.low_freq_factor, r.llama3.high_freq_factor
        _require(
            0 < low <= high, "rope.llama3.low_freq_factor", low, f"it must lie between 0 and high_freq_factor = {high}"
        )
    if r.yarn:
        fast, slow = r.yarn.beta_fast, r.yarn.beta_slow
        _require(fast > slow > 0, "rope.yarn.beta_slow", slow, f"it must lie between 0 and beta_fast = {fast}")
        scale = r.yarn.attention_factor
        _require(scale > 0, "rope.yarn.attention_factor", scale, "give a positive factor on cos and sin, such as 1.0")


def _validate_attention(a: AttentionConfig) -> None:
    kinds = _kinds(a)
    _require(len(kinds) <= 1, "attention", " + ".join(kinds), "give at most one of these")
    _require(
        a.clip_qkv is None or a.clip_qkv > 0,
        "attention.clip_qkv",
        a.clip_qkv,
        "give a positive bound, or null for none",
    )
    _require(a.num_heads >= 1, "attention.num_heads", a.num_heads, "give a positive integer")
    _require(a.num_kv_heads >= 1, "attention.num_kv_heads", a.num_kv_heads, "give a positive integer")
    _require(
        a.num_heads % a.num_kv_heads == 0,
        "attention.num_kv_heads",
        a.num_kv_heads,
        f"it must divide num_heads = {a.num_heads}",
    )
    _require(a.head_dim % 2 == 0, "attention.head_dim", a.head_dim, "rotary needs an even size")
    if a.interleaved_rope:
        _require(a.sliding_window is None, "attention.sliding_window", a.sliding_window, "chunks take its place; null")
        _validate_interleaved_rope(a.interleaved_rope)
    if a.relative_positions:
        validate_relative_positions(a.relative_positions, "attention.relative_positions")
    _require(
        a.sliding_window is None or a.sliding_window >= 1,
        "attention.sliding_window",
        a.sliding_window,
        "give a positive number of tokens, or null for full attention",
    )
    _require(
        a.full_attention_interval is None or (a.full_attention_interval >= 2 and a.sliding_window is not None),
        "attention.full_attention_interval",
        a.full_attention_interval,
        "give 2 or more with a sliding_window, or null for equal layers",
    )
    _require(
        a.query_scale_dim is None or a.query_scale_dim >= 1,
        "attention.query_scale_dim",
        a.query_scale_dim,
        "give a positive integer, or null for head_dim",
    )
    _require(
        a.logit_softcap is None or a.logit_softcap > 0,
        "attention.logit_softcap",
        a.logit_softcap,
        "give a positive cap, or null for none",
    )


def _kinds(a: AttentionConfig) -> list[str]:
    """The fields that make another attention than the plain one."""
    kinds = ("logit_softcap", "sinks", "clip_qkv", "interleaved_rope", "relative_positions")
    return [n for n in kinds if getattr(a, n)]


def validate_relative_positions(p: RelativePositionConfig, name: str) -> None:
    """Raise ``ValueError`` where the buckets of the block ``name`` cannot be told apart."""
    buckets, distance = p.num_buckets, p.max_distance
    _require(buckets >= 4 and buckets % 2 == 0, f"{name}.num_buckets", buckets, "give an even number from 4")
    _require(
        distance > buckets // 2, f"{name}.max_distance", distance, f"it must exceed half of num_buckets = {buckets}"
    )


def _validate_interleaved_rope(r: InterleavedRopeConfig) -> None:
    for field, least in (("full_attention_interval", 2), ("chunk_size", 1), ("temperature_floor", 1)):
        value = getattr(r, field)
        _require(value >= least, f"attention.interleaved_rope.{field}", value, f"give {least} or more")


def _validate_moe(m: MoEConfig, num_layers: int) -> None:
    _require(m.num_experts >= 1, "moe.num_experts", m.num_experts, "give a positive integer")
    _require(m.moe_intermediate_size >= 1, "moe.moe_intermediate_size", m.moe_intermediate_size, "give a positive size")
    _require(
        1 <= m.top_k <= m.num_experts,
        "moe.top_k",
        m.top_k,
        f"it must be between 1 and num_experts = {m.num_experts}",
    )
    _require(
        not (m.top_k == 1 and m.norm_topk_prob),
        "moe.top_k",
        1,
        "with norm_topk_prob = true the only weight is always 1 and the router gets no gradient from the "
        "language-model loss; set norm_topk_prob: false or top_k >= 2",
    )
    _require(
        m.num_groups >= 1 and m.num_experts % m.num_groups == 0,
        "moe.num_groups",
        m.num_groups,
        f"it must divide num_experts = {m.num_experts}",
    )
    _require(
        1 <= m.top_k_groups <= m.num_groups,
        "moe.top_k_groups",
        m.top_k_groups,
        f"it must be between 1 and num_groups = {m.num_groups}",
    )
    group_size = m.num_experts // m.num_groups
    _require(
        m.top_k <= m.top_k_groups * group_size,
        "moe.top_k",
        m.top_k,
        f"top_k_groups = {m.top_k_groups} groups hold only {m.top_k_groups * group_size} experts",
    )
    _require(
        m.group_score != "top2_sum" or group_size >= 2,
        "moe.group_score",
        m.group_score,
        f"groups of {group_size} expert have no two best scores; use max",
    )
    _require(
        m.swiglu_limit is None or m.swiglu_limit > 0,
        "moe.swiglu_limit",
        m.swiglu_limit,
        "give a positive limit, or null for experts without biases and limit",
    )
    _require(m.num_shared_experts >= 0, "moe.num_shared_experts", m.num_shared_experts, "give 0 or more")
    _require(
        not m.shared_expert_gate or m.num_shared_experts > 0,
        "moe.shared_expert_gate",
        True,
        "there is no shared expert to gate; set num_shared_experts >= 1",
    )
    _require(not (m.scaled_input and m.top_k > 1), "moe.scaled_input", True, "only one expert takes it; set top_k: 1")
    _require(
        1 <= m.layer_interval <= num_layers,
        "moe.layer_interval",
        m.layer_interval,
        f"at least one of the {num_layers} layers must be MoE; give a number from 1 to {num_layers}",
    )
    _require(
        0 <= m.first_k_dense < num_layers,
        "moe.first_k_dense",
        m.first_k_dense,
        f"at least one of the {num_layers} layers must be MoE; drop the moe block for a dense model",
    )
    _require(
        0 <= m.expert_dropout < 1, "moe.expert_dropout", m.expert_dropout, "give a probability below 1, or 0 for none"
    )
    if m.routing:
        _validate_routing(m.routing, m)


def _validate_routing(r: RoutingConfig, m: MoEConfig) -> None:
    for field in ("capacity_factor", "eval_capacity_factor", "second_expert_threshold"):
        value = getattr(r, field)
        _require(value is None or value > 0, f"moe.routing.{field}", value, "give a positive number, or null for none")
    for field in ("jitter", "router_dropout"):
        value = getattr(r, field)
        _require(0 <= value < 1, f"moe.routing.{field}", value, "give a number below 1, or 0 for none")
    if r.temperature:
        for field in ("start", "end", "steps"):
            value = getattr(r.temperature, field)
            _require(value > 0, f"moe.routing.temperature.{field}", value, "give a positive number")
    _require(
        r.second_expert_threshold is None or (m.top_k == 2 and m.routed_scaling_factor == 1),
        "moe.routing.second_expert_threshold",
        r.second_expert_threshold,
        "it is for two experts a token with unscaled weights; set top_k: 2 and routed_scaling_factor: 1, or drop it",
    )
    _require(
        not r.dense_training or m.top_k < m.num_experts,
        "moe.routing.dense_training",
        True,
        f"top_k = {m.top_k} are all experts anyway; drop it",
    )
    _require(not (m.scaled_input or m.router_logit_bias), "moe.routing", r.choice, _WITHOUT_ROUTING)
    unused = [field for field in _unused(r) if getattr(r, field)]
    unused += [field for field in _UNUSED_OF_MOE.get(r.choice, ()) if getattr(m, field)]
    if m.num_groups > 1 and r.choice != "token":
        unused.append("num_groups")
    _require(not unused, "moe.routing.choice", r.choice, f"{', '.join(unused)} would have no effect; drop it")


_WITHOUT_ROUTING = "routers with scaled_input or router_logit_bias have the plain one; drop the routing block"

_UNUSED_OF_MOE = {
    "expert": ("norm_topk_prob", "router_bias"),
    "sinkhorn": ("router_bias",),
    "hash": ("norm_topk_prob", "router_bias"),
}


def _unused(r: RoutingConfig) -> list[str]:
    """Fields that mean nothing beside ``choice`` or ``dense_training``."""
    limits = ["capacity_factor", "eval_capacity_factor", "second_expert_threshold"]
    if r.choice == "expert":
        return [*limits, "dense_training"]
    if r.choice == "sinkhorn":
        return ["dense_training"]
    if r.choice == "hash":
        return ["second_expert_threshold", "dense_training", "noise", "jitter", "router_dropout", "temperature"]
    return limits if r.dense_training else []


def _require(holds: bool, field: str, value: Any, fix: str) -> None:
    if not holds:
        raise ValueError(f"{field} = {value}: {fix}")
