"""Counts from the config alone, against hand-computed models and against the model itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from random_configs import model_configs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zoo.accounting import (
    cache_elements_per_token,
    count_buffers,
    count_parameters,
    forward_flops,
    summary,
    training_flops,
    weight_bytes,
)
from zoo.config import AttentionConfig, InterleavedRopeConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from zoo.model import Decoder
from zoo.moe.dispatch import LocalDispatcher
from zoo.moe.layer import MoE

DENSE = ModelConfig(
    vocab_size=10,
    hidden_size=4,
    num_layers=2,
    intermediate_size=8,
    max_position_embeddings=64,
    norm_eps=1e-6,
    rope=RopeConfig(theta=10000.0),
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=2),
)
SPARSE = replace(
    DENSE,
    moe=MoEConfig(
        num_experts=4,
        top_k=2,
        moe_intermediate_size=3,
        score_func="sigmoid",
        norm_topk_prob=True,
        router_bias=True,
        num_shared_experts=1,
        shared_expert_gate=True,
        first_k_dense=1,
    ),
)


def test_counts_of_a_model_small_enough_to_count_by_hand() -> None:
    counts = count_parameters(SPARSE)
    dense, sparse = counts.layers
    assert dense.mixer == 4 * 4 + 2 * 4 * 2 + 4 * 4
    assert dense.dense_ffn == 3 * 4 * 8
    assert (sparse.router, sparse.routed_experts, sparse.active_experts) == (4 * 4, 4 * 36, 2 * 36)
    assert sparse.shared_experts == 36 + 4
    assert counts.total - counts.active == 2 * 36
    assert counts.active - counts.active_without_embedding == 10 * 4
    assert count_buffers(SPARSE) == 4


def test_flops_of_a_model_small_enough_to_count_by_hand() -> None:
    # Per layer 48 attention and 96 FFN weights, and the head's 40; one query sees 1, 2, 3 positions in turn: 2 on
    # average, and each costs 2 heads × (2 scores + 2 values) multiply-adds a layer.
    assert forward_flops(DENSE, 3) == 2 * (2 * (48 + 96) + 40) + 2 * (2 * 2 * 4 * 2)
    assert training_flops(DENSE, 3) == 3 * forward_flops(DENSE, 3)


def test_norms_and_biases_cost_no_matrix_flops() -> None:
    attention = replace(DENSE.attention, qkv_bias=True, output_bias=True, qk_norm="head")
    assert forward_flops(replace(DENSE, attention=attention), 7) == forward_flops(DENSE, 7)
    moe = replace(SPARSE.moe, router_logit_bias=True, swiglu_limit=7.0)
    assert forward_flops(replace(SPARSE, moe=moe), 7) == forward_flops(SPARSE, 7)


def test_a_tied_head_is_counted_once_and_still_multiplied_with() -> None:
    tied = replace(DENSE, tie_word_embeddings=True)
    assert count_parameters(DENSE).total - count_parameters(tied).total == 40
    assert count_parameters(tied).active_without_embedding == count_parameters(tied).active
    assert forward_flops(tied, 5) == forward_flops(DENSE, 5)


def test_a_sliding_window_bounds_what_a_query_sees() -> None:
    windowed = replace(DENSE, attention=replace(DENSE.attention, sliding_window=2))
    # Positions 1, 2, 2, 2 instead of 1, 2, 3, 4.
    assert forward_flops(DENSE, 4) - forward_flops(windowed, 4) == pytest.approx(2 * 2 * 4 * 2 * (2.5 - 1.75))
    assert forward_flops(windowed, 2) == forward_flops(DENSE, 2)


def test_every_other_layer_without_the_window_sees_everything() -> None:
    windowed = replace(DENSE, attention=replace(DENSE.attention, sliding_window=2))
    mixed = replace(DENSE, attention=replace(windowed.attention, full_attention_interval=2))
    assert forward_flops(mixed, 4) == pytest.approx((forward_flops(DENSE, 4) + forward_flops(windowed, 4)) / 2)


def test_a_chunk_bounds_what_a_query_sees() -> None:
    rope = InterleavedRopeConfig(
        full_attention_interval=2, chunk_size=3, qk_norm=False, temperature_scale=0.1, temperature_floor=8
    )
    chunked = replace(DENSE, attention=replace(DENSE.attention, interleaved_rope=rope))
    # In one of two layers positions see 1, 2, 3, 1 tokens instead of 1, 2, 3, 4.
    assert forward_flops(DENSE, 4) - forward_flops(chunked, 4) == pytest.approx(2 * 4 * 2 * (2.5 - 1.75))


def test_flops_need_a_positive_sequence_length() -> None:
    with pytest.raises(ValueError, match="sequence_length = 0"):
        forward_flops(DENSE, 0)


def test_mla_caches_the_latent_and_one_rotary_key() -> None:
    mla = MLAConfig(
        num_heads=128, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    assert cache_elements_per_token(replace(DENSE, attention=None, mla=mla, num_layers=60)) == 60 * 576


@settings(max_examples=60, deadline=None)
@given(model_configs())
def test_counts_equal_those_of_the_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Decoder(config)
    counts = count_parameters(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    for index, layer in enumerate(counts.layers):
        assert layer.total == sum(p.numel() for p in model.layers[index].parameters())
    assert count_buffers(config) == sum(t.numel() for t in model.state_dict().values()) - counts.total
    assert weight_bytes(config, 2) == 2 * counts.total + 4 * count_buffers(config)


@settings(max_examples=20, deadline=None)
@given(model_configs())
def test_cache_bytes_equal_those_of_the_cache(config: ModelConfig) -> None:
    with torch.device("meta"):
        cache = Decoder(config).new_cache(3, 5)
    costs = summary(config, 5)
    assert cache.bytes == costs["cache_bytes_per_token"]["fp32"] * 15 + costs["state_elements"] * 4 * 3


@settings(max_examples=20, deadline=None)
@given(model_configs(max_layers=2))
def test_flops_equal_those_that_torch_counts(config: ModelConfig) -> None:
    """FlopCounterMode sees every matrix product, the weighted sum of experts too, and attention without its mask.

    That sum is a product where rows are dispatched.
    """
    length = 6
    model = Decoder(config).eval()
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.dispatcher = LocalDispatcher()
    input_ids = torch.randint(config.vocab_size, (1, length))
    # The fused kernel for CPU is unknown to the counter; the plain one is made of products that it knows.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(input_ids)
    attending = [layer for layer in range(config.num_layers) if not config.is_mamba_layer(layer)]
    windows = [window_of(config, layer) or length for layer in attending]
    masked = sum(length - min(i + 1, window) for window in windows for i in range(length))
    per_pair = 2 * sum(head_sizes(config))
    combine = (
        2 * config.moe.top_k * config.hidden_size * sum(map(config.is_moe_layer, range(config.num_layers)))
        if config.moe
        else 0
    )
    # The recurrence and the convolution are not written as products; reading the state is.
    unseen = (
        2 * config.mamba.expand * config.hidden_size * (config.mamba.state_size + config.mamba.conv_width)
        if config.mamba
        else 0
    ) * (config.num_layers - len(attending))
    expected = (forward_flops(config, length) + combine - unseen) * length + masked * per_pair
    assert counter.get_total_flops() == pytest.approx(expected)


def window_of(config: ModelConfig, layer: int) -> int | None:
    return config.attention.window(layer) if config.attention else None


def head_sizes(config: ModelConfig) -> tuple[int, int]:
    """Elements of all queries and of all values of one token."""
    if config.mla:
        query = config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim
        return config.mla.num_heads * query, config.mla.num_heads * config.mla.v_head_dim
    assert config.attention
    return (config.attention.num_heads * config.attention.head_dim,) * 2
