"""What a model costs, from its config alone: parameters, active parameters, FLOPs, bytes of weights and of cache.

Nothing is built and no tensor is allocated: a card of a 671B model takes a millisecond.

Conventions
    *Parameters* are the trained elements. The fp32 selection bias of a router (``moe.router_bias``) is a buffer that no
    gradient reaches: it is counted in ``count_buffers`` and in ``weight_bytes``, not here.
    *Active* parameters are those that the computation of one token may read: everything except the routed experts
    that were not chosen. Both vocabulary matrices count in full, as in Mixtral's and Qwen's published figures;
    ``active_without_embedding`` leaves the input table out (a token reads one row of it), as DeepSeek-V2's do.
    Where experts choose tokens, or their capacity is limited, that is what a token can have in the mean or at most.
    *MTP modules* (``mtp_depth``) are counted apart, as in DeepSeek-V3's figures: a model runs without them. They are in
    ``with_mtp``, in ``count_buffers``, in the bytes of weights and in the FLOPs of training, and nowhere else. Their
    embedding and output head are the model's own.
    *FLOPs* are those of matrix products, a multiply-add being two: twice the weights that a token is multiplied with
    (the output head included, tied or not; the embedding look-up not), plus attention scores and values over the
    positions that a causal query really sees, averaged over a sequence. In a Mamba layer the recurrence h = a·h + b,
    its read-out c·h and the convolution take the place of scores and values: a multiply-add for each number of state,
    another to read it, and one for each token of the convolution. Training is three times the forward pass (the
    backward pass multiplies by weights and by activations, arXiv 2001.08361 section 2.1), that of MTP modules and of
    the head on each of them included; recomputation is not counted.

Shapes: D model, H heads, S sequence, V vocabulary, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from zoo.config import AttentionConfig, MambaConfig, MLAConfig, ModelConfig, MoEConfig

TRAINING_OVER_FORWARD = 3
FP32_BYTES, BF16_BYTES = 4, 2


@dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """Parameters of one layer, by block."""

    norms: int
    """The norms before and after mixer and FFN."""
    mixer: int
    """Attention, MLA or Mamba with the norms and biases inside it."""
    dense_ffn: int = 0
    router: int = 0
    routed_experts: int = 0
    """All E experts."""
    active_experts: int = 0
    """The K of them that one token goes through."""
    shared_experts: int = 0
    """With their gate, where there is one."""
    mtp_input: int = 0
    """Of an MTP module: the projection of embedding and hidden state, and the norms before it and of the output."""

    @property
    def total(self) -> int:
        ffn = self.dense_ffn + self.router + self.routed_experts + self.shared_experts
        return self.norms + self.mixer + ffn + self.mtp_input

    @property
    def active(self) -> int:
        return self.total - self.routed_experts + self.active_experts


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters of a model, by block."""

    embedding: int
    lm_head: int
    """0 where the embedding is tied to it."""
    final_norm: int
    layers: tuple[LayerParameters, ...]
    mtp: tuple[LayerParameters, ...] = ()
    """The MTP modules."""

    @property
    def total(self) -> int:
        return self.embedding + self.lm_head + self.final_norm + sum(layer.total for layer in self.layers)

    @property
    def with_mtp(self) -> int:
        """All that a checkpoint holds."""
        return self.total + sum(module.total for module in self.mtp)

    @property
    def active(self) -> int:
        return self.embedding + self.lm_head + self.final_norm + sum(layer.active for layer in self.layers)

    @property
    def active_without_embedding(self) -> int:
        """Active parameters less the input table, unless that table is the output head as well."""
        return self.active - (self.embedding if self.lm_head else 0)


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters of the model that ``config`` describes; ``with_mtp`` are those of ``Decoder(config)``."""
    vocabulary = config.vocab_size * config.hidden_size
    return Parameters(
        embedding=vocabulary,
        lm_head=0 if config.tie_word_embeddings else vocabulary,
        final_norm=config.hidden_size,
        layers=tuple(_layer(config, layer) for layer in range(config.num_layers)),
        mtp=tuple(_mtp_module(config, config.num_layers + k) for k in range(config.mtp_depth)),
    )


def count_buffers(config: ModelConfig) -> int:
    """Elements of the fp32 buffers that a checkpoint holds beside the parameters: selection biases, and the step of
    annealed temperatures."""
    moe = config.moe
    if moe is None:
        return 0
    annealed = moe.routing is not None and moe.routing.temperature is not None
    return (moe.num_experts * moe.router_bias + annealed) * _num_moe_layers(config)


def weight_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of a checkpoint whose parameters take ``itemsize`` bytes each; buffers stay fp32."""
    return count_parameters(config).with_mtp * itemsize + count_buffers(config) * FP32_BYTES


