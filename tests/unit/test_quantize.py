"""Weights of few bits: rounding within half a step, products of the rounded weights, and what a model loses by it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import zoo
from zoo.cli.main import main
from zoo.model import Decoder
from zoo.moe.experts import Experts
from zoo.moe.router import RouterOutput
from zoo.quantize import (
    KINDS,
    DynamicInt8,
    Int4,
    Int8,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedWeight,
    held_bytes,
    quantize,
    unpacked,
)
from zoo.registry import find_spec
from zoo.weights.precision import floating_dtype, native_bf16

CPU = torch.device("cpu")
PERPLEXITY = {"int8": 0.01, "int8-dynamic": 0.01, "int4": 0.03}
"""Most change of the logarithm that is allowed on the zoo's own trained models."""


def test_rounding_to_8_bits_is_within_half_a_step_of_each_row() -> None:
    weight = torch.randn(3, 5, 64) * torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1)
    weight[1, 2] = 0.0
    held = Int8(weight)
    # The scale is rounded as well, to 8 bits: the largest weight of a row may be cut off by as much.
    step = held.scale.float().unsqueeze(-1)
    cut = weight.abs().amax(-1, keepdim=True) * 2**-8
    assert bool(((held.values * step - weight).abs() <= 0.51 * step + cut).all())
    assert held.values[1, 2].count_nonzero() == 0 and held.values.abs().amax() <= 127


def test_rounding_to_4_bits_is_within_half_a_step_of_each_group() -> None:
    weight = torch.randn(2, 48, 96) * torch.logspace(-3, 1, 96)
    groups = weight.unflatten(-1, (-1, 32))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    error = (dense(Int4(weight)) - weight).unflatten(-1, (-1, 32)).abs()
    # Scale and offset are rounded to 8 bits.
    assert bool((error <= 0.51 * (high - low) / 15 + 2**-8 * (high.abs() + low.abs() + high - low)).all())


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    rows=st.sampled_from([0, 1, 3, 5, 17, 97, 130]),
    shape=st.tuples(st.integers(1, 3), st.integers(2, 130), st.integers(1, 100)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_products_are_those_of_the_rounded_weights(
    kind: str, rows: int, shape: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    """Of any sizes, also those that torch's own products would read beyond."""
    torch.manual_seed(seed)
    weight, x = torch.randn(shape), torch.randn(rows, shape[2]).to(dtype)
    held = KINDS[kind](weight)
    for index, exact in enumerate(dense(held)):
        out, expected = held.product(x, index), x.float() @ exact.T
        assert out.dtype == dtype and out.shape == expected.shape
        assert torch.linalg.norm(out.float() - expected) <= 0.02 * torch.linalg.norm(x.float()) * exact.norm()


def test_rows_of_very_unequal_size_each_have_their_own_scale() -> None:
    x = torch.randn(16, 64) * torch.logspace(-6, 6, 16).unsqueeze(1)
    x[3] = 0.0
    held = DynamicInt8(torch.randn(1, 32, 64))
    out, expected = held.product(x), x @ dense(held)[0].T
    assert bool(((out - expected).norm(dim=1) <= 0.02 * expected.norm(dim=1)).all()) and not out[3].any()


def test_4_bits_are_unpacked_as_they_are_defined() -> None:
    """Without torch's product: value, scale and offset."""
    values = torch.randint(16, (128, 64), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(values, 1)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert torch.equal(unpacked(packed), values.T)
    scales = torch.rand(2, 128, 2).to(torch.bfloat16)
    scale, offset = (part.float().T.repeat_interleave(32, dim=1) for part in scales.unbind(-1))
    product = torch._weight_int4pack_mm_for_cpu(torch.eye(64).bfloat16(), packed, 32, scales)
    torch.testing.assert_close(product.float().T, (values - 8) * scale + offset, rtol=2e-2, atol=2e-2)


def test_4_bits_on_a_processor_of_another_packing() -> None:
    """Where ``unpacked`` does not know the order in memory, many rows are multiplied as few ones are."""
    code = (
        "import torch; from zoo.quantize import Int4; torch.manual_seed(0); w = torch.randn(1, 96, 64);"
        "x = torch.randn(200, 64); held = Int4(w); out = held.product(x);"
        "assert (out - held.few(x, 0)[:, :96]).norm() < 0.01 * out.norm();"
        "assert (out - x @ w[0].T).norm() < 0.12 * out.norm()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"})


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("name", ["facts-mixtral", "facts-qwen3-moe", "facts-deepseek-moe"])
def test_a_trained_model_keeps_its_perplexity(name: str, kind: str, repository: Path) -> None:
    """Of texts that the exact model draws, in one forward and token by token."""
    exact = zoo.load(repository / "checkpoints" / name)
    rounded = copy.deepcopy(exact)
    quantize(rounded, kind)
    prompts = [[1 + i] for i in range(8)]
    drawn = zoo.generate(exact, prompts, max_new_tokens=32, temperature=1.0, seed=0)
    ids = torch.tensor([prompt + new for prompt, new in zip(prompts, drawn, strict=True)])
    for logits in (at_once, one_by_one):
        assert abs(nll(logits(rounded, ids), ids) - nll(logits(exact, ids), ids)) < PERPLEXITY[kind]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_is_computed_as_among_others(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    experts = Experts(6, 64, 96).to(dtype)
    for weight in experts.weights:
        torch.nn.init.normal_(weight)
    held = QuantizedExperts(experts, KINDS[kind])
    x, scores = torch.randn(3, 64).to(dtype), torch.rand(3, 6)
    weights, chosen = scores.topk(2)
    with torch.no_grad():
        together = held(x, RouterOutput(scores, scores, weights, chosen))
        alone = torch.cat(
            [held(x[[t]], RouterOutput(*(f[[t]] for f in (scores, scores, weights, chosen)))) for t in range(3)]
        )
    torch.testing.assert_close(
        alone, together, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps * float(together.abs().max())
    )


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.26), ("int8-dynamic", 0.26), ("int4", 0.17)])
def test_every_ffn_is_replaced_and_takes_less_memory(kind: str, share: float) -> None:
    model = zoo.build(find_spec("deepseek-v3-tiny").model)
    before = [held_bytes(held) for held in (model.layers[0].ffn, model.layers[1].ffn.experts)]
    quantize(model, kind)
    for block in model.layers:
        assert not any(isinstance(module, torch.nn.Linear) for module in block.ffn.modules())
    after = [held_bytes(held) for held in (model.layers[0].ffn, model.layers[1].ffn.experts)]
    assert all(new < share * old for old, new in zip(before, after, strict=True))
    assert isinstance(model.layers[1].ffn.shared_experts.up_proj, QuantizedLinear)


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ValueError, match="int4: experts with biases"):
        quantize(zoo.build(find_spec("gpt-oss-tiny").model), "int4")
    with torch.device("meta"), pytest.raises(ValueError, match="int8 on meta"):
        quantize(Decoder(find_spec("mixtral-tiny").model), "int8")
    with pytest.raises(ValueError, match="quantize = 'int3': give one of int8, int8-dynamic, int4"):
        quantize(zoo.build(find_spec("mixtral-tiny").model), "int3")


