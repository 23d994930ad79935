"""Weights of 8 bits: rounding within half a step, the products of the rounded weights, and equal predictions."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.int8 import FEW_ROWS, Int8Linear, linear_int8, quantize_int8, quantized
from zoo.model import Decoder
from zoo.registry import find_spec


def test_rounding_is_within_half_a_step_of_each_row() -> None:
    weight = torch.randn(3, 5, 64) * torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1)
    weight[1, 2] = 0.0
    values, scale = quantized(weight)
    # The scale is rounded as well, to 8 bits: the largest weight of a row may be cut off by as much.
    error = (values * scale.float().unsqueeze(-1) - weight).abs()
    assert bool((error <= 0.51 * scale.float().unsqueeze(-1) + weight.abs().amax(-1, keepdim=True) * 2**-8).all())
    assert values[1, 2].count_nonzero() == 0 and values.abs().amax() <= 127


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_rounded_weights(rows: int, dtype: torch.dtype) -> None:
    values, scale = quantized(torch.randn(48, 96))
    x = torch.randn(rows, 96).to(dtype)
    expected = x.float() @ (values.float() * scale.float().unsqueeze(-1)).T
    out = linear_int8(x, values, scale)
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("name", ["facts-mixtral", "facts-qwen3-moe", "facts-deepseek-moe"])
def test_a_trained_model_keeps_its_perplexity_within_a_percent(name: str, repository: Path) -> None:
    """Of texts that the exact model draws, in one forward and token by token."""
    exact = zoo.load(repository / "checkpoints" / name)
    rounded = copy.deepcopy(exact)
    quantize_int8(rounded)
    prompts = [[1 + i] for i in range(8)]
    drawn = zoo.generate(exact, prompts, max_new_tokens=32, temperature=1.0, seed=0)
    ids = torch.tensor([prompt + new for prompt, new in zip(prompts, drawn, strict=True)])
    for logits in (at_once, one_by_one):
        assert abs(nll(logits(rounded, ids), ids) - nll(logits(exact, ids), ids)) < 0.01


def test_every_ffn_is_replaced_and_takes_a_quarter() -> None:
    model = zoo.build(find_spec("deepseek-v3-tiny").model)
    layers = [copy.deepcopy(model.layers[i].ffn) for i in (0, 1)]
    quantize_int8(model)
    for before, block in zip(layers, model.layers, strict=False):
        assert not any(isinstance(module, torch.nn.Linear) for module in block.ffn.modules())
        assert size(block.ffn) < 0.3 * size(before)
    assert isinstance(model.layers[1].ffn.shared_experts.up_proj, Int8Linear)


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ValueError, match="experts with biases"):
        quantize_int8(zoo.build(find_spec("gpt-oss-tiny").model))
    with torch.device("meta"), pytest.raises(ValueError, match="int8 on meta"):
        quantize_int8(Decoder(find_spec("mixtral-tiny").model))


def at_once(model: Decoder, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids[:, :-1]).logits


def one_by_one(model: Decoder, ids: Tensor) -> Tensor:
    cache = model.new_cache(*ids.shape)
    with torch.inference_mode():
        return torch.cat([model(column, cache=cache).logits for column in ids[:, :-1].split(1, dim=1)], dim=1)


def nll(logits: Tensor, ids: Tensor) -> float:
    return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def size(module: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
