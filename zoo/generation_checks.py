"""What a model can continue: checks of a request before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.model import Decoder


def check_causal(model: Decoder) -> None:
    """Raise ``ValueError`` where tokens depend on later ones, so that nothing is predicted."""
    moe = model.config.moe
    if moe is not None and moe.routing is not None and not moe.routing.causal:
        raise ValueError(
            f"moe.routing.choice = {moe.routing.choice}: what an expert chooses depends on later tokens, so that this "
            "model neither generates nor scores; use one in which tokens choose"
        )


def check_request(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ``ValueError`` where ``model`` cannot continue ``prompts`` by so many tokens."""
    check_causal(model)
    if not prompts:
        raise ValueError("input_ids holds no prompt: give at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: give a positive number")
    for number, prompt in enumerate(prompts):
        check_prompt(model, prompt, max_new_tokens, f"prompt {number}")


def check_prompt(model: Decoder, prompt: Sequence[int], max_new_tokens: int, name: str) -> None:
    """Raise ``ValueError`` where ``model`` cannot continue ``prompt`` by so many tokens; it is called ``name``."""
    positions, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    if not prompt:
        raise ValueError(f"{name} is empty: give at least one token, such as the one that begins a text")
    if len(prompt) + max_new_tokens > positions:
        raise ValueError(
            f"{name} of {len(prompt)} tokens and max_new_tokens = {max_new_tokens} exceed the model's {positions} "
            f"positions: shorten the prompt or ask for at most {max(0, positions - len(prompt))} tokens"
        )
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} holds token id {low if low < 0 else high}: the model's ids are 0 to {vocab_size - 1}; use the "
            "model's own tokenizer"
        )
