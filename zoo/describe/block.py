"""What a drawing of one block shows: its parts in the order of the computation, each with a title and a few lines."""

from __future__ import annotations

from dataclasses import dataclass

from zoo.config import AttentionConfig, MambaConfig, MLAConfig, ModelConfig, MoEConfig
from zoo.config_routing import RoutingConfig
from zoo.describe.rows import WORDS, attention_kind, number


@dataclass(frozen=True)
class Part:
    """A box."""

    title: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experts:
    """The row of boxes below a router."""

    count: int
    shared: int
    line: str
    """What one of them is."""


@dataclass(frozen=True)
class SubBlock:
    """x + parts(x): a mixer or a feed-forward network and the norms around it."""

    before: tuple[Part, ...]
    main: Part
    experts: Experts | None
    after: tuple[Part, ...]


@dataclass(frozen=True)
class BlockDrawing:
    """One block of a model: its two sub-blocks, and how the other blocks differ from it."""

    width: int
    sub_blocks: tuple[SubBlock, ...]
    notes: tuple[str, ...]


def block_drawing(config: ModelConfig) -> BlockDrawing:
    """The block of the first layer that has experts, where the model has any."""
    moe_layers = [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]
    layer = moe_layers[0] if moe_layers else 0
    norm = Part(WORDS[config.norm])
    before = () if config.norm_placement == "after" else (norm,)
    after = () if config.norm_placement == "before" else (norm,)
    mixer = SubBlock(before, _mixer(config, layer), None, after)
    dense = SubBlock(before, Part(WORDS[config.ffn], (f"{config.intermediate_size:,} wide",)), None, after)
    ffns = [dense]
    if config.moe and moe_layers:
        sparse = SubBlock(before, _router(config.moe), _experts(config.moe, WORDS[config.expert_ffn]), after)
        ffns = [sparse, dense] if config.moe.dense_ffn else [sparse]
    return BlockDrawing(config.hidden_size, (mixer, *ffns), _notes(config, moe_layers))


def _mixer(config: ModelConfig, layer: int) -> Part:
    if config.mamba and config.is_mamba_layer(layer):
        return Part("Mamba", _mamba(config.mamba, config.hidden_size))
    if config.mla:
        return Part("Multi-head latent attention", (*_mla(config.mla), _positions(config)))
    assert config.attention is not None
    lines = [*_attention(config.attention), *([] if config.attention.interleaved_rope else [_positions(config)])]
    return Part(f"{attention_kind(config.attention).capitalize()} attention", tuple(lines))


def _mamba(m: MambaConfig, width: int) -> tuple[str, ...]:
    return (
        f"{m.expand * width:,} channels with a state of {m.state_size} each",
        f"convolution over {m.conv_width} tokens, time steps of rank {m.dt_rank}",
    )


def _mla(m: MLAConfig) -> list[str]:
    latents = f"latents: {m.kv_lora_rank:,} for keys and values"
    return [
        f"{m.num_heads} heads of {m.qk_nope_head_dim} + {m.qk_rope_head_dim} rotary, values of {m.v_head_dim}",
        latents + (f", {m.q_lora_rank:,} for queries" if m.q_lora_rank else ""),
    ]


def _attention(a: AttentionConfig) -> list[str]:
    heads = f"{a.num_heads} heads of {a.head_dim}"
    lines = [heads if a.num_kv_heads == a.num_heads else f"{heads}, {a.num_kv_heads} for keys and values"]
    if a.qkv_bias or a.output_bias:
        lines.append("biases of " + " and ".join(["q, k, v"] * a.qkv_bias + ["the output"] * a.output_bias))
    if a.qk_norm:
        lines.append(f"RMSNorm of q and k over {WORDS[a.qk_norm]}")
    if a.clip_qkv:
        lines.append(f"q, k, v clamped to ±{number(a.clip_qkv)}")
    if a.sliding_window:
        every = f", but in every {_ordinal(a.full_attention_interval)} layer" if a.full_attention_interval else ""
        lines.append(f"window of {a.sliding_window:,} tokens{every}")
    if a.logit_softcap:
        lines.append(f"scores capped at ±{number(a.logit_softcap)}")
    if a.sinks:
        lines.append("a learned sink for every head")
    if a.interleaved_rope:
        chunk, interval = a.interleaved_rope.chunk_size, a.interleaved_rope.full_attention_interval
        lines.append(f"rotary positions in chunks of {chunk:,} tokens,")
        lines.append(f"neither in every {_ordinal(interval)} layer")
    return lines


