"""Rotary frequencies against transformers' and the rotation against complex numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zoo.config import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling, yarn_mscale
from zoo.families import get_family
from zoo.families.fields import Fields
from zoo.families.parts import read_rope
from zoo.layers.rope import Rotary, inverse_frequencies, rotate
from zoo.registry import find_spec

YARN = {"factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0}
PAPER = 0.1 * math.log(40.0) + 1


def yarn(attention_factor: float = PAPER, **others: Any) -> RopeConfig:
    scaling = YarnScaling(original_max_position=4096, attention_factor=attention_factor, **YARN, **others)
    return RopeConfig(theta=1e4, yarn=scaling)


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
        yarn(),
        {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 4096, **YARN},
    ),
    "yarn of a file that gives the factor alone": (
        yarn(),
        {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 4096, "factor": 40.0},
    ),
    "yarn with an attention_factor": (
        yarn(1.2, mscale_all_dim=0.707),
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.2,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            **YARN,
        },
    ),
    "yarn with both mscales": (
        yarn((0.1 * 0.707 * math.log(40.0) + 1) / (0.1 * 1.2 * math.log(40.0) + 1), mscale_all_dim=1.2),
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
        yarn(truncate=False),
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
    assert scale == expected_scale
    assert read_rope(Fields({"max_position_embeddings": 163840, "rope_parameters": parameters})) == rope


@pytest.mark.parametrize("attention_factor", [1.0, 1.2, PAPER, 0.5])
def test_row_15_readers_of_either_spelling_find_the_scale_in_a_written_file(attention_factor: float) -> None:
    """DeepSeek's own code reads the two mscales, transformers ``attention_factor``."""
    spec = find_spec("deepseek-v2-lite")
    rope = yarn(attention_factor, mscale_all_dim=0.707)
    hf = get_family("deepseek_v2").to_hf(replace(spec.model, rope=replace(rope, layout="interleaved")))
    written = hf["rope_scaling"]
    above, below = (0.1 * written[name] * math.log(40.0) + 1 for name in ("mscale", "mscale_all_dim"))
    assert above / below == pytest.approx(attention_factor, rel=1e-14)
    assert (written["mscale"] == written["mscale_all_dim"]) == (attention_factor == 1)
    assert written["attention_factor"] == attention_factor


def test_plain_frequencies_by_hand() -> None:
    frequencies, scale = inverse_frequencies(RopeConfig(theta=100.0), 4)
    assert frequencies.tolist() == pytest.approx([1.0, 0.1])
    assert scale == 1.0


def test_mscale_by_hand() -> None:
    assert yarn_mscale(40.0, 0.707) == pytest.approx(0.1 * 0.707 * math.log(40.0) + 1)
    assert yarn_mscale(0.5) == 1.0


@pytest.mark.parametrize("layout", ["split", "interleaved"])
def test_rotation_is_multiplication_of_complex_pairs(layout: Literal["split", "interleaved"]) -> None:
    rope = replace(yarn(), layout=layout)
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
