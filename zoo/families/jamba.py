"""Jamba (arXiv 2403.19887, arXiv 2408.12570): seven Mamba layers to one of attention, experts in every second layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from zoo.config import MambaConfig, ModelConfig, MoEConfig
from zoo.families.base import Family, Layout
from zoo.families.fields import Fields
from zoo.families.parts import read_decoder, read_gqa, write_decoder, write_gqa
from zoo.families.tensors import swiglu_map
from zoo.weights.ops import Op, Rename, Split, Stack

MAMBA = {
    "in_proj.weight": "in_proj.weight",
    "conv1d.weight": "conv1d.weight",
    "conv1d.bias": "conv1d.bias",
    "x_proj.weight": "x_proj.weight",
    "dt_layernorm.weight": "dt_norm.weight",
    "b_layernorm.weight": "b_norm.weight",
    "c_layernorm.weight": "c_norm.weight",
    "dt_proj.weight": "dt_proj.weight",
    "dt_proj.bias": "state_space.dt_bias",
    "A_log": "state_space.A_log",
    "D": "state_space.D",
    "out_proj.weight": "out_proj.weight",
}
"""Published → our names within one Mamba layer."""


def _read(fields: Fields) -> ModelConfig:
    # How transformers 4 computed: kernels, and the logits that generation asks for.
    fields.skip(
        "n_ctx",
        "use_mamba_kernels",
        "use_mambapy",
        "use_associative_scan",
        "num_logits_to_keep",
        "calc_logits_for_entire_prompt",
    )
    fields.expect("sliding_window")
    fields.expect("mamba_conv_bias", True)
    fields.expect("mamba_proj_bias", False)
    fields.expect("mamba_inner_layernorms", True)
    period = fields.size("expert_layer_period", 2)
    fields.expect("expert_layer_offset", period - 1)
    return read_decoder(
        fields,
        rope=None,
        attention=read_gqa(fields),
        mamba=MambaConfig(
            attention_interval=fields.size("attn_layer_period", 8),
            attention_offset=fields.take(int, "attn_layer_offset", 4),
            state_size=fields.size("mamba_d_state", 16),
            expand=fields.size("mamba_expand", 2),
            conv_width=fields.size("mamba_d_conv", 4),
            dt_rank=_dt_rank(fields),
        ),
        moe=MoEConfig(
            num_experts=fields.size("num_experts"),
            top_k=fields.size("num_experts_per_tok"),
            moe_intermediate_size=fields.size("intermediate_size"),
            score_func="softmax",
            norm_topk_prob=False,
            layer_interval=period,
        ),
    )


def _dt_rank(fields: Fields) -> int:
    if fields.raw("mamba_dt_rank") in (None, "auto"):
        return math.ceil(fields.size("hidden_size") / 16)
    return fields.size("mamba_dt_rank")


def _write(config: ModelConfig) -> dict[str, Any]:
    attention, mamba, moe = write_gqa(config), config.mamba, config.moe
    if mamba is None or moe is None:
        raise ValueError("mamba or moe = None: this family always has both")
    return {
        **write_decoder(config),
        **attention,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "expert_layer_period": moe.layer_interval,
        "expert_layer_offset": moe.layer_interval - 1,
        "attn_layer_period": mamba.attention_interval,
        "attn_layer_offset": mamba.attention_offset,
        "mamba_d_state": mamba.state_size,
        "mamba_expand": mamba.expand,
        "mamba_d_conv": mamba.conv_width,
        "mamba_dt_rank": mamba.dt_rank,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }


def _map_weights(config: ModelConfig, layout: Layout) -> list[Op]:
    ops: list[Op] = [
        Rename("model.embed_tokens.weight", "embed_tokens.weight"),
        Rename("model.final_layernorm.weight", "norm.weight"),
    ]
    if not config.tie_word_embeddings:
        ops.append(Rename("lm_head.weight", "lm_head.weight"))
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        ops.append(Rename(f"{theirs}.input_layernorm.weight", f"{ours}.mixer_norm.weight"))
        ops.append(Rename(f"{theirs}.pre_ff_layernorm.weight", f"{ours}.ffn_norm.weight"))
        if config.is_mamba_layer(i):
            ops.extend(Rename(f"{theirs}.mamba.{part}", f"{ours}.mixer.{our}") for part, our in MAMBA.items())
        else:
            parts = (f"{part}_proj.weight" for part in "qkvo")
            ops.extend(Rename(f"{theirs}.self_attn.{part}", f"{ours}.mixer.{part}") for part in parts)
        map_ffn = _map_moe(config, layout, f"{theirs}.feed_forward", f"{ours}.ffn")
        ops.extend(map_ffn if config.is_moe_layer(i) else swiglu_map(f"{theirs}.feed_forward", f"{ours}.ffn"))
    return ops


def _map_moe(config: ModelConfig, layout: Layout, theirs: str, ours: str) -> Iterator[Op]:
    assert config.moe is not None
    yield Rename(f"{theirs}.router.weight", f"{ours}.router.weight")
    if layout == "fused":
        yield Split(f"{theirs}.experts.gate_up_proj", f"{ours}.experts.gate_up", dim=1, parts=2)
        yield Rename(f"{theirs}.experts.down_proj", f"{ours}.experts.down")
        return
    experts = [f"{theirs}.experts.{e}" for e in range(config.moe.num_experts)]
    gate_up = tuple(f"{expert}.{part}_proj.weight" for expert in experts for part in ("gate", "up"))
    yield Stack(gate_up, f"{ours}.experts.gate_up", leading=(config.moe.num_experts, 2))
    down = tuple(f"{expert}.down_proj.weight" for expert in experts)
    yield Stack(down, f"{ours}.experts.down", leading=(config.moe.num_experts,))


FAMILY = Family(
    name="jamba",
    model_type="jamba",
    architectures=("JambaForCausalLM",),
    read=_read,
    write=_write,
    map_weights=_map_weights,
)
