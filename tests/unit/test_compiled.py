"""The compiled decode step makes the tokens of the eager one, and one graph serves every token, length and capacity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from zoo.compiled import CompiledStep
from zoo.config import ModelSpec
from zoo.generation import decode_step, generate
from zoo.model import Decoder, build
from zoo.registry import find_spec


def small(name: str, **changes: object) -> Decoder:
    """The tiny model ``name`` with two layers and 64 tokens."""
    spec: ModelSpec = find_spec(name)
    return build(replace(spec.model, num_layers=2, vocab_size=64, **changes)).eval()


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


@pytest.mark.parametrize("name", ["gemma2-tiny", "llama4-tiny", "gpt-oss-tiny"])
def test_windows_chunks_caps_sinks_and_biases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What hides keys, and experts with biases: traced, but not made into C++, which takes longer than all else."""
    monkeypatch.setattr("zoo.compiled.OPTIONS", {"fullgraph": True, "backend": "eager"})
    model = small(name)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # biases and sinks as well
    step, tokens = CompiledStep(model), torch.randint(64, (1, 270))
    caches = [model.new_cache(1, 280) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            model(tokens[:, :248], cache=cache)
        for token in tokens[:, 248:].split(1, dim=1):
            torch.testing.assert_close(step(model, token, caches[0]), decode_step(model, token, caches[1]))


def test_what_does_not_compile_is_refused() -> None:
    with pytest.raises(ValueError, match="recurrent"):
        CompiledStep(build(find_spec("jamba-tiny").model))
    with pytest.raises(ValueError, match="ReLUExperts"):
        CompiledStep(build(find_spec("glam-tiny").model))


def test_only_its_own_model_and_a_single_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.compiled.OPTIONS", {"fullgraph": True, "backend": "eager"})
    model, other = small("mixtral-tiny"), small("mixtral-tiny")
    step = CompiledStep(model)
    with pytest.raises(ValueError, match="another model"):
        generate(other, prompt(3), max_new_tokens=2, step=step)
    with pytest.raises(ValueError, match="one prompt at a time"):
        generate(model, [*prompt(3), *prompt(4)], max_new_tokens=2, step=step)