def cache_elements_per_token(config: ModelConfig) -> int:
    """Elements that a KV cache holds per token, over all layers.

    For MLA the latent and the one rotary key (arXiv 2405.04434, table 1); otherwise keys and values of every KV head.
    Mamba layers hold none (``state_elements``).
    """
    layers = config.num_layers - _num_mamba_layers(config)
    if config.mla:
        return (config.mla.kv_lora_rank + config.mla.qk_rope_head_dim) * layers
    attention = _attention(config)
    return 2 * attention.num_kv_heads * attention.head_dim * layers


def state_elements(config: ModelConfig) -> int:
    """Elements that Mamba layers hold per sequence, however long: the state and the convolution's last inputs."""
    if config.mamba is None:
        return 0
    channels = config.mamba.expand * config.hidden_size
    return channels * (config.mamba.state_size + config.mamba.conv_width - 1) * _num_mamba_layers(config)


def forward_flops(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of the forward pass per token, averaged over a causal sequence of ``sequence_length`` tokens.

    Raises:
        ValueError: ``sequence_length`` is below 1.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length = {sequence_length}: give a positive number of tokens")
    parameters = count_parameters(config)
    weights = config.vocab_size * config.hidden_size
    for layer in range(config.num_layers):
        weights += parameters.layers[layer].active - _non_matmul(config, layer)
    return 2.0 * weights + attention_flops(config, sequence_length) * config.num_layers


def attention_flops(config: ModelConfig, sequence_length: int) -> float:
    """Forward FLOPs per token and layer of scores (q·k) and of the weighted sum of values, keys and values expanded.

    The mean over layers, where some have a sliding window, or Mamba and its recurrence in place of attention.
    """
    layers = range(config.num_layers)
    return sum(_mixing_flops(config, layer, sequence_length) for layer in layers) / config.num_layers


def _mixing_flops(config: ModelConfig, layer: int, sequence_length: int) -> float:
    if config.mamba and config.is_mamba_layer(layer):
        return 2.0 * config.mamba.expand * config.hidden_size * (2 * config.mamba.state_size + config.mamba.conv_width)
    if config.mla:
        sizes = config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim + config.mla.v_head_dim
        return 2.0 * config.mla.num_heads * sizes * _mean_visible(sequence_length, None)
    attention = _attention(config)
    return 4.0 * attention.num_heads * attention.head_dim * _visible_in_layer(attention, layer, sequence_length)


def _visible_in_layer(attention: AttentionConfig, layer: int, sequence_length: int) -> float:
    chunk = attention.chunk(layer)
    if chunk is None:
        return _mean_visible(sequence_length, attention.window(layer))
    whole, rest = divmod(sequence_length, chunk)
    return (whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2) / sequence_length


def training_flops(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of the forward and backward pass per token, averaged over a sequence of ``sequence_length`` tokens."""
    forward = forward_flops(config, sequence_length) + 2.0 * _only_in_training(config)
    for k, module in enumerate(count_parameters(config).mtp):
        layer = config.num_layers + k
        weights = (
            module.active - _non_matmul(config, layer) - _mtp_norms(config) + config.vocab_size * config.hidden_size
        )
        forward += 2.0 * weights + _mixing_flops(config, layer, sequence_length)
    return TRAINING_OVER_FORWARD * forward


def _only_in_training(config: ModelConfig) -> int:
    """Weights that a token is multiplied with while training, and not afterwards: noise, and experts not chosen."""
    if config.moe is None or config.moe.routing is None:
        return 0
    per_layer = _noise(config.moe, config.hidden_size)
    if config.moe.routing.dense_training:
        others = config.moe.num_experts - config.moe.top_k
        per_layer += others * _ffn(config.expert_ffn, config.hidden_size, config.moe.moe_intermediate_size)
    return per_layer * _num_moe_layers(config)


def summary(config: ModelConfig, sequence_length: int) -> dict[str, Any]:
    """All of the above as plain data for a JSON file; FLOPs are per token at ``sequence_length``."""
    parameters = count_parameters(config)
    cache = cache_elements_per_token(config)
    return {
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "active_without_embedding": parameters.active_without_embedding,
            "embedding": parameters.embedding,
            "lm_head": parameters.lm_head,
            "final_norm": parameters.final_norm,
            "layers": [{**asdict(p), "total": p.total, "active": p.active} for p in parameters.layers],
            "mtp": [{**asdict(p), "total": p.total, "active": p.active} for p in parameters.mtp],
        },
        "buffers": count_buffers(config),
        "flops_per_token": {
            "sequence_length": sequence_length,
            "forward": forward_flops(config, sequence_length),
            "training": training_flops(config, sequence_length),
        },
        "cache_bytes_per_token": {"fp32": cache * FP32_BYTES, "bf16": cache * BF16_BYTES},
        "state_elements": state_elements(config),
        "weight_bytes": {"fp32": weight_bytes(config, FP32_BYTES), "bf16": weight_bytes(config, BF16_BYTES)},
    }


def _layer(config: ModelConfig, layer: int) -> LayerParameters:
    width = config.hidden_size
    mixer = _mixer_parameters(config, layer)
    norms, dense_ffn = _norms(config, layer), _ffn(config.ffn, width, config.intermediate_size)
    if not config.is_moe_layer(layer):
        return LayerParameters(norms=norms, mixer=mixer, dense_ffn=dense_ffn)
    moe = _moe(config)
    matrices = _ffn(config.expert_ffn, width, moe.moe_intermediate_size)
    expert = matrices + _expert_biases(width, moe)
    return LayerParameters(
        norms=norms,
        mixer=mixer,
        dense_ffn=dense_ffn if moe.dense_ffn else 0,
        router=_router(moe, width) + _noise(moe, width),
        routed_experts=moe.num_experts * expert,
        active_experts=moe.top_k * expert,
        shared_experts=moe.num_shared_experts * matrices + (width if moe.shared_expert_gate else 0),
    )


def _mtp_module(config: ModelConfig, layer: int) -> LayerParameters:
    return replace(_layer(config, layer), mtp_input=2 * config.hidden_size**2 + _mtp_norms(config))


def _mtp_norms(config: ModelConfig) -> int:
    return 3 * config.hidden_size


def _mixer_parameters(config: ModelConfig, layer: int) -> int:
    if config.mamba and config.is_mamba_layer(layer):
        return _mamba_parameters(config.hidden_size, config.mamba)
    if config.mla:
        return _mla_parameters(config.hidden_size, config.mla)
    return _attention_parameters(config.hidden_size, _attention(config))


def _ffn(kind: str, hidden_size: int, width: int) -> int:
    """Up and down projection, and the gate where there is one."""
    return (2 if kind == "relu" else 3) * hidden_size * width


def _attention_parameters(hidden_size: int, a: AttentionConfig) -> int:
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    weights = hidden_size * (queries + 2 * keys) + queries * hidden_size
    return weights + _attention_vectors(hidden_size, a)


def _attention_vectors(hidden_size: int, a: AttentionConfig) -> int:
    """Biases (of scores too), sinks and the norms of queries and keys: no token is matrix-multiplied with them."""
    bias = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim if a.qkv_bias else 0
    bias += a.relative_positions.num_buckets * a.num_heads if a.relative_positions else 0
    normed = {None: 0, "head": 2 * a.head_dim, "projection": (a.num_heads + a.num_kv_heads) * a.head_dim}
    return bias + (hidden_size if a.output_bias else 0) + normed[a.qk_norm] + (a.num_heads if a.sinks else 0)


def _mla_parameters(hidden_size: int, m: MLAConfig) -> int:
    queries = m.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    if m.q_lora_rank is None:
        query_weights = hidden_size * queries
    else:
        query_weights = hidden_size * m.q_lora_rank + m.q_lora_rank * queries
    down = hidden_size * (m.kv_lora_rank + m.qk_rope_head_dim)
    up = m.kv_lora_rank * m.num_heads * (m.qk_nope_head_dim + m.v_head_dim)
    output = m.num_heads * m.v_head_dim * hidden_size
    return query_weights + down + up + output + _mla_vectors(m)


def _mla_vectors(m: MLAConfig) -> int:
    """The norms of the two latents."""
    return m.kv_lora_rank + (m.q_lora_rank or 0)


def _mamba_parameters(hidden_size: int, m: MambaConfig) -> int:
    channels = m.expand * hidden_size
    projections = 3 * hidden_size + (m.dt_rank + 2 * m.state_size) + m.dt_rank
    return channels * projections + _mamba_vectors(hidden_size, m)


def _mamba_vectors(hidden_size: int, m: MambaConfig) -> int:
    """A, D, the bias of dt, the convolution with its bias, and the norms of dt, B and C."""
    return m.expand * hidden_size * (m.state_size + m.conv_width + 3) + m.dt_rank + 2 * m.state_size


def _expert_biases(hidden_size: int, moe: MoEConfig) -> int:
    """Of one expert: those of gate, up and down."""
    return 0 if moe.swiglu_limit is None else 2 * moe.moe_intermediate_size + hidden_size


def _router(moe: MoEConfig, hidden_size: int) -> int:
    if moe.routing is not None and moe.routing.choice == "hash":
        return 0
    return moe.num_experts * hidden_size + _router_biases(moe)


def _router_biases(moe: MoEConfig) -> int:
    return moe.num_experts if moe.router_logit_bias else 0


def _noise(moe: MoEConfig, hidden_size: int) -> int:
    """Parameters that give the width of the router's noise, while training."""
    return moe.num_experts * hidden_size if moe.routing is not None and moe.routing.noise else 0


def _non_matmul(config: ModelConfig, layer: int) -> int:
    """Parameters of one layer that no token is multiplied with outside of training, or element by element: norms."""
    if config.mamba and config.is_mamba_layer(layer):
        inside = _mamba_vectors(config.hidden_size, config.mamba)
    elif config.mla:
        inside = _mla_vectors(config.mla)
    else:
        inside = _attention_vectors(config.hidden_size, _attention(config))
    if config.is_moe_layer(layer):
        moe = _moe(config)
        inside += _router_biases(moe) + _noise(moe, config.hidden_size)
        inside += moe.top_k * _expert_biases(config.hidden_size, moe)
    return _norms(config, layer) + inside


def _norms(config: ModelConfig, layer: int) -> int:
    """Parameters of the norms around the sub-blocks of one layer: mixer and FFN, or mixer, experts and FFN."""
    sub_blocks = 3 if config.is_moe_layer(layer) and _moe(config).dense_ffn else 2
    return sub_blocks * (2 if config.norm_placement == "both" else 1) * config.hidden_size


def _mean_visible(sequence_length: int, window: int | None) -> float:
    """Mean over positions i = 0 … S - 1 of min(i + 1, window): how many positions a causal query sees."""
    ramp = min(window or sequence_length, sequence_length)
    return (ramp * (ramp + 1) / 2 + (sequence_length - ramp) * ramp) / sequence_length


def _num_moe_layers(config: ModelConfig) -> int:
    """MTP modules included."""
    return sum(map(config.is_moe_layer, range(config.num_layers + config.mtp_depth)))


def _num_mamba_layers(config: ModelConfig) -> int:
    return sum(config.is_mamba_layer(layer) for layer in range(config.num_layers))


def _attention(config: ModelConfig) -> AttentionConfig:
    assert config.attention is not None, "a validated config has attention or mla"
    return config.attention


def _moe(config: ModelConfig) -> MoEConfig:
    assert config.moe is not None, "is_moe_layer holds only with a moe block"
    return config.moe