@pytest.mark.parametrize("options", [["--quantize", "int4"], ["--quantize", "int8-dynamic", "--dtype", "auto"]])
def test_the_command_generates(options: list[str], repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(repository / "checkpoints" / "facts-mixtral")
    call = ["generate", source, "--prompt", "The", "--max-new-tokens", "4", "--device", "cpu", "--json"]
    assert main(call + options) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 4


def test_dtype_auto_is_what_the_device_multiplies_natively() -> None:
    assert floating_dtype("auto", CPU) == (torch.bfloat16 if native_bf16(CPU) else torch.float32)
    assert floating_dtype("auto", torch.device("meta")) == torch.float32 == floating_dtype("float32", CPU)
    for wrong in ("int8", "nonsense"):
        with pytest.raises(ValueError, match=f"dtype = '{wrong}': give a floating torch dtype"):
            floating_dtype(wrong, CPU)


def dense(held: QuantizedWeight) -> Tensor:
    """[E, o, i] fp32, what ``held`` stands for: by its definition, or for the packing of 4 bits by torch's product."""
    if isinstance(held, Int8):
        return (held.values * held.scale.float().unsqueeze(-1))[:, :, : held.values.shape[2] - held.missing]
    assert isinstance(held, Int4)
    columns = held.packed.shape[2] * 2
    by_product = torch.stack([held.few(torch.eye(columns), index).T for index in range(len(held.packed))])
    return by_product[:, : held.rows, : columns - held.missing]


def at_once(model: Decoder, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids[:, :-1]).logits


def one_by_one(model: Decoder, ids: Tensor) -> Tensor:
    cache = model.new_cache(*ids.shape)
    with torch.inference_mode():
        return torch.cat([model(column, cache=cache).logits for column in ids[:, :-1].split(1, dim=1)], dim=1)


def nll(logits: Tensor, ids: Tensor) -> float:
    return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
