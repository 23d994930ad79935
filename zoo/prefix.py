"""Beginnings that several inputs share: computed once, then continued as often as wanted.

Shapes: B rows, P tokens of a beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.cache import Cache
from zoo.generation_checks import check_prompt

if TYPE_CHECKING:
    from zoo.model import Decoder

SHARING_PAYS = 0.8
"""Share a beginning where at most this part of the tokens remains,"""
SHARING_COSTS = 32
"""after adding so many: copies of the cache and attention to it take as long as some tokens."""
FORWARD_COSTS = 256
"""Tokens, however few a forward has (times of tiny models on a CPU: 160 to 250 dense, 300 to 450 with 8 experts)."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """A beginning of prompts with what ``model`` remembers of it, valid as long as the weights stay as they are."""

    model: Decoder
    tokens: tuple[int, ...]
    cache: Cache
    """Of one row and these tokens; it is copied, never written to."""

    def check(self, model: Decoder, prompts: Sequence[Sequence[int]]) -> None:
        """Raise ``ValueError`` unless it is of ``model`` and all ``prompts`` go on from it by a token or more."""
        if model is not self.model:
            raise ValueError("prefix: it was computed by another model; compute it with this one")
        for number, prompt in enumerate(prompts):
            same = common_length(prompt, self.tokens)
            if same < len(self.tokens):
                raise ValueError(
                    f"prompt {number} leaves the prefix of {len(self.tokens)} tokens after {same}: give whole prompts, "
                    "which begin with it, or a shorter prefix"
                )
            if same == len(prompt):
                raise ValueError(f"prompt {number} is the prefix itself: compute the prefix without its last token")


@torch.inference_mode()
def compute_prefix(model: Decoder, tokens: Sequence[int], prefix: Prefix | None = None) -> Prefix:
    """The state after ``tokens``, for ``zoo.generate(…, prefix=…)``.

    Args:
        tokens: a beginning of prompts, one token or more.
        prefix: a beginning of ``tokens`` that is computed already; it stays as it is.

    Raises:
        ValueError: no tokens, ids outside the vocabulary, more than the model's positions, ``tokens`` that do not go on
            from ``prefix``, or a model in which it matters what is computed together (see ``divisible``).
    """
    if not divisible(model):
        raise ValueError(
            "prefix: tokens of this model compete for places in the experts (moe.routing), so that a prompt computed "
            "in two parts is another; give prompts without a prefix"
        )
    check_prompt(model, tokens, 0, "the prefix")
    device = model.embed_tokens.weight.device
    if prefix is None:
        cache = prefilled(model, torch.tensor([list(tokens)], device=device))
    else:
        prefix.check(model, [tokens])
        cache = prefix.cache.branch(torch.zeros(1, dtype=torch.int64, device=device), len(tokens))
        cache = prefilled(model, torch.tensor([tokens[len(prefix.tokens) :]], device=device), cache)
    return Prefix(model, tuple(tokens), cache)


def shared_prefix(model: Decoder, prompts: Sequence[Sequence[int]], prefix: Prefix | None = None) -> Prefix | None:
    """What all ``prompts`` begin with, computed; ``prefix``, of which they are known to go on, where that pays no more.

    At least one token of each prompt is left, whose logits are wanted.
    """
    if len(prompts) < 2 or not divisible(model):
        return prefix
    shared = min(common_length(prompts[0], prompt) for prompt in prompts)
    shared = min(shared, min(map(len, prompts)) - 1)
    known = 0 if prefix is None else len(prefix.tokens)
    longest = max(map(len, prompts))
    together = (shared - known) + len(prompts) * (longest - shared)
    if not sharing_pays(together + FORWARD_COSTS, alone=len(prompts) * (longest - known)):
        return prefix
    return compute_prefix(model, prompts[0][:shared], prefix)


def prefilled(model: Decoder, ids: Tensor, cache: Cache | None = None) -> Cache:
    """A cache that holds ids [B, P] and has no room for more: ``cache``, or a new one; its branches have."""
    cache = model.new_cache(*ids.shape) if cache is None else cache
    model(ids, cache=cache, last=1, logits_to_keep=None)
    return cache


def divisible(model: Decoder) -> bool:
    """Whether a text may be computed in parts: tokens of one do not compete with each other for places in experts."""
    routing = model.config.moe.routing if model.config.moe else None
    if routing is None or routing.tokenwise:
        return True
    return not model.training and routing.causal and routing.eval_capacity_factor is None


def sharing_pays(together: int, *, alone: int) -> bool:
    """Whether computing ``together`` tokens, with copies of a cache, takes less time than ``alone`` tokens without."""
    return together + SHARING_COSTS <= SHARING_PAYS * alone


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return sum(takewhile(bool, map(eq, a, b)))
