"""What an encoder-decoder costs, from its config alone, by the conventions of ``zoo.accounting``.

*Active* parameters are all but the experts that a token does not go through, in both stacks together. *FLOPs* are those
of the matrix products of one forward over a source and a target, the output head on every target token included, and
no token dropped.

Shapes: D model, H heads, d head size, F FFN, E experts, S tokens of the source, U of the target.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from zoo.accounting import BF16_BYTES, FP32_BYTES
from zoo.encoder_decoder_config import EncoderDecoderConfig


@dataclass(frozen=True, kw_only=True)
class StackLayer:
    """Parameters of one layer of either stack, by block."""

    norms: int
    self_attention: int
    cross_attention: int = 0
    dense_ffn: int = 0
    router: int = 0
    routed_experts: int = 0
    """All E experts."""
    active_experts: int = 0
    """The one of them that a token goes through."""

    @property
    def total(self) -> int:
        attention = self.self_attention + self.cross_attention
        return self.norms + attention + self.dense_ffn + self.router + self.routed_experts

    @property
    def active(self) -> int:
        return self.total - self.routed_experts + self.active_experts


@dataclass(frozen=True, kw_only=True)
class StackParameters:
    """Parameters of an encoder-decoder, by block."""

    embedding: int
    lm_head: int
    """0 where the embedding is tied to it."""
    position_bias: int
    """Of one stack."""
    final_norm: int
    """Of one stack."""
    encoder: tuple[StackLayer, ...]
    decoder: tuple[StackLayer, ...]

    @property
    def total(self) -> int:
        return self._outside + sum(layer.total for layer in (*self.encoder, *self.decoder))

    @property
    def active(self) -> int:
        return self._outside + sum(layer.active for layer in (*self.encoder, *self.decoder))

    @property
    def _outside(self) -> int:
        return self.embedding + self.lm_head + 2 * (self.position_bias + self.final_norm)


def count_stack_parameters(config: EncoderDecoderConfig) -> StackParameters:
    """Parameters of the model that ``config`` describes, equal to those of ``EncoderDecoder(config)``."""
    vocabulary = config.vocab_size * config.hidden_size
    return StackParameters(
        embedding=vocabulary,
        lm_head=0 if config.tie_word_embeddings else vocabulary,
        position_bias=config.relative_positions.num_buckets * config.num_heads,
        final_norm=config.hidden_size,
        encoder=tuple(_layer(config, layer, 0) for layer in range(config.num_encoder_layers)),
        decoder=tuple(_layer(config, layer, 1) for layer in range(config.num_decoder_layers)),
    )


def cache_elements(config: EncoderDecoderConfig) -> int:
    """Keys and values that the decoder keeps of each target token, and as many of each source token."""
    return 2 * config.num_heads * config.head_dim * config.num_decoder_layers


def stack_flops(config: EncoderDecoderConfig, source_length: int, target_length: int) -> float:
    """FLOPs of the forward pass over one source of S tokens and one target of U.

    Raises:
        ValueError: a length below 1.
    """
    for name, length in (("source_length", source_length), ("target_length", target_length)):
        if length < 1:
            raise ValueError(f"{name} = {length}: give a positive number of tokens")
    parameters = count_stack_parameters(config)
    on_source = sum(layer.active - layer.norms for layer in parameters.encoder)
    on_target = sum(layer.active - layer.norms for layer in parameters.decoder)
    # Half of what attends to the source, k and v, is multiplied with its tokens.
    keys_values = sum(layer.cross_attention for layer in parameters.decoder) // 2
    head = config.vocab_size * config.hidden_size
    weights = (on_source + keys_values) * source_length + (on_target - keys_values + head) * target_length
    seen = config.num_encoder_layers * source_length**2
    seen += config.num_decoder_layers * target_length * source_length
    causal = config.num_decoder_layers * target_length * (target_length + 1) / 2
    return 2.0 * weights + 4.0 * config.num_heads * config.head_dim * (seen + causal)


def stack_summary(config: EncoderDecoderConfig, length: int) -> dict[str, Any]:
    """All of the above as plain data for a JSON file; FLOPs are of a source and a target of ``length`` tokens each."""
    parameters, cache = count_stack_parameters(config), cache_elements(config)
    stacks = {
        name: [{**asdict(layer), "total": layer.total, "active": layer.active} for layer in layers]
        for name, layers in (("encoder", parameters.encoder), ("decoder", parameters.decoder))
    }
    return {
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "embedding": parameters.embedding,
            "lm_head": parameters.lm_head,
            "position_bias": parameters.position_bias,
            "final_norm": parameters.final_norm,
            **stacks,
        },
        "forward_flops": {"source_and_target_length": length, "example": stack_flops(config, length, length)},
        "cache_bytes_per_token": {"fp32": cache * FP32_BYTES, "bf16": cache * BF16_BYTES},
        "weight_bytes": {"fp32": parameters.total * FP32_BYTES, "bf16": parameters.total * BF16_BYTES},
    }


def _layer(config: EncoderDecoderConfig, layer: int, cross: int) -> StackLayer:
    """One layer, with ``cross`` attentions to the encoder."""
    width = config.hidden_size
    attention = 4 * width * config.num_heads * config.head_dim
    ffn = {"relu": 2, "geglu": 3}[config.ffn] * width * config.intermediate_size
    common = {"norms": (2 + cross) * width, "self_attention": attention, "cross_attention": cross * attention}
    if config.moe is None or not config.is_moe_layer(layer):
        return StackLayer(**common, dense_ffn=ffn)
    return StackLayer(
        **common,
        router=config.moe.num_experts * width,
        routed_experts=config.moe.num_experts * ffn,
        active_experts=ffn,
    )
