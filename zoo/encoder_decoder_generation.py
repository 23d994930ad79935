"""Greedy generation of targets: every source is encoded once, and its keys and values are kept.

Shapes: B sources, S tokens of the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.encoder_decoder import EncoderDecoder


@torch.inference_mode()
def generate_targets(
    model: EncoderDecoder,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    eos_id: int | None = None,
) -> list[list[int]]:
    """The most probable token after each other; a list of ids for every source, without start and end.

    Args:
        input_ids: [B, S] int64, the sources.
        max_new_tokens: most tokens of a target.
        attention_mask: [B, S], 0 where ``input_ids`` holds padding, on either side.
        eos_id: token that ends a target.

    Raises:
        ValueError: no source, one without tokens, or a token id outside the vocabulary.
    """
    _check(model, input_ids, max_new_tokens, attention_mask)
    count = len(input_ids)
    memory = model.memory(model.encode(input_ids, attention_mask))
    cache = model.new_cache(count, max_new_tokens)
    rows = list(range(count))  # the source that each row of the batch is of
    targets: list[list[int]] = [[] for _ in rows]
    tokens = input_ids.new_full((count,), model.config.decoder_start_id)
    for _ in range(max_new_tokens):
        tokens = model.decode(tokens[:, None], memory, cache).logits[:, -1].argmax(-1)
        going = []
        for slot, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if token != eos_id:
                targets[row].append(token)
                going.append(slot)
        if not going:
            break
        if len(going) < len(rows):
            keep = torch.tensor(going, device=tokens.device)
            memory.keep_rows(keep)
            cache.keep_rows(keep)
            tokens, rows = tokens[keep], [rows[slot] for slot in going]
    return targets


def _check(model: EncoderDecoder, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: give a positive number")
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: give [sources, tokens], at least one of each")
    if (
        attention_mask is not None
        and attention_mask.shape == input_ids.shape
        and not (attention_mask != 0).any(1).all()
    ):
        row = int((attention_mask != 0).any(1).int().argmin())
        raise ValueError(f"source {row} is all padding: give at least one token, such as the one that ends a text")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(
            f"input_ids holds token id {low if low < 0 else high}: the model's ids are 0 to "
            f"{model.config.vocab_size - 1}; use the model's own tokenizer"
        )
