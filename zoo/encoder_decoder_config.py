"""The architecture of an encoder-decoder, beside the decoder of ``zoo.config``, and what tells the two apart.

A file that has ``encoder_decoder:`` where others have ``model:`` describes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zoo.config import ENCODER_DECODER_KEY, ModelConfig, ModelSpec, RelativePositionConfig, not_a_decoder
from zoo.config_checks import validate_relative_positions
from zoo.config_reading import from_dict, load_yaml


@dataclass(frozen=True, kw_only=True)
class CappedMoEConfig:
    """Experts of which each token takes the best, and which take a limited number of tokens (``zoo/moe/capped.py``)."""

    num_experts: int
    expert_capacity: int
    """Tokens of one sequence that an expert takes."""
    layer_interval: int
    """Every so-manieth layer of both stacks has experts, the others the dense FFN."""


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """An encoder and a decoder that attends to it, of one width (arXiv 1910.10683, section 2.1)."""

    vocab_size: int
    hidden_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    intermediate_size: int
    """Width of the FFN and of every expert."""
    num_heads: int
    head_dim: int
    """Heads together need not have the model's width."""
    relative_positions: RelativePositionConfig
    ffn: Literal["relu", "geglu"]
    """max(0, W x), or gated by GELU in its tanh form."""
    norm_eps: float
    decoder_start_id: int
    """Token that the decoder's input begins with."""
    moe: CappedMoEConfig | None = None
    tie_word_embeddings: bool = False
    """The embedding is the output head, of hidden states divided by √hidden_size."""

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number ``layer`` (from 0) of either stack has routed experts."""
        return self.moe is not None and (layer + 1) % self.moe.layer_interval == 0

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_encoder_layers",
            "num_decoder_layers",
            "intermediate_size",
            "num_heads",
            "head_dim",
        )
        for field in sizes:
            _require(getattr(self, field) >= 1, field, getattr(self, field), "give a positive integer")
        _require(self.norm_eps > 0, "norm_eps", self.norm_eps, "give a positive number such as 1e-6")
        start = self.decoder_start_id
        _require(0 <= start < self.vocab_size, "decoder_start_id", start, f"give an id below {self.vocab_size}")
        validate_relative_positions(self.relative_positions, "relative_positions")
        if self.moe:
            _validate_moe(self.moe, min(self.num_encoder_layers, self.num_decoder_layers))
            _require(self.ffn == "relu", "ffn", self.ffn, "experts have no gate; use relu, or drop the moe block")


def _validate_moe(m: CappedMoEConfig, num_layers: int) -> None:
    for field in ("num_experts", "expert_capacity"):
        _require(getattr(m, field) >= 1, f"moe.{field}", getattr(m, field), "give a positive integer")
    _require(
        1 <= m.layer_interval <= num_layers,
        "moe.layer_interval",
        m.layer_interval,
        f"at least one of the {num_layers} layers of a stack must have experts; give a number from 1 to {num_layers}",
    )


def _require(holds: bool, field: str, value: Any, fix: str) -> None:
    if not holds:
        raise ValueError(f"{field} = {value}: {fix}")


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderSpec:
    """A named encoder-decoder: one file of ``configs/models/encoder_decoder``, or the ``zoo.yaml`` of a checkpoint."""

    name: str
    family: str | None
    """As in ``ModelSpec``."""
    encoder_decoder: EncoderDecoderConfig
    source: str | None = None
    reference: str | None = None

    @property
    def model(self) -> EncoderDecoderConfig:
        """The architecture, under the name that it has in a ``ModelSpec``."""
        return self.encoder_decoder


AnyConfig = ModelConfig | EncoderDecoderConfig
AnySpec = ModelSpec | EncoderDecoderSpec


def load_any_spec(path: str | Path) -> AnySpec:
    """Read a model file of either kind."""
    data = load_yaml(path)
    if ENCODER_DECODER_KEY in data:
        return from_dict(EncoderDecoderSpec, data, str(path))
    return from_dict(ModelSpec, data, str(path))


def make_spec(name: str, family: str, config: AnyConfig) -> AnySpec:
    """The spec of the kind that ``config`` is of."""
    if isinstance(config, EncoderDecoderConfig):
        return EncoderDecoderSpec(name=name, family=family, encoder_decoder=config)
    return ModelSpec(name=name, family=family, model=config)


def decoder_spec(spec: AnySpec) -> ModelSpec:
    """``spec``, where it is that of a decoder.

    Raises:
        ValueError: it is that of an encoder-decoder, saying what can be done with it.
    """
    if isinstance(spec, EncoderDecoderSpec):
        raise not_a_decoder(spec.name)
    return spec
