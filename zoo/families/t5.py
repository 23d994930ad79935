"""T5 (arXiv 1910.10683), and T5 v1.1 and Flan-T5 (arXiv 2210.11416) with a gated FFN and an output head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from zoo.config import ModelConfig, RelativePositionConfig
from zoo.encoder_decoder_config import CappedMoEConfig, EncoderDecoderConfig
from zoo.families.base import EncoderDecoderFamily, Layout
from zoo.families.fields import Fields
from zoo.weights.ops import Op, Rename

OUTSIDE = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
"""Stored with T5 v1.0 and read by nothing: attention to the encoder has no positions."""

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

ACTIVATIONS = {"relu": ("relu", "relu", False), "geglu": ("gated-gelu", "gelu_new", True)}
"""``ffn`` → ``feed_forward_proj``, and the ``dense_act_fn`` and ``is_gated_act`` that follow from it."""

FFNMap = Callable[[EncoderDecoderConfig, int, str, str], Iterable[Op]]
"""(config, layer, published prefix, our prefix) → operations of one feed-forward layer."""


def read_stacks(fields: Fields, *, tied: bool, ffn: str, moe: CappedMoEConfig | None = None) -> EncoderDecoderConfig:
    """The fields of both stacks, which Switch spells like T5.

    Args:
        fields: of the config.json.
        tied: whether the embedding is the output head.
        ffn: of the layers without experts.
        moe: of those with.
    """
    fields.expect("is_encoder_decoder", True)
    fields.skip("dropout_rate", "initializer_factor", "n_positions", "output_past", "task_specific_params")
    layers = fields.size("num_layers")
    return EncoderDecoderConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("d_model"),
        num_encoder_layers=layers,
        num_decoder_layers=fields.size("num_decoder_layers", layers),
        intermediate_size=fields.size("d_ff"),
        num_heads=fields.size("num_heads"),
        head_dim=fields.size("d_kv"),
        relative_positions=RelativePositionConfig(
            num_buckets=fields.size("relative_attention_num_buckets", 32),
            max_distance=fields.size("relative_attention_max_distance", 128),
        ),
        ffn="geglu" if ffn == "geglu" else "relu",
        norm_eps=fields.take(float, "layer_norm_epsilon"),
        decoder_start_id=fields.take(int, "decoder_start_token_id"),
        moe=moe,
        tie_word_embeddings=tied,
    )


def write_stacks(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Inverse of ``read_stacks``.

    Raises:
        ValueError: the model is a decoder.
    """
    if isinstance(config, ModelConfig):
        raise ValueError("model: this family is of encoder-decoders")
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "d_ff": config.intermediate_size,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "relative_attention_num_buckets": config.relative_positions.num_buckets,
        "relative_attention_max_distance": config.relative_positions.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "decoder_start_token_id": config.decoder_start_id,
        "pad_token_id": config.decoder_start_id,
        "tie_word_embeddings": config.tie_word_embeddings,
        "is_encoder_decoder": True,
        "dropout_rate": 0.0,
    }


def stacks_map(config: EncoderDecoderConfig, ffn_map: FFNMap) -> list[Op]:
    """The whole weight map; families differ in the names of feed-forward layers."""
    ops: list[Op] = [Rename("shared.weight", "embed_tokens.weight")]
    if not config.tie_word_embeddings:
        ops.append(Rename("lm_head.weight", "lm_head.weight"))
    for stack, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        positions = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ops.append(Rename(positions, f"{stack}.position_bias.weight"))
        ops.append(Rename(f"{stack}.final_layer_norm.weight", f"{stack}.norm.weight"))
        parts = [("SelfAttention", "mixer", "mixer_norm")]
        if stack == "decoder":
            parts.append(("EncDecAttention", "cross_attention", "cross_norm"))
        for i in range(layers):
            theirs, ours = f"{stack}.block.{i}.layer", f"{stack}.layers.{i}"
            for number, (attention, mixer, norm) in enumerate(parts):
                ops.append(Rename(f"{theirs}.{number}.layer_norm.weight", f"{ours}.{norm}.weight"))
                for part in "qkvo":
                    name = f"{theirs}.{number}.{attention}.{part}.weight"
                    ops.append(Rename(name, f"{ours}.{mixer}.{part}_proj.weight"))
            ops.append(Rename(f"{theirs}.{len(parts)}.layer_norm.weight", f"{ours}.ffn_norm.weight"))
            ops.extend(ffn_map(config, i, f"{theirs}.{len(parts)}", f"{ours}.ffn"))
    return ops


def _read(fields: Fields) -> EncoderDecoderConfig:
    kinds = {published: ffn for ffn, (published, _, _) in ACTIVATIONS.items()}
    kind = fields.raw("feed_forward_proj", "relu")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{fields.where}: feed_forward_proj = {kind!r} is not supported; use {' or '.join(kinds)}")
    ffn = kinds[kind]
    _, activation, gated = ACTIVATIONS[ffn]
    fields.expect("dense_act_fn", activation)
    fields.expect("is_gated_act", gated)
    fields.skip("classifier_dropout")
    # Scaled hidden states and a tied head go together. transformers 4 has one field for both; 5 saves the scale apart,
    # beside a tie_word_embeddings that is true even where the head is stored.
    tied = fields.take(bool, "tie_word_embeddings", True)
    return read_stacks(fields, tied=fields.take(bool, "scale_decoder_outputs", tied), ffn=ffn)


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    return {**write_stacks(config), "feed_forward_proj": ACTIVATIONS[config.ffn][0]}


def _map(config: EncoderDecoderConfig, layout: Layout) -> list[Op]:
    return stacks_map(config, _ffn_map)


def _ffn_map(config: EncoderDecoderConfig, layer: int, theirs: str, ours: str) -> Iterable[Op]:
    names = {
        "relu": (("wi", "up_proj"), ("wo", "down_proj")),
        "geglu": (("wi_0", "gate_proj"), ("wi_1", "up_proj"), ("wo", "down_proj")),
    }
    for their_part, our_part in names[config.ffn]:
        yield Rename(f"{theirs}.DenseReluDense.{their_part}.weight", f"{ours}.{our_part}.weight")


FAMILY = EncoderDecoderFamily(
    name="t5",
    model_type="t5",
    architectures=("T5ForConditionalGeneration", "T5WithLMHeadModel"),
    read=_read,
    write=_write,
    map_weights=_map,
    ignored=lambda hf: OUTSIDE,
    embedding_copies=COPIES,
)
