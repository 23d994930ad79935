"""Cards of the published models against transformers' own models and against the published figures."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from zoo.accounting import count_buffers, count_parameters
from zoo.families import get_family
from zoo.model import Decoder
from zoo.registry import find_spec, model_names

WITHOUT_TRANSFORMERS = {"deepseek_moe", "grok1"}
"""The families that transformers does not have: their models are code that stands beside the weights."""


@pytest.mark.parametrize("name", model_names())
def test_card_equals_the_decoder(name: str) -> None:
    config = find_spec(name).model
    with torch.device("meta"):
        model = Decoder(config)
    assert count_parameters(config).with_mtp == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in model_names() if find_spec(n).family not in WITHOUT_TRANSFORMERS])
def test_card_equals_the_model_of_transformers(name: str) -> None:
    spec = find_spec(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**get_family(spec.family).to_hf(spec.model)))
    parameters = sum(p.numel() for p in model.parameters())
    assert count_parameters(spec.model).total == parameters
    # MTP modules are no part of transformers' model: tests/parity/test_mtp_weights.py.
    # transformers, too, keeps DeepSeek-V3's selection bias (e_score_correction_bias) as a saved buffer.
    tied = spec.model.vocab_size * spec.model.hidden_size if spec.model.tie_word_embeddings else 0
    assert (
        count_buffers(replace(spec.model, mtp_depth=0))
        == sum(t.numel() for t in model.state_dict().values()) - parameters - tied
    )


@pytest.mark.parametrize("name", [n for n in model_names() if find_spec(n).published])
def test_card_equals_the_published_figures_to_the_printed_digits(name: str) -> None:
    spec = find_spec(name)
    counts, published = count_parameters(spec.model), spec.published
    assert published is not None
    active = counts.active if published.input_embedding else counts.active_without_embedding
    assert in_billions(counts.total, like=published.total, cut=False) == published.total
    assert in_billions(active, like=published.active, cut=published.cut) == published.active


def in_billions(number: int, *, like: str, cut: bool) -> str:
    """``number`` / 10⁹ with as many decimals as ``like``, such as 46.7B, rounded or cut."""
    decimals = -int(Decimal(like.removesuffix("B")).as_tuple().exponent)
    scaled = number / 10 ** (9 - decimals)
    return f"{(math.floor(scaled) if cut else round(scaled)) / 10**decimals:.{decimals}f}B"
