"""The text part of Llama 4 (published code): layers in chunks or without rotary positions, experts of scaled input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from zoo.config import InterleavedRopeConfig, ModelConfig, MoEConfig
from zoo.families.base import Family, Layout, Multimodal
from zoo.families.fields import Fields
from zoo.families.parts import read_decoder, read_gqa, read_rope, write_decoder, write_gqa
from zoo.families.tensors import MoENames, decoder_map, swiglu_map
from zoo.weights.ops import Op, Rename, Split
from zoo.weights.rearrange import Chain, Transpose

NAMES = MoENames(block="feed_forward", dense="feed_forward")


def _read(fields: Fields) -> ModelConfig:
    bias = fields.take(bool, "attention_bias", False)
    fields.expect("router_jitter_noise", 0)
    fields.skip("cache_implementation")
    num_layers = fields.size("num_hidden_layers")
    moe = MoEConfig(
        num_experts=fields.size("num_local_experts"),
        top_k=fields.take(int, "num_experts_per_tok", 1),
        moe_intermediate_size=fields.size("intermediate_size"),
        score_func="sigmoid",
        norm_topk_prob=False,
        scaled_input=True,
        num_shared_experts=1,
        layer_interval=fields.size("interleave_moe_layer_step", 1),
    )
    step = moe.layer_interval
    _expect_list(fields, "moe_layers", num_layers // step, lambda i: (i + 1) * step - 1)
    return read_decoder(
        fields,
        rope=read_rope(fields, layout="interleaved", default_theta=500_000.0),
        attention=read_gqa(
            fields, qkv_bias=bias, output_bias=bias, interleaved_rope=_read_interleaved(fields, num_layers)
        ),
        moe=moe,
        width="intermediate_size_mlp",
    )


def _read_interleaved(fields: Fields, num_layers: int) -> InterleavedRopeConfig:
    interval = fields.size("no_rope_layer_interval", 4)
    _expect_list(fields, "no_rope_layers", num_layers, lambda i: int((i + 1) % interval != 0))
    kinds = ("full_attention", "chunked_attention")
    _expect_list(fields, "layer_types", num_layers, lambda i: kinds[(i + 1) % interval != 0])
    # The published files say 4 where transformers says true.
    fields.expect("attn_temperature_tuning", True, 4)
    return InterleavedRopeConfig(
        full_attention_interval=interval,
        chunk_size=fields.size("attention_chunk_size", 8192),
        qk_norm=fields.take(bool, "use_qk_norm", True),
        temperature_scale=fields.take(float, "attn_scale", 0.1),
        temperature_floor=fields.size("floor_scale", 8192),
    )


def _expect_list(fields: Fields, key: str, length: int, item: Callable[[int], Any]) -> None:
    """Refuse a list of ``key`` that is not ``item(0)``, ``item(1)``, ... of that length, but for an empty one."""
    given = fields.sequence(key)
    if given and (len(given) != length or given != [item(i) for i in range(length)]):
        raise ValueError(f"{fields.where}: {key} = {given} is not supported; layers must differ at even intervals")


def _write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = write_gqa(config), config.moe
    assert config.attention is not None
    rope = config.attention.interleaved_rope
    if moe is None or rope is None:
        raise ValueError("moe or attention.interleaved_rope = None: this family always has both")
    return {
        **write_decoder(config),
        **attention,
        "attention_bias": config.attention.qkv_bias,
        "intermediate_size": moe.moe_intermediate_size,
        "intermediate_size_mlp": config.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "interleave_moe_layer_step": moe.layer_interval,
        "no_rope_layer_interval": rope.full_attention_interval,
        "attention_chunk_size": rope.chunk_size,
        "use_qk_norm": rope.qk_norm,
        "attn_temperature_tuning": True,
        "attn_scale": rope.temperature_scale,
        "floor_scale": rope.temperature_floor,
    }


def _map_moe(config: ModelConfig, theirs: str, ours: str) -> Iterator[Op]:
    """Experts are stored transposed, gate before up."""
    yield Rename(f"{theirs}.router.weight", f"{ours}.router.weight")
    yield Chain(
        (
            Split(f"{theirs}.experts.gate_up_proj", "[E, D, 2, F]", dim=2, parts=2),
            Transpose("[E, D, 2, F]", f"{ours}.experts.gate_up", (0, 2, 3, 1)),
        )
    )
    yield Transpose(f"{theirs}.experts.down_proj", f"{ours}.experts.down", (0, 2, 1))
    yield from swiglu_map(f"{theirs}.shared_expert", f"{ours}.shared_experts")


def _map_weights(config: ModelConfig, layout: Layout) -> list[Op]:
    return decoder_map(config, layout, NAMES, _map_moe)


FAMILY = Family(
    name="llama4",
    model_type="llama4_text",
    architectures=("Llama4ForCausalLM",),
    read=_read,
    write=_write,
    map_weights=_map_weights,
    multimodal=Multimodal(
        model_type="llama4",
        architectures=("Llama4ForConditionalGeneration",),
        section="text_config",
        prefix="language_model.",
        ignored=(r"vision_model\..*", r"multi_modal_projector\..*"),
    ),
)
