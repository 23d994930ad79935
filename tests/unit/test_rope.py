"""Rotary frequencies against transformers' and the rotation against complex numbers."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zoo.config import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from zoo.layers.rope import Rotary, inverse_frequencies, rotate, yarn_mscale

YARN = {"factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0}
CASES = {
    "linear": (
        RopeConfig(theta=1e4, linear=LinearScaling(factor=4.0)),
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    ),
    "llama3": (
        RopeConfig(
            theta=5e5,
            llama3=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192),
        ),
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        RopeConfig(theta=1e4, yarn=YarnScaling(original_max_position=4096, **YARN)),
        {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 4096, **YARN},
    ),
    "yarn with both mscales": (
        RopeConfig(theta=1e4, yarn=YarnScaling(original_max_position=4096, mscale=0.707, mscale_all_dim=1.2, **YARN)),
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 4096,
            "mscale": 0.707,
            "mscale_all_dim": 1.2,
            **YARN,
        },
    ),
    "yarn, not truncated": (
        RopeConfig(theta=1e4, yarn=YarnScaling(original_max_position=4096, truncate=False, **YARN)),
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 4096,
            "truncate": False,
            **YARN,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_transformers(name: str) -> None:
    rope, parameters = CASES[name]
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=163840, rope_parameters=parameters
    )
    expected, expected_scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    frequencies, scale = inverse_frequencies(rope, 64)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert scale == pytest.approx(expected_scale, rel=1e-12)


def test_plain_frequencies_by_hand() -> None:
    frequencies, scale = inverse_frequencies(RopeConfig(theta=100.0), 4)
    assert frequencies.tolist() == pytest.approx([1.0, 0.1])
    assert scale == 1.0


def test_mscale_by_hand() -> None:
    assert yarn_mscale(40.0, 0.707) == pytest.approx(0.1 * 0.707 * math.log(40.0) + 1)
    assert yarn_mscale(0.5) == 1.0


@pytest.mark.parametrize("layout", ["split", "interleaved"])
def test_rotation_is_multiplication_of_complex_pairs(layout: Literal["split", "interleaved"]) -> None:
    rope = RopeConfig(theta=1e4, layout=layout, yarn=YarnScaling(original_max_position=4096, **YARN))
    frequencies, scale = inverse_frequencies(rope, 8)
    positions, x = torch.tensor([[0, 1, 7, 3, 900]]).expand(2, 5), torch.randn(2, 5, 3, 8, dtype=torch.float64)
    turn = torch.polar(
        torch.full((2, 5, 1, 4), scale).double(), (positions[..., None] * frequencies)[:, :, None].double()
    )
    rotated = rotate(x, *Rotary(rope, 8)(positions, 901, x.dtype), layout)
    if layout == "interleaved":
        expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(-2)
    else:
        pairs = torch.complex(x[..., :4], x[..., 4:]) * turn
        expected = torch.cat((pairs.real, pairs.imag), dim=-1)
    torch.testing.assert_close(rotated, expected, rtol=1e-5, atol=1e-5)


def test_training_goes_on_with_positions_that_generation_looked_up() -> None:
    rotary = Rotary(RopeConfig(theta=1e4), 8)
    with torch.inference_mode():
        rotary(torch.arange(5)[None], 5, torch.float32)
    x = torch.randn(1, 3, 2, 8, requires_grad=True)
    rotate(x, *rotary(torch.arange(3)[None], 3, torch.float32), "split").square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())  # a rotation keeps the norm


def test_late_positions_keep_fp32_angles_in_a_bf16_model() -> None:
    rotary = Rotary(RopeConfig(theta=1e4), 8)
    cos, _ = rotary(torch.tensor([[100_001]]), 100_002, torch.bfloat16)
    exact = torch.cos(100_001 * (1e4 ** -(torch.arange(0, 8, 2).double() / 8)))
    assert (cos.flatten()[:4].double() - exact).abs().max() < 0.01  # a bf16 angle would be off by up to 256 radians
