"""The architecture of a model as frozen, nested dataclasses, and their files.

A sub-block is ``None`` or wholly given. Nothing here knows how a published checkpoint spells a field:
those names live in ``zoo/families``. Lengths are in tokens, sizes in elements.
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf

from zoo.config_checks import validate
from zoo.config_reading import from_dict, load_yaml, to_dict
from zoo.config_routing import RoutingConfig
from zoo.files import write_text

if typing.TYPE_CHECKING:
    from zoo.encoder_decoder_config import EncoderDecoderSpec

CONFIG_FILE = "zoo.yaml"
"""Name of the spec file inside a zoo checkpoint directory."""

ENCODER_DECODER_KEY = "encoder_decoder"
"""What stands in place of ``model`` in the file of an encoder-decoder (``zoo/encoder_decoder_config.py``)."""


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): every frequency divided by ``factor``."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1 frequency scaling: low frequencies divided by ``factor``, high ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071), with DeepSeek's factor on the scores (arXiv 2405.04434, published code)."""

    factor: float
    original_max_position: int
    beta_fast: float
    """Pairs that turn more often than this over the original context keep their frequency."""
    beta_slow: float
    """Pairs that turn less often than this have it divided by ``factor``; between the two is a ramp."""
    attention_factor: float
    """Factor on cos and sin: ``yarn_mscale(factor)`` in the paper, 1 in DeepSeek's models."""
    mscale_all_dim: float | None = None
    """Scores of latent attention are multiplied by ``yarn_mscale(factor, mscale_all_dim)`` squared."""
    truncate: bool = True
    """Whether the ramp begins and ends at whole pairs."""


