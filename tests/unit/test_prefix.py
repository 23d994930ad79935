"""Beginnings that prompts share are computed once, and no token changes by it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import zoo
from zoo.config import ModelConfig
from zoo.model import Decoder
from zoo.prefix import compute_prefix, shared_prefix
from zoo.registry import find_spec, model_names

VOCABULARY, SHARED, NEW = 64, 240, 4
SPAN = 24
"""Tokens of a window or a chunk, fewer than are shared."""


def small(config: ModelConfig) -> ModelConfig:
    config = replace(config, vocab_size=VOCABULARY, max_position_embeddings=512, mtp_depth=0)
    attention = config.attention
    if attention and attention.sliding_window:
        config = replace(config, attention=replace(attention, sliding_window=SPAN))
    if attention and attention.interleaved_rope:
        interleaved = replace(attention.interleaved_rope, chunk_size=SPAN)
        config = replace(config, attention=replace(attention, interleaved_rope=interleaved))
    return config


def spread(config: ModelConfig) -> Decoder:
    """Weights large enough for continuations that wander, in a precision in which nothing is a tie."""
    model = zoo.build(small(config), seed=1, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    return model


def words(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=count)


BEGINNING = words(0, SHARED)
CALLS = {
    "unequal": [BEGINNING + words(n, n) for n in (1, 9, 30, 4)],
    "one is the beginning of another": [BEGINNING + words(1, count) for count in (0, 12, 5, 1)],
    "equal": [BEGINNING] * 3,
}
"""Prompts of a call, by what they are to each other."""


@contextmanager
def tokens_computed(model: Decoder) -> Iterator[Callable[[], int]]:
    """Counts the tokens that enter the model, padding among them."""
    counts: list[int] = []

    def count(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        counts.append(arguments[0].numel())

    handle = model.embed_tokens.register_forward_pre_hook(count)
    yield lambda: sum(counts)
    handle.remove()


def alone(model: Decoder, prompts: list[list[int]]) -> list[list[int]]:
    return [zoo.generate(model, [prompt], max_new_tokens=NEW)[0] for prompt in prompts]


@pytest.mark.parametrize("name", [name for name in model_names() if name.endswith("-tiny")])
def test_prompts_that_share_a_beginning_continue_as_each_alone(name: str) -> None:
    model = spread(find_spec(name).model)
    for kind, prompts in CALLS.items():
        expected = alone(model, prompts)
        assert len({tuple(new) for new in expected}) > (kind == "unequal")
        with tokens_computed(model) as count:
            assert zoo.generate(model, prompts, max_new_tokens=NEW) == expected
        shared = min(SHARED, min(map(len, prompts)) - 1)
        rest = max(map(len, prompts)) - shared
        assert count() == shared + len(prompts) * (rest + NEW - 1)


@pytest.mark.parametrize("name", ["mistral-tiny", "deepseek-v3-tiny", "jamba-tiny", "llama4-tiny"])
def test_a_prefix_is_continued_many_times_and_stays_as_it_is(name: str) -> None:
    model = spread(find_spec(name).model)
    prefix = compute_prefix(model, BEGINNING)
    for prompts in ([BEGINNING + words(3, 2)], CALLS["unequal"][1:3]):
        with tokens_computed(model) as count:
            continued = zoo.generate(model, prompts, max_new_tokens=NEW, prefix=prefix)
        assert continued == alone(model, prompts)
        assert count() == len(prompts) * (max(map(len, prompts)) - SHARED + NEW - 1)
    # What prompts share beyond the prefix is computed once as well, and a longer prefix from a shorter one.
    further = BEGINNING + words(5, 240)
    prompts = [further + words(n, n) for n in (2, 3, 4, 5)]
    with tokens_computed(model) as count:
        continued = zoo.generate(model, prompts, max_new_tokens=NEW, prefix=prefix)
    assert continued == alone(model, prompts)
    assert count() == 240 + len(prompts) * (5 + NEW - 1)
    assert prefix.cache.length == SHARED
    longer = compute_prefix(model, further, prefix)
    assert zoo.generate(model, prompts, max_new_tokens=NEW, prefix=longer) == continued


def test_draws_and_stops_are_those_without_a_prefix() -> None:
    model = spread(find_spec("mixtral-tiny").model)
    prompts = [words(7, 8) + BEGINNING[:n] for n in (3, 5)]
    drawn = zoo.generate(model, prompts, max_new_tokens=30, temperature=1.0, seed=3, eos_id=5)
    prefix = compute_prefix(model, prompts[0][:8])
    assert zoo.generate(model, prompts, max_new_tokens=30, temperature=1.0, seed=3, eos_id=5, prefix=prefix) == drawn


def test_a_short_beginning_is_not_shared() -> None:
    model = spread(find_spec("llama-tiny").model)
    prompts = [BEGINNING[:30] + words(n, 8) for n in (1, 2)]
    with tokens_computed(model) as count:
        zoo.generate(model, prompts, max_new_tokens=1)
    assert count() == 2 * 38
    assert shared_prefix(model, prompts) is None
    assert shared_prefix(model, [BEGINNING]) is None


@pytest.mark.parametrize("name", ["sinkhorn-tiny", "hash-tiny"])
def test_routing_without_limits_outside_of_training_shares(name: str) -> None:
    model = spread(find_spec(name).model)
    assert shared_prefix(model, CALLS["equal"]) is not None
    assert zoo.generate(model, CALLS["unequal"], max_new_tokens=NEW) == alone(model, CALLS["unequal"])


def test_prompts_whose_tokens_compete_are_computed_whole() -> None:
    model = spread(find_spec("gshard-decoder-tiny").model)
    with tokens_computed(model) as count:
        zoo.generate(model, CALLS["equal"], max_new_tokens=1)
    assert count() == 3 * SHARED
    with pytest.raises(ValueError, match="compete for places"):
        compute_prefix(model, BEGINNING)
    model = spread(find_spec("sinkhorn-tiny").model).train()
    assert shared_prefix(model, CALLS["equal"]) is None


def test_prefixes_that_do_not_fit_are_named() -> None:
    model = spread(find_spec("llama-tiny").model)
    prefix = compute_prefix(model, BEGINNING)
    other = [*BEGINNING[:7], (BEGINNING[7] + 1) % VOCABULARY, *BEGINNING]
    for prompt, message in (
        (other, "prompt 1 leaves the prefix of 240 tokens after 7: give whole prompts"),
        (BEGINNING[:9], "prompt 1 leaves the prefix of 240 tokens after 9"),
        (BEGINNING, "prompt 1 is the prefix itself"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.generate(model, [[*BEGINNING, 1], prompt], max_new_tokens=2, prefix=prefix)
    with pytest.raises(ValueError, match="computed by another model"):
        zoo.generate(spread(find_spec("llama-tiny").model), [[*BEGINNING, 1]], max_new_tokens=2, prefix=prefix)
    with pytest.raises(ValueError, match="the prefix is empty"):
        compute_prefix(model, [])
    with pytest.raises(ValueError, match="the prefix of 513 tokens"):
        compute_prefix(model, [1] * 513)
