"""Switch Transformers (arXiv 2101.03961): T5 with experts in every other layer, as published in 2022."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zoo.encoder_decoder_config import CappedMoEConfig, EncoderDecoderConfig
from zoo.families.base import EncoderDecoderFamily, Layout
from zoo.families.fields import Fields
from zoo.families.t5 import COPIES, read_stacks, stacks_map, write_stacks
from zoo.weights.ops import Op, Rename, Stack


def _read(fields: Fields) -> EncoderDecoderConfig:
    for key, value in _FIXED.items():
        fields.expect(key, value)
    # Jitter is of training alone, and no released code looks at router_ignore_padding_tokens.
    fields.skip("router_jitter_noise", "router_z_loss_coef", "add_router_probs", "router_ignore_padding_tokens")
    encoder_layers = fields.size("num_layers")
    intervals = {
        _interval(fields, "encoder", encoder_layers),
        _interval(fields, "decoder", fields.size("num_decoder_layers", encoder_layers)),
    }
    if len(intervals) > 1:
        raise ValueError(
            f"{fields.where}: num_sparse_decoder_layers = {fields.raw('num_sparse_decoder_layers')} is not supported "
            "with these num_sparse_encoder_layers; only equal intervals in both stacks are"
        )
    moe = CappedMoEConfig(
        num_experts=fields.size("num_experts"),
        expert_capacity=fields.size("expert_capacity"),
        layer_interval=intervals.pop(),
    )
    return read_stacks(fields, tied=True, ffn="relu", moe=moe)


_FIXED = {
    "dense_act_fn": "relu",
    "feed_forward_proj": "relu",
    "is_gated_act": False,
    "router_bias": False,
    "router_dtype": "float32",
    "router_type": "tokens_masked",
    "batch_prioritized_routing": False,
    "num_selected_experts": 1,
    "tie_word_embeddings": True,
}


def _interval(fields: Fields, stack: str, layers: int) -> int:
    """``layer_interval`` of one stack: transformers puts experts where i mod step = 1, or everywhere with step 1."""
    key = f"num_sparse_{stack}_layers"
    sparse = fields.size(key)
    step = layers // sparse
    fields.expect(f"{stack}_sparse_step", step)
    if step in (1, 2):
        return step
    if layers == 3:  # i mod 3 = 1 is the second layer, and so is every other one
        return 2
    raise ValueError(
        f"{fields.where}: {key} = {sparse} of {layers} layers is not supported; only all or every other one are"
    )


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    moe, common = config.moe, write_stacks(config)
    if moe is None:
        raise ValueError("moe = None: this family has experts")
    return {
        **common,
        "dense_act_fn": "relu",
        "num_experts": moe.num_experts,
        "expert_capacity": moe.expert_capacity,
        "num_sparse_encoder_layers": config.num_encoder_layers // moe.layer_interval,
        "num_sparse_decoder_layers": config.num_decoder_layers // moe.layer_interval,
        "router_jitter_noise": 0.0,
    }


def _map(config: EncoderDecoderConfig, layout: Layout) -> list[Op]:
    return stacks_map(config, _ffn_map)


def _ffn_map(config: EncoderDecoderConfig, layer: int, theirs: str, ours: str) -> Iterable[Op]:
    if config.moe is None or not config.is_moe_layer(layer):
        yield Rename(f"{theirs}.mlp.wi.weight", f"{ours}.up_proj.weight")
        yield Rename(f"{theirs}.mlp.wo.weight", f"{ours}.down_proj.weight")
        return
    yield Rename(f"{theirs}.mlp.router.classifier.weight", f"{ours}.router.weight")
    experts = [f"{theirs}.mlp.experts.expert_{e}" for e in range(config.moe.num_experts)]
    for their_part, our_part in (("wi", "up"), ("wo", "down")):
        names = tuple(f"{expert}.{their_part}.weight" for expert in experts)
        yield Stack(names, f"{ours}.experts.{our_part}", leading=(len(names),))


FAMILY = EncoderDecoderFamily(
    name="switch",
    model_type="switch_transformers",
    architectures=("SwitchTransformersForConditionalGeneration",),
    read=_read,
    write=_write,
    map_weights=_map,
    ignored=lambda hf: (),
    embedding_copies=COPIES,
)