def yarn_mscale(factor: float, coefficient: float = 1.0) -> float:
    """mscale(s, c) = 0.1·c·ln s + 1 for s > 1 (arXiv 2309.00071, equation 22; c is DeepSeek's), else 1."""
    return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864). At most one scaling is given.

    ``layout`` says which elements of a head form a rotated pair: ``split`` pairs i with i + d/2 (GPT-NeoX, Llama in
    transformers), ``interleaved`` pairs 2i with 2i + 1 (the paper, DeepSeek checkpoints).
    """

    theta: float
    layout: Literal["split", "interleaved"] = "split"
    linear: LinearScaling | None = None
    llama3: Llama3Scaling | None = None
    yarn: YarnScaling | None = None


@dataclass(frozen=True, kw_only=True)
class RelativePositionConfig:
    """Buckets of distances that bias the attention scores (``zoo/layers/relative_position.py``)."""

    num_buckets: int
    max_distance: int


@dataclass(frozen=True, kw_only=True)
class InterleavedRopeConfig:
    """Chunks with rotary positions in most layers, everything without them in the others (Llama 4, published code)."""

    full_attention_interval: int
    """Every so-manieth layer is without chunks and rotary positions."""
    chunk_size: int
    """A query sees itself and the tokens before it in its chunk of this many positions."""
    qk_norm: bool
    """RMSNorm without parameters of queries and keys in layers with rotary positions, after these."""
    temperature_scale: float
    """Queries at position p of layers without them are multiplied by 1 + scale · ln(1 + ⌊(p + 1) / floor⌋)."""
    temperature_floor: int


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head (``num_kv_heads == num_heads``) or grouped-query attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    """RMSNorm of queries and keys before rotary: over each head by itself, or over all heads together."""
    sliding_window: int | None = None
    """A query sees itself and the ``sliding_window - 1`` tokens before it."""
    full_attention_interval: int | None = None
    """Every so-manieth layer is without the sliding window; None: all layers have it."""
    query_scale_dim: int | None = None
    """Scores are divided by the root of this; None: of ``head_dim``."""
    logit_softcap: float | None = None
    """Scores x become c·tanh(x / c) before the mask."""
    sinks: bool = False
    """A learned score for every head that takes part in the softmax, and attends to nothing."""
    clip_qkv: float | None = None
    """Queries, keys and values are clamped to ± this before rotary."""
    interleaved_rope: InterleavedRopeConfig | None = None
    """Rotary positions in some layers only."""
    relative_positions: RelativePositionConfig | None = None
    """In place of rotary positions, scores have a bias for every head and distance, learned by each layer."""

    def window(self, layer: int) -> int | None:
        """Sliding window of layer number ``layer`` (from 0), None where it sees everything before it."""
        full = self.full_attention_interval is not None and (layer + 1) % self.full_attention_interval == 0
        return None if full else self.sliding_window

    def chunk(self, layer: int) -> int | None:
        """Chunk of layer number ``layer`` (from 0) in tokens, None where it has none."""
        rope = self.interleaved_rope
        return None if rope is None or (layer + 1) % rope.full_attention_interval == 0 else rope.chunk_size


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    num_heads: int
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Mamba in most layers (arXiv 2312.00752), attention in the others (arXiv 2403.19887)."""

    attention_interval: int
    attention_offset: int
    """Layer number i (from 0) has attention where i mod ``attention_interval`` = ``attention_offset``."""
    state_size: int
    """Numbers that each channel carries from token to token."""
    expand: int
    """Channels over the model's width."""
    conv_width: int
    """Tokens that the convolution before the recurrence sees."""
    dt_rank: int
    """Rank of the projection of the time steps."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed experts, their router and the shared experts. See ``zoo/moe/router.py`` for the equations."""

    num_experts: int
    top_k: int
    moe_intermediate_size: int
    score_func: Literal["softmax", "sigmoid"]
    norm_topk_prob: bool
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    top_k_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    router_bias: bool = False
    """A bias that takes part in the selection of experts only, never in their weights (arXiv 2408.15664)."""
    router_logit_bias: bool = False
    """A trained bias of the router's logits."""
    swiglu_limit: float | None = None
    """Experts have biases and a SwiGLU clamped to ± this (``zoo/moe/clamped.py``)."""
    ffn: Literal["relu"] | None = None
    """What an expert computes; None: what the dense FFN does, ``ModelConfig.ffn``."""
    dense_ffn: bool = False
    """After the experts the dense FFN as well, in a sub-block of its own (arXiv 2202.08906, published code)."""
    num_shared_experts: int = 0
    """Shared experts are one FFN of ``num_shared_experts * moe_intermediate_size``."""
    shared_expert_gate: bool = False
    """Multiply the shared experts' output with sigmoid(Linear(D → 1)) of their input."""
    scaled_input: bool = False
    """The weight of the one chosen expert multiplies its input, not its output."""
    first_k_dense: int = 0
    """The first layers that keep the dense FFN of ``ModelConfig.intermediate_size``."""
    layer_interval: int = 1
    """Every so-manieth layer has experts, the others the dense FFN."""
    expert_dropout: float = 0.0
    """Dropout inside the experts, of what enters their down projection (arXiv 2101.03961, section 2.4)."""
    routing: RoutingConfig | None = None
    """None: each token goes to its ``top_k`` best experts, and none is dropped."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder. Exactly one of ``attention`` and ``mla`` is given; ``moe=None`` is a dense model.

    ``rope=None`` is attention that knows no positions but the order that a causal mask gives.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    intermediate_size: int
    """Width of the dense FFN; unused (but kept for export) where every layer is MoE."""
    max_position_embeddings: int
    norm_eps: float
    rope: RopeConfig | None
    attention: AttentionConfig | None = None
    mla: MLAConfig | None = None
    mamba: MambaConfig | None = None
    moe: MoEConfig | None = None
    norm: Literal["rms", "unit_offset_rms", "layer"] = "rms"
    """RMSNorm, RMSNorm whose parameter is what the factor differs from 1 by, or LayerNorm without bias."""
    norm_placement: Literal["before", "after", "both"] = "before"
    """Where the norms of a block stand: before the mixer and the FFN, after them inside the residual, or both."""
    ffn: Literal["swiglu", "geglu", "relu"] = "swiglu"
    """The FFN, and the experts where they have none of their own: gated by SiLU or tanh-form GELU, or max(0, W x)."""
    embedding_multiplier: float | None = None
    """Factor on the embeddings that enter the first block."""
    logit_multiplier: float | None = None
    """Factor on the output logits."""
    logit_softcap: float | None = None
    """Output logits x become c·tanh(x / c)."""
    tie_word_embeddings: bool = False
    mtp_depth: int = 0
    """Modules after the last layer, each of which predicts one token further ahead (``zoo.model.MTPModule``). Where a
    field says which layers have what, they are layers ``num_layers``, ``num_layers`` + 1, …"""
    initializer_range: float = 0.02
    dropout: float = 0.0
    """Dropout of the output of every mixer and FFN, before it is added to the residual."""

    @property
    def expert_ffn(self) -> Literal["swiglu", "geglu", "relu"]:
        """What an expert computes."""
        return self.ffn if self.moe is None or self.moe.ffn is None else self.moe.ffn

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number ``layer`` (from 0) has routed experts."""
        moe = self.moe
        return moe is not None and layer >= moe.first_k_dense and (layer + 1) % moe.layer_interval == 0

    def is_mamba_layer(self, layer: int) -> bool:
        """Whether layer number ``layer`` (from 0) has Mamba in place of attention."""
        mamba = self.mamba
        return mamba is not None and layer % mamba.attention_interval != mamba.attention_offset

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Sizes as the authors print them. Authors count and round in different ways: ``active`` says how these did.

    Attributes:
        total: Parameters, such as 15.7B.
        active: Parameters for one token, such as 2.4B; None where they print none.
        input_embedding: Whether ``active`` counts the input embedding.
        cut: Whether the digits after the printed ones were cut off, not rounded.
    """

    total: str
    active: str | None = None
    input_embedding: bool = True
    cut: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A named model: what one file of ``configs/models`` and the ``zoo.yaml`` of a checkpoint hold."""

    name: str
    family: str | None
    """Module of ``zoo/families`` that maps this model's weights to and from the published layout, where one can."""
    model: ModelConfig
    source: str | None = None
    """Hub id of the published weights, where there are any."""
    reference: str | None = None
    """Paper or release that the sizes were taken from."""
    published: Published | None = None
    """The sizes that it prints; the model's card stands beside them."""


def load_spec(path: str | Path) -> ModelSpec:
    """Read one file of ``configs/models`` or the ``zoo.yaml`` of a checkpoint.

    Raises:
        ValueError: the file is not valid, or describes an encoder-decoder.
    """
    data = load_yaml(path)
    if ENCODER_DECODER_KEY in data:
        raise not_a_decoder(path)
    return from_dict(ModelSpec, data, str(path))


def not_a_decoder(name: str | Path) -> ValueError:
    """The error that ``name`` is an encoder-decoder where only decoders can be used, with what is missing."""
    return ValueError(
        f"{name}: this is an encoder-decoder, and only decoders are trained, scored, planned, matched and drawn: there "
        "is no data with corrupted spans to train it on, and no plan or harness adapter for two stacks; `zoo list`, "
        "`card`, `import`, `export` and `verify` take it, and load_encoder_decoder of zoo.weights in Python"
    )


def save_spec(spec: ModelSpec | EncoderDecoderSpec, path: str | Path) -> None:
    """Write ``spec`` as YAML that ``load_spec`` reads back equal, or ``load_any_spec``."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(to_dict(spec))))
