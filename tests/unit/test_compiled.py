"""The compiled decode step makes the tokens of the eager one, and one graph serves every token, length and capacity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from zoo.compiled import CompiledStep
from zoo.config import ModelSpec
from zoo.generation import decode_step, generate, left_padded
from zoo.model import Decoder, build
from zoo.registry import find_spec

TRACED = {"fullgraph": True, "isolate_recompiles": True, "backend": "eager"}
"""Traced, but not made into C++, which takes longer than all else."""


def small(name: str, **changes: object) -> Decoder:
    """The tiny model ``name`` with two layers and 64 tokens."""
    spec: ModelSpec = find_spec(name)
    return build(replace(spec.model, num_layers=2, vocab_size=64, **changes)).eval()


def randomize(model: Decoder) -> None:
    """Biases and sinks as well."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)


def prompt(length: int) -> list[list[int]]:
    return [torch.randint(64, (length,)).tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral-tiny", "deepseek-v3-tiny"])
def test_tokens_are_the_eager_ones_and_nothing_is_compiled_again(name: str) -> None:
    """Grouped-query and latent attention, dense and expert layers, shared experts."""
    model = small(name)
    step = CompiledStep(model)
    compiled = counters["stats"]["unique_graphs"]
    for length, new in ((1, 2), (5, 30), (300, 12)):
        ids = prompt(length)
        expected = generate(model, ids, max_new_tokens=new)
        assert generate(model, ids, max_new_tokens=new, step=step) == expected
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral-tiny", "deepseek-v3-tiny"])
def test_several_prompts_have_one_graph_for_any_number_of_them(name: str) -> None:
    """Of equal length and not, also when they end one after the other, until a single one is left."""
    model = small(name)
    step = CompiledStep(model, several=True)
    compiled = counters["stats"]["unique_graphs"]
    for lengths in ((5, 5), (3, 8, 1, 8), (1, 300, 40, 2, 40, 40, 7)):
        prompts = [ids for length in lengths for ids in prompt(length)]

        def ended(row: int, tokens: list[int]) -> bool:
            return len(tokens) > 3 * row

        expected = generate(model, prompts, max_new_tokens=20, stop=ended)
        assert generate(model, prompts, max_new_tokens=20, stop=ended, step=step) == expected
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("name", ["gemma2-tiny", "llama4-tiny", "gpt-oss-tiny"])
def test_windows_chunks_caps_sinks_and_biases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What hides keys, and experts with biases."""
    monkeypatch.setattr("zoo.compiled.OPTIONS", TRACED)
    model = small(name)
    randomize(model)
    step, tokens = CompiledStep(model), torch.randint(64, (1, 270))
    caches = [model.new_cache(1, 280) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            model(tokens[:, :248], cache=cache)
        for token in tokens[:, 248:].split(1, dim=1):
            torch.testing.assert_close(step(model, token, caches[0]), decode_step(model, token, caches[1]))


@pytest.mark.parametrize("name", ["gemma2-tiny", "llama4-tiny", "gpt-oss-tiny"])
@pytest.mark.parametrize("shared", [0, 100])
def test_windows_and_chunks_of_padded_prompts(name: str, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding at the left, or between what all begin with and what each goes on with, is in no window."""
    monkeypatch.setattr("zoo.compiled.OPTIONS", TRACED)
    model = small(name)
    randomize(model)
    step = CompiledStep(model, several=True)
    prompts = torch.randint(64, (3, shared + 160)).tolist()
    prompts = [
        prompts[0][:shared] + ids[shared : shared + length] for ids, length in zip(prompts, (2, 90, 160), strict=True)
    ]
    ids, mask = left_padded([ids[shared:] for ids in prompts], torch.device("cpu"))
    caches = [model.new_cache(3, shared + 170) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            if shared:
                model(torch.tensor(prompts[0][:shared]).expand(3, -1), cache=cache)
            model(ids, attention_mask=mask, cache=cache)
        for token in torch.randint(64, (3, 9)).split(1, dim=1):
            torch.testing.assert_close(step(model, token, caches[0]), decode_step(model, token, caches[1]))


def test_many_rows_of_large_experts_are_left_to_the_eager_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.compiled.OPTIONS", TRACED)
    monkeypatch.setattr("zoo.compiled.LARGE", {"mkl": 1000, "onednn": 1000})
    model = small("mixtral-tiny")
    step, moe = CompiledStep(model, several=True), model.config.moe
    assert moe is not None
    most = moe.num_experts // moe.top_k
    with torch.inference_mode():
        for rows in (most, most + 1):
            caches, tokens = [model.new_cache(rows, 4) for _ in range(2)], torch.randint(64, (rows, 1))
            found, expected = step(model, tokens, caches[0]), decode_step(model, tokens, caches[1])
            torch.testing.assert_close(found, expected)
            assert torch.equal(found, expected) or rows <= most, "the compiled one rounds otherwise"


def test_what_does_not_compile_is_refused() -> None:
    with pytest.raises(ValueError, match="recurrent"):
        CompiledStep(build(find_spec("jamba-tiny").model))
    with pytest.raises(ValueError, match="ReLUExperts"):
        CompiledStep(build(find_spec("glam-tiny").model))


def test_only_its_own_model_and_a_single_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.compiled.OPTIONS", TRACED)
    model, other = small("mixtral-tiny"), small("mixtral-tiny")
    step = CompiledStep(model)
    with pytest.raises(ValueError, match="another model"):
        generate(other, prompt(3), max_new_tokens=2, step=step)
    with pytest.raises(ValueError, match="several=True"):
        generate(model, [*prompt(3), *prompt(4)], max_new_tokens=2, step=step)
