"""Generation with a preallocated cache: greedy and sampled, prompts of unequal length, finished rows dropped.

Shapes: B prompts, S tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.generation_checks import check_request
from zoo.prefix import Prefix, shared_prefix

if TYPE_CHECKING:
    from zoo.cache import Cache
    from zoo.model import Decoder
    from zoo.tokenizer import Tokenizer

Prompts = Tensor | Sequence[Sequence[int]]
Stop = Callable[[int, list[int]], bool]
"""Called with a prompt's number and its new tokens after each of them; ``True`` ends that prompt's continuation."""


def decode_step(model: Decoder, tokens: Tensor, cache: Cache) -> Tensor:
    """tokens [B, 1], one more of every prompt → logits [B, V] of the next; ``cache`` then holds them."""
    return model(tokens, cache=cache).logits[:, -1]


Step = Callable[["Decoder", Tensor, "Cache"], Tensor]
"""Arguments and result as ``decode_step``."""


def generate(
    model: Decoder,
    input_ids: Prompts,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    prefix: Prefix | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    stop: Stop | None = None,
    seed: int | None = None,
    step: Step = decode_step,
) -> list[list[int]]:
    """Continue every prompt; the result is one list of new token ids per prompt, without the ``eos_id`` that ended it.

    Args:
        input_ids: prompts, [B, S] int64 or B lists of unequal length.
        max_new_tokens: most new tokens of a prompt.
        attention_mask: [B, S], 0 where ``input_ids`` holds padding (left or right); only with a tensor.
        prefix: what all prompts begin with, from ``zoo.prefix.compute_prefix``, so that it need not be computed; the
            prompts are whole with or without. What else they all begin with is computed once where that pays.
        temperature: 0 takes the most probable token; above 0, logits are divided by it and a token is drawn.
        top_k: draw from the ``top_k`` most probable tokens only.
        top_p: draw from the smallest set of most probable tokens whose probabilities sum to at least ``top_p``
            (nucleus sampling, arXiv 1904.09751), after ``top_k``.
        eos_id: token or tokens that end a continuation.
        stop: ends a continuation by its tokens so far.
        seed: of the drawing; ``None`` draws from torch's global generator.
        step: computes what follows each new token, such as a ``zoo.compiled.CompiledStep``.

    Raises:
        ValueError: an empty prompt, a token id outside the vocabulary, prompt and new tokens together beyond the
            model's positions, a prompt that does not go on from ``prefix``, or a sampling setting outside its range.
    """
    new_tokens: list[list[int]] = [[] for _ in input_ids]
    for row, token in stream(
        model,
        input_ids,
        max_new_tokens=max_new_tokens,
        attention_mask=attention_mask,
        prefix=prefix,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_id=eos_id,
        stop=stop,
        seed=seed,
        step=step,
    ):
        new_tokens[row].append(token)
    return new_tokens


@torch.inference_mode()
def stream(
    model: Decoder,
    input_ids: Prompts,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    prefix: Prefix | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    stop: Stop | None = None,
    seed: int | None = None,
    step: Step = decode_step,
) -> Iterator[tuple[int, int]]:
    """Yield ``(prompt number, new token id)`` as tokens are made; arguments and errors as in ``generate``."""
    device = next(model.parameters()).device
    prompts = _rows(input_ids, attention_mask)
    check_request(model, prompts, max_new_tokens)
    choose = _chooser(temperature, top_k, top_p, seed, device)
    end_ids = frozenset([eos_id] if isinstance(eos_id, int) else eos_id or ())

    if prefix is not None:
        prefix.check(model, prompts)
    prefix = shared_prefix(model, prompts, prefix)
    past = 0 if prefix is None else len(prefix.tokens)
    ids, mask = left_padded([prompt[past:] for prompt in prompts], device)
    size = past + ids.shape[1] + max_new_tokens
    if prefix is None:
        cache = model.new_cache(len(prompts), size)
    else:
        cache = prefix.cache.branch(torch.zeros(len(prompts), dtype=torch.int64, device=device), size)
    rows = list(range(len(prompts)))  # the prompt that each row of the batch continues
    new_tokens: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    logits = model(ids, attention_mask=mask, cache=cache, last=1).logits[:, -1]
    for count in range(1, max_new_tokens + 1):
        tokens = choose(logits)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if done[row]:
                continue
            if token in end_ids:
                done[row] = True
                continue
            new_tokens[row].append(token)
            yield row, token
            done[row] = stop is not None and stop(row, new_tokens[row])
        active = [slot for slot, row in enumerate(rows) if not done[row]]
        if not active or count == max_new_tokens:
            return
        if 2 * len(active) <= len(rows):  # each time at most half are left, so that copying stays cheap
            keep = torch.tensor(active, device=device)
            cache.keep_rows(keep)
            tokens, rows = tokens[keep], [rows[slot] for slot in active]
        logits = step(model, tokens[:, None], cache)


def next_token_probabilities(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution [B, V] (fp32) that sampling draws from, given ``logits`` [B, V]: see ``generate``."""
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_k is None and top_p is None:
        return probabilities
    vocab_size = logits.shape[-1]
    kept, tokens = probabilities.topk(vocab_size if top_k is None else min(top_k, vocab_size), dim=-1)
    kept = kept / kept.sum(-1, keepdim=True)
    if top_p is not None:
        # A token stays while the more probable ones before it sum to less than top_p: the first one always does.
        kept = kept.masked_fill(kept.cumsum(-1) - kept >= top_p, 0.0)
        kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, tokens, kept)


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """``prompts`` as [B, S] int64, padded on the left with token 0, and their mask (``None`` where none is padded)."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts], device=device)
    if all(len(p) == length for p in prompts):
        return ids, None
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(length, device=device) >= length - lengths[:, None]


class TextStream:
    """Turns tokens into text one by one: the pieces joined are the decoded continuation.

    A token alone may decode to part of a character, or lose its leading space. Each piece is therefore the difference
    of two decodings that share a few earlier tokens, and is held back while it ends inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        self._start = max(0, len(prompt) - 8)  # tokens before it no longer matter
        self._shown = len(prompt)

    def push(self, token: int) -> str:
        """Text that ``token`` completes; empty while a character is incomplete, and for ids of a padded embedding."""
        if token >= self._tokenizer.vocab_size:
            return ""
        self._tokens.append(token)
        return "" if self._decode(len(self._tokens)).endswith("\N{REPLACEMENT CHARACTER}") else self.flush()

    def flush(self) -> str:
        """Text held back so far."""
        shown = self._decode(self._shown)
        text = self._decode(len(self._tokens))
        self._start, self._shown = self._shown, len(self._tokens)
        return text[len(shown) :]

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._tokens[self._start : end])


def _rows(input_ids: Prompts, attention_mask: Tensor | None) -> list[list[int]]:
    """The prompts as lists without padding."""
    if not isinstance(input_ids, Tensor):
        if attention_mask is not None:
            raise ValueError("attention_mask is given with lists of tokens: they need no padding; leave it out")
        return [list(prompt) for prompt in input_ids]
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: give [prompts, tokens]")
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give that of input_ids, {tuple(input_ids.shape)}"
        )
    return [row[mask != 0].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]


def _chooser(
    temperature: float, top_k: int | None, top_p: float | None, seed: int | None, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The function from logits [B, V] to next tokens [B]."""
    if temperature < 0:
        raise ValueError(f"temperature = {temperature}: give 0 for greedy decoding or a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: give a positive number of tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: give a probability above 0 and up to 1")
    if temperature == 0:
        for name, value in (("top_k", top_k), ("top_p", top_p)):
            if value is not None:
                raise ValueError(f"{name} = {value} with temperature = 0, which is greedy decoding: raise temperature")
        # Not argmax, which takes 20 times as long on a CPU; of equal ones both take the first.
        return lambda logits: logits.max(-1).indices
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    return draw