def _positions(config: ModelConfig) -> str:
    rope, relative = config.rope, config.attention and config.attention.relative_positions
    if relative:
        return f"relative positions, {relative.num_buckets} buckets up to {relative.max_distance:,} tokens"
    if rope is None:
        return "no positions"
    scalings = [("YaRN", rope.yarn), ("Llama 3 scaling", rope.llama3), ("linear scaling", rope.linear)]
    scaled = [f", {name} × {number(scaling.factor)}" for name, scaling in scalings if scaling]
    return f"rotary positions, θ = {number(rope.theta)}" + "".join(scaled)


def _router(moe: MoEConfig) -> Part:
    lines = [f"{moe.score_func} scores, {moe.top_k} of {moe.num_experts} experts"]
    if moe.num_groups > 1:
        lines.append(f"from {moe.top_k_groups} of {moe.num_groups} groups, each scored by {WORDS[moe.group_score]}")
    if moe.router_bias:
        lines.append("a bias for selection only")
    if moe.router_logit_bias:
        lines.append("logits with biases")
    weights = ["renormalised"] * moe.norm_topk_prob
    weights += [f"× {number(moe.routed_scaling_factor)}"] * (moe.routed_scaling_factor != 1)
    if weights:
        lines.append("weights " + ", ".join(weights))
    if moe.scaled_input:
        lines.append("the weight multiplies the input")
    return Part("Router", (*lines, *(_routing(moe.routing) if moe.routing else ())))


def _routing(r: RoutingConfig) -> list[str]:
    lines = []
    if r.choice != "token":
        lines.append(
            {"expert": "experts choose tokens", "sinkhorn": "balanced while training", "hash": "by the token's id"}[
                r.choice
            ]
        )
    if r.dense_training:
        lines.append("all of them while training")
    if r.second_expert_threshold:
        lines.append(f"the second used with probability weight / {number(r.second_expert_threshold)}")
    capacities = [(r.capacity_factor, "training"), (r.eval_capacity_factor, "evaluation")]
    limits = [f"{number(factor)} in {phase}" for factor, phase in capacities if factor]
    if limits:
        lines.append("capacity factor " + ", ".join(limits))
    explored = {"noise": r.noise, "jitter": r.jitter, "dropout": r.router_dropout, "temperature": r.temperature}
    found = [name for name, given in explored.items() if given]
    return lines + (["logits with " + ", ".join(found)] if found else [])


def _experts(moe: MoEConfig, kind: str) -> Experts:
    clamped = f", clamped to ±{number(moe.swiglu_limit)}, with biases" if moe.swiglu_limit else ""
    gated = ", the shared one behind a gate" if moe.shared_expert_gate else ""
    return Experts(
        moe.num_experts, moe.num_shared_experts, f"{kind}, {moe.moe_intermediate_size:,} wide{clamped}{gated}"
    )


def _notes(config: ModelConfig, moe_layers: list[int]) -> tuple[str, ...]:
    """How the blocks of the other layers differ."""
    return (_ffn_note(config, moe_layers), *_mixer_note(config))


def _mixer_note(config: ModelConfig) -> list[str]:
    if config.mamba is None or config.attention is None:
        return []
    attending = [layer for layer in range(config.num_layers) if not config.is_mamba_layer(layer)]
    kind = f"{attention_kind(config.attention)} attention of {_attention(config.attention)[0]}"
    return [f"{len(attending)} layers have {kind} in place of Mamba ({_ranges(attending)}, from 0)."]


def _ffn_note(config: ModelConfig, moe_layers: list[int]) -> str:
    if not moe_layers:
        return f"{config.num_layers} layers."
    dense = [layer for layer in range(config.num_layers) if layer not in moe_layers]
    if not dense:
        return f"{config.num_layers} layers, all with experts."
    width = f"the others have a {WORDS[config.ffn]} of {config.intermediate_size:,}"
    return f"{config.num_layers} layers, {len(moe_layers)} with experts; {width} ({_ranges(dense)}, from 0)."


def _ranges(layers: list[int]) -> str:
    """Numbers in words: 0 to 2, or the first few."""
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
    return "layers " + ", ".join(map(str, layers[:3])) + (", …" if len(layers) > 3 else "")


def _ordinal(number: int) -> str:
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return "second" if number == 2 else f"{number}{suffix}"
