"""Speculative greedy decoding with a model's own MTP modules (DeepSeek-V3, arXiv 2412.19437, section 5.4.3).

Each step, the modules draft the tokens after the next, and the decoder checks them all in one forward pass (the greedy
case of arXiv 2211.17192): the text is that of plain greedy decoding, in fewer passes. Where two tokens are equally
probable but for rounding, a pass over several positions may round otherwise than one over a single position.

Shapes: S new positions, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from zoo.cache import Cache
from zoo.generation_checks import check_request
from zoo.layers.sequence import sequence_layout
from zoo.model import Decoder, MTPModule


@dataclass
class Acceptance:
    """What became of the drafts so far."""

    passes: int = 0
    """Forward passes of the decoder, that over the prompt left out."""
    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """Share of the drafted tokens that were accepted; 0 without any."""
        return self.accepted / max(self.drafted, 1)


@torch.inference_mode()
def speculate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None = None,
    acceptance: Acceptance | None = None,
) -> Iterator[int]:
    """Yield the new tokens of greedy decoding, as ``zoo.generation.stream`` does for one prompt.

    Args:
        model: with MTP modules; module k drafts the k-th token after the next.
        prompt: token ids.
        max_new_tokens: most new tokens.
        eos_id: token or tokens that end the continuation; they are not yielded.
        acceptance: counts are added to it.

    Raises:
        ValueError: a model without MTP modules or with recurrent layers, which cannot take back rejected tokens; else
            as ``zoo.generation.generate``.
    """
    check_speculative(model)
    check_request(model, [list(prompt)], max_new_tokens)
    counts = Acceptance() if acceptance is None else acceptance
    end_ids = frozenset([eos_id] if isinstance(eos_id, int) else eos_id or ())
    device = next(model.parameters()).device
    tokens, wanted = list(prompt), len(prompt) + max_new_tokens
    cache, drafter = model.new_cache(1, wanted), _Drafter(model, wanted)
    out = model(torch.tensor([tokens], device=device), cache=cache, logits_to_keep=1)
    found, hidden = _greedy(out.logits), out.hidden
    while True:
        for token in found:
            if token in end_ids:
                return
            tokens.append(token)
            yield token
        if len(tokens) == wanted:
            return
        drafts = drafter.draft(tokens, hidden, at_most=wanted - len(tokens) - 1)
        out = model(torch.tensor([[tokens[-1], *drafts]], device=device), cache=cache)
        found = _greedy(out.logits)
        accepted = next((i for i, draft in enumerate(drafts) if draft != found[i]), len(drafts))
        # Position i is right as long as what it was given is: one more token comes of it than were accepted.
        found, hidden = found[: accepted + 1], out.hidden[:, : accepted + 1]
        cache.crop(len(tokens) + accepted)
        counts.passes += 1
        counts.drafted += len(drafts)
        counts.accepted += accepted


def check_speculative(model: Decoder) -> None:
    """Raise ``ValueError`` where ``model`` cannot draft for itself."""
    if not model.config.mtp_depth:
        raise ValueError("speculative decoding: the model has no MTP modules (mtp_depth = 0); decode without it")
    if model.config.mamba is not None:
        raise ValueError("speculative decoding: recurrent layers cannot take back rejected tokens; decode without it")
    routing = model.config.moe.routing if model.config.moe else None
    if routing is not None and routing.eval_capacity_factor is not None:
        raise ValueError(
            "speculative decoding: with moe.routing.eval_capacity_factor drafts compete for places in the experts; "
            "decode without it"
        )


def _greedy(logits: Tensor) -> list[int]:
    """logits [1, S, V] → the most probable token at each position, the first of equals as in ``zoo.generation``."""
    tokens: list[int] = logits[0].max(-1).indices.tolist()
    return tokens


class _Drafter:
    """The MTP modules, each with a cache of the positions whose token k later is known for good.

    With tokens t₀ … tₙ of which the decoder has seen all but the last, module k runs up to position n - 1 like the
    others, on drafts in place of tₙ₊₁ … tₙ₊ₖ₋₁. Its last k - 1 positions are therefore run again in the next step.
    """

    def __init__(self, model: Decoder, max_length: int) -> None:
        self._model = model
        self._modules = [cast(MTPModule, module) for module in model.mtp]
        self._caches = [Cache([m.mixer.new_cache(1, max_length)], 1, max_length) for m in self._modules]
        self._last: list[Tensor] = []
        """hᵏ [1, 1, D] of module k = 1, 2, … at its last position that is known for good."""

    def draft(self, tokens: Sequence[int], hidden: Tensor, at_most: int) -> list[int]:
        """The tokens that probably follow ``tokens``, at most one a module.

        Args:
            tokens: all so far; each call gives those of the one before and more.
            hidden: [1, S, D], h⁰ of the positions that the decoder has seen since the last call.
            at_most: how many are of use.
        """
        n = len(tokens) - 1
        drafts: list[int] = []
        last: list[Tensor] = []
        for k, (module, cache) in enumerate(zip(self._modules[:at_most], self._caches, strict=False), start=1):
            missing = n - cache.length - hidden.shape[1]
            if missing:
                hidden = torch.cat((self._last[k - 2][:, -missing:], hidden), dim=1)
            hidden = self._run(module, cache, [*tokens, *drafts][cache.length + k :], hidden)
            drafts += _greedy(self._model.logits(hidden[:, -1:]))
            known = max(n - k + 1, 0)
            last.append(hidden[:, : hidden.shape[1] - (n - known)][:, -1:])
            cache.crop(known)
        self._last = last
        return drafts

    def _run(self, module: MTPModule, cache: Cache, tokens: Sequence[int], hidden: Tensor) -> Tensor:
        """hᵏ⁻¹ [1, S, D] and the S tokens k later → hᵏ [1, S, D]."""
        ids = torch.tensor([tokens], device=hidden.device)
        layout = sequence_layout(ids, attention_mask=None, document_ids=None, past=cache.length, past_valid=None)
        embeddings = self._model.embed_tokens(ids)
        rotary = self._model.rotary(layout.positions, layout.keys, embeddings.dtype)
        hidden, _ = module(torch.cat((embeddings, hidden), dim=-1), layout, rotary, cache.layers[0])
        cache.advance(len(tokens), None)
        return hidden
