"""Weight maps: the names that published checkpoints give to the parameters of ``zoo.model.Decoder``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from zoo.config import ModelConfig
from zoo.families.base import Layout
from zoo.weights.ops import Op, Rename, Split, Stack


@dataclass(frozen=True, kw_only=True)
class MoENames:
    """What a family calls the parts of a MoE layer in its per-expert layout.

    The fused layout is transformers' own and the same for all: ``mlp.experts.gate_up_proj`` and ``down_proj``.
    """

    block: str = "mlp"
    dense: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared_experts: str = "shared_experts"


NORMS: dict[str, tuple[tuple[str, str], ...]] = {
    "before": (("input_layernorm", "mixer_norm"), ("post_attention_layernorm", "ffn_norm")),
    "after": (("post_attention_layernorm", "mixer_post_norm"), ("post_feedforward_layernorm", "ffn_post_norm")),
    "both": (
        ("input_layernorm", "mixer_norm"),
        ("post_attention_layernorm", "mixer_post_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "ffn_post_norm"),
    ),
}
"""``norm_placement`` → (published, our) names of the norms of a block."""

NORM_PARAMETER = {"rms": "weight", "unit_offset_rms": "offset", "layer": "weight"}
"""``norm`` → our name of its parameter, which is always published as ``weight``."""


MoEMap = Callable[[ModelConfig, str, str], Iterable[Op]]
"""(config, published prefix, our prefix) → operations of one MoE layer."""


def decoder_map(
    config: ModelConfig, layout: Layout, names: MoENames = MoENames(), moe_map: MoEMap | None = None
) -> list[Op]:
    """The whole weight map of a decoder; families differ by ``names``, or by the ``moe_map`` of what is stored."""
    ops: list[Op] = [
        Rename("model.embed_tokens.weight", "embed_tokens.weight"),
        Rename("model.norm.weight", f"norm.{NORM_PARAMETER[config.norm]}"),
    ]
    if not config.tie_word_embeddings:
        ops.append(Rename("lm_head.weight", "lm_head.weight"))
    for i in range(config.num_layers):
        ops.extend(layer_map(config, i, layout, f"layers.{i}", names, moe_map))
    return ops


def layer_map(
    config: ModelConfig,
    layer: int,
    layout: Layout,
    ours: str,
    names: MoENames = MoENames(),
    moe_map: MoEMap | None = None,
) -> Iterator[Op]:
    """Operations of one block, published as layer number ``layer`` (from 0) and called ``ours`` in the decoder."""
    theirs = f"model.layers.{layer}"
    for their_part, our_part in NORMS[config.norm_placement]:
        yield Rename(f"{theirs}.{their_part}.weight", f"{ours}.{our_part}.{NORM_PARAMETER[config.norm]}")
    for their_part, our_part in _mixer(config):
        yield Rename(f"{theirs}.self_attn.{their_part}", f"{ours}.mixer.{our_part}")
    if config.is_moe_layer(layer) and moe_map is not None:
        yield from moe_map(config, f"{theirs}.{names.block}", f"{ours}.ffn")
    elif config.is_moe_layer(layer):
        block = names.block if layout == "per_expert" else "mlp"
        yield from _moe(config, layout, names, f"{theirs}.{block}", f"{ours}.ffn")
    else:
        yield from swiglu_map(f"{theirs}.{names.dense}", f"{ours}.ffn")


def _mixer(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(published, our) names of one attention block."""
    if config.attention:
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{part}.weight", f"{part}.weight"
            if config.attention.output_bias if part == "o_proj" else config.attention.qkv_bias:
                yield f"{part}.bias", f"{part}.bias"
        if config.attention.qk_norm:
            yield "q_norm.weight", "q_norm.weight"
            yield "k_norm.weight", "k_norm.weight"
        if config.attention.sinks:
            yield "sinks", "sinks"
        return
    assert config.mla is not None
    if config.mla.q_lora_rank is None:
        yield "q_proj.weight", "q_proj.weight"
    else:
        yield "q_a_proj.weight", "q_a_proj.weight"
        yield "q_a_layernorm.weight", "q_a_norm.weight"
        yield "q_b_proj.weight", "q_b_proj.weight"
    yield "kv_a_proj_with_mqa.weight", "kv_a_proj.weight"
    yield "kv_a_layernorm.weight", "kv_a_norm.weight"
    yield "kv_b_proj.weight", "kv_b_proj.weight"
    yield "o_proj.weight", "o_proj.weight"


def swiglu_map(theirs: str, ours: str) -> Iterator[Op]:
    """The three projections of one dense FFN."""
    for part in ("gate_proj", "up_proj", "down_proj"):
        yield Rename(f"{theirs}.{part}.weight", f"{ours}.{part}.weight")


def _moe(config: ModelConfig, layout: Layout, names: MoENames, theirs: str, ours: str) -> Iterator[Op]:
    moe = config.moe
    assert moe is not None
    yield Rename(f"{theirs}.gate.weight", f"{ours}.router.weight")
    if moe.router_bias:
        yield Rename(f"{theirs}.gate.e_score_correction_bias", f"{ours}.router.bias")
    if layout == "fused":
        yield Split(f"{theirs}.experts.gate_up_proj", f"{ours}.experts.gate_up", dim=1, parts=2)
        yield Rename(f"{theirs}.experts.down_proj", f"{ours}.experts.down")
    else:
        experts = [f"{theirs}.experts.{e}" for e in range(moe.num_experts)]
        gate_up = tuple(f"{expert}.{part}.weight" for expert in experts for part in (names.gate, names.up))
        yield Stack(gate_up, f"{ours}.experts.gate_up", leading=(moe.num_experts, 2))
        down = tuple(f"{expert}.{names.down}.weight" for expert in experts)
        yield Stack(down, f"{ours}.experts.down", leading=(moe.num_experts,))
    if moe.num_shared_experts:
        yield from swiglu_map(f"{theirs}.{names.shared_experts}", f"{ours}.shared_experts")
    if moe.shared_expert_gate:
        yield Rename(f"{theirs}.shared_expert_gate.weight", f"{ours}.shared_expert_gate.weight")
