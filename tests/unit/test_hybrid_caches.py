"""Models whose layers see differently far: every step with a cache against recomputing all of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from zoo.config import ModelConfig
from zoo.model import build
from zoo.registry import find_spec

PROMPT, TOTAL, SPAN = 9, 20, 5
"""Tokens before the first step, tokens in the end, and tokens that a window or a chunk of these models holds."""

CHANGES: dict[str, dict[str, Any]] = {
    "gemma2-tiny": {"sliding_window": SPAN},
    "gpt-oss-tiny": {"sliding_window": SPAN},
    "llama4-tiny": {"chunk_size": SPAN, "temperature_floor": 7},
}
"""Model → what is set in its attention: windows in every other layer, also with sinks, and chunks in three of four."""


def small(name: str) -> ModelConfig:
    config = find_spec(name).model
    attention, change = config.attention, CHANGES[name]
    assert attention is not None
    if "chunk_size" in change:
        assert attention.interleaved_rope is not None
        change = {"interleaved_rope": replace(attention.interleaved_rope, **change)}
    return replace(config, vocab_size=64, initializer_range=0.2, attention=replace(attention, **change))


@torch.no_grad()
@pytest.mark.parametrize("padded", [0, 3, 7])
@pytest.mark.parametrize("name", CHANGES)
def test_every_cached_step_is_the_full_recomputation(name: str, padded: int) -> None:
    model = build(small(name), seed=1, dtype=torch.float64).eval()
    ids = torch.randint(64, (2, TOTAL), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, PROMPT, dtype=torch.bool)
    mask[1, :padded] = False
    cache = model.new_cache(2, TOTAL)
    logits = model(ids[:, :PROMPT], attention_mask=mask, cache=cache).logits[:, -1]
    for length in range(PROMPT, TOTAL):
        alone = [model(ids[row : row + 1, start:length]).logits[0, -1] for row, start in ((0, 0), (1, padded))]
        torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-9, atol=1e-9)
        logits = model(ids[:, length : length + 1], cache=cache).logits[:, 0]
