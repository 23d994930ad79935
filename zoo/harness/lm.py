"""Our decoder as a native model of lm-eval 0.4.13, registered as ``zoo``.

Tokenisation, truncation and stop sequences follow lm-eval's own ``hf`` model (lm_eval/models/huggingface.py), so that a
checkpoint scores the same through either, sample by sample. What differs is how it is computed: logits of the scored
positions only, log-probabilities in fp32 whatever the model's dtype, and continuations that leave the batch when they
are finished.

Shapes: B batch, S sequence, D model, P scored positions, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from zoo.generation import Stop, generate
from zoo.generation_checks import check_causal
from zoo.harness.prefixes import Group, Input, batches, grouped, padded
from zoo.model import Decoder
from zoo.prefix import Prefix, prefilled, shared_prefix
from zoo.tokenizer import Tokenizer
from zoo.weights.loading import load_with_tokenizer

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The strings (or None), tokens of the context, tokens of the continuation."""

TOKENS_AT_ONCE = 4096
"""Most tokens of a forward that scores, unless one input alone has more."""
REQUESTS_AT_ONCE = 1024
"""Requests that are tokenised in one call: alone, a text costs as much as some hundred words."""
CHARACTERS = 1 << 16
"""Of text, for each further thread of a call: to start one takes 2 ms beside torch's, which spin while they wait."""
LOGITS_AT_ONCE = 2**24
"""Logits that are in memory together."""


@register_model("zoo")
class ZooLM(TemplateLM):
    """A ``Decoder`` with its ``Tokenizer`` behind lm-eval's interface.

    Args:
        pretrained: a decoder, or anything that ``zoo.load`` takes.
        tokenizer: of the decoder; that of anything else lies beside its weights.
        batch_size: of generation, requests in one forward; of scoring, requests of full length whose tokens may be
            in memory together, so that a forward holds more of the shorter ones.
        device: by default the GPU if there is one; ignored where ``pretrained`` is a decoder.
        dtype: name of a torch dtype; ignored where ``pretrained`` is a decoder.
        max_length: tokens of context and continuation; by default the model's positions.
        max_gen_toks: new tokens where a task does not say.
        add_bos_token: begin every context with BOS; by default as the tokenizer's own settings say.
    """

    def __init__(
        self,
        pretrained: str | Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pretrained, Decoder):
            if device == "cuda:0" and not torch.cuda.is_available():
                device = None  # lm-eval's command line asks for it wherever it runs, and so means "if there is one"
            pretrained, tokenizer = load_with_tokenizer(pretrained, dtype=dtype, device=device)
        if tokenizer is None:
            raise ValueError("no tokenizer is given: a decoder comes without, so give the one that it was trained with")
        check_causal(pretrained)
        self.model: Decoder = pretrained
        self.tokenizer: Tokenizer = tokenizer
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size = {batch_size!r}: give a positive number of requests")
        self.batch_size = int(batch_size)
        self.max_length = max_length or self.model.config.max_position_embeddings
        self.max_gen_toks = max_gen_toks
        self.add_bos = self.tokenizer.add_bos if add_bos_token is None else add_bos_token
        self._bos_text = None if self.tokenizer.bos_id is None else self.tokenizer.id_to_token(self.tokenizer.bos_id)
        self._tokens: dict[str, list[int]] = {}
        """Of texts that are about to be asked for, with BOS where contexts have it."""
        self.num_truncated = 0
        """Requests so far whose context did not fit and lost its beginning."""
        self._device = self.model.embed_tokens.weight.device

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        if self.tokenizer.eos_id is None:
            raise ValueError("the tokenizer has no end-of-text token, which lm-eval needs: name one in its eos_token")
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Token that an empty context stands for: BOS, or end of text where there is no BOS."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of ``string``, by default with BOS as configured, and once where the text spells it already."""
        if add_special_tokens is None and self._bos_text and string.startswith(self._bos_text):
            return self.tokenizer.encode(string.removeprefix(self._bos_text), bos=True)
        bos = self.add_bos and add_special_tokens is not False
        if bos == self.add_bos and string in self._tokens:
            return list(self._tokens[string])
        return self.tokenizer.encode(string, bos=bos)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether each of its tokens is the likeliest."""
        encoded: list[Request] = []
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="Tokenizing") as bar:
            for start in range(0, len(requests), REQUESTS_AT_ONCE):
                pairs = [request.args for request in requests[start : start + REQUESTS_AT_ONCE]]
                # lm-eval moves spaces at a context's end to the continuation.
                with self._known(text for pair in pairs for text in (pair[0].rstrip(), "".join(pair))):
                    encoded += [(pair, *self._encode_request(*pair)) for pair in pairs]
                bar.update(len(pairs))
        return self._loglikelihood_tokens(encoded, disable_tqdm)

    def _encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens[:1] == [self.prefix_token_id]:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    @contextmanager
    def _known(self, texts: Iterable[str]) -> Iterator[None]:
        """Have ``tok_encode`` know ``texts`` within the block."""
        distinct = list(dict.fromkeys(texts))  # a question is asked for again with each of its answers
        threads = min(torch.get_num_threads(), 1 + sum(map(len, distinct)) // CHARACTERS)
        encoded = self.tokenizer.encode_batch(distinct, bos=self.add_bos, threads=threads)
        self._tokens = dict(zip(distinct, encoded, strict=True))
        try:
            yield
        finally:
            self._tokens = {}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of ``max_length`` tokens that predict every token once."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sum of the continuation's log-probabilities and whether each of its tokens is the most probable one."""
        rows = self._rows(requests)
        slots = self.batch_size * self.max_length
        budget = min(slots, TOKENS_AT_ONCE)
        inputs = (Input(tokens, min(span.start for _, span in spans)) for tokens, spans in rows.items())
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="Scoring continuations") as bar:
            for groups in batches(grouped(inputs), budget):
                for batch, before, hidden in self._hidden(groups, budget, slots):
                    spans = [
                        (row, number, range(span.start - before, span.stop - before))
                        for row, one in enumerate(batch)
                        for number, span in rows[one.tokens]
                    ]
                    wanted = [(row, span, requests[number][2]) for row, number, span in spans]
                    for (_, number, _), score in zip(spans, self._score(hidden, wanted), strict=True):
                        results[number] = score
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
                    bar.update(len(spans))
        return results

    def _rows(self, requests: Sequence[Request]) -> dict[tuple[int, ...], list[tuple[int, range]]]:
        """The inputs to compute, each with the requests that it answers and the positions that predict their tokens.

        One input answers all whose own is its beginning: answers that differ in their last token, or in their length.
        """
        spans: defaultdict[tuple[int, ...], list[tuple[int, range]]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation or len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens: it must have 1 to max_length = {self.max_length}"
                )
            tokens = context + continuation
            self.num_truncated += len(tokens) > self.max_length + 1
            inputs = tuple(tokens[-(self.max_length + 1) : -1])
            spans[inputs].append((number, range(len(inputs) - len(continuation), len(inputs))))
        rows: dict[tuple[int, ...], list[tuple[int, range]]] = {}
        longest: tuple[int, ...] = ()
        for inputs in sorted(spans, reverse=True):  # whatever an input begins stands before it
            if longest[: len(inputs)] != inputs:
                longest = inputs
                rows[longest] = []
            rows[longest] += spans[inputs]
        return rows

    def _hidden(self, groups: Sequence[Group], budget: int, slots: int) -> Iterator[tuple[list[Input], int, Tensor]]:
        """Rows of ``groups``, the number of tokens before their hidden states, and those [B, S, D], padded.

        No row's wanted ones begin before.
        """
        past = min(group.shared for group in groups)
        owners = {one.tokens: row for row, group in enumerate(groups) for one in group.inputs}
        cache = None
        if past:
            beginnings = torch.tensor([group.inputs[0].tokens[:past] for group in groups], device=self._device)
            cache = prefilled(self.model, beginnings)
        for batch in padded((one for group in groups for one in group.inputs), budget, past, slots):
            ids = _right_padded([one.tokens[past:] for one in batch], self._device)
            first, end = min(one.first for one in batch), past + ids.shape[1]
            branch = None
            if cache is not None:
                rows = torch.tensor([owners[one.tokens] for one in batch], device=self._device)
                branch = cache.branch(rows, end)
            yield batch, first, self.model(ids, cache=branch, last=end - first, logits_to_keep=None).hidden

    def _score(self, hidden: Tensor, wanted: Sequence[tuple[int, range, list[int]]]) -> list[tuple[float, bool]]:
        """Scores of continuations, given hidden [B, S, D] and the row and the columns that predict each of them."""
        places: dict[tuple[int, int], int] = {}  # those that several continuations need are there once
        indices = [places.setdefault((row, column), len(places)) for row, span, _ in wanted for column in span]
        targets = [token for _, _, continuation in wanted for token in continuation]
        rows, columns = torch.tensor(list(places), device=self._device).unbind(1)
        log_probs, greedy = self._log_probs(
            hidden[rows, columns],
            torch.tensor(indices, device=self._device),
            torch.tensor(targets, device=self._device),
        )
        # Lists: a call of torch for each of many short continuations takes longer.
        of_tokens = zip(log_probs.tolist(), greedy.tolist(), strict=True)
        scores = []
        for _, _, continuation in wanted:
            some = list(islice(of_tokens, len(continuation)))
            scores.append((sum(p for p, _ in some), all(g for _, g in some)))
        return scores

    def _log_probs(self, hidden: Tensor, indices: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability [N] fp32 of each of ``targets`` [N] after ``hidden[indices]``, and whether it is the highest.

        hidden [P, D], indices [N] into it.
        """
        log_probs = torch.empty(len(targets), device=self._device)
        greedy = torch.zeros(len(targets), device=self._device, dtype=torch.bool)
        step = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        for start in range(0, len(hidden), step):
            scores = self.model.logits(hidden[start : start + step]).float().log_softmax(-1)
            inside = ((indices >= start) & (indices < start + step)).nonzero()[:, 0]
            rows, chosen = indices[inside] - start, targets[inside]
            log_probs[inside] = scores[rows, chosen]
            # argmax, which takes as long as all else here, is asked only where it decides between equal ones.
            highest = (scores[rows, chosen] == scores.amax(-1)[rows]).nonzero()[:, 0]
            greedy[inside[highest]] = scores[rows[highest]].argmax(-1) == chosen[highest]
        return log_probs.cpu(), greedy.cpu()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop sequence, end of text, or the task's number of tokens."""
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        by_settings: defaultdict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_settings[json.dumps(request.args[1], sort_keys=True)].append(number)
        results = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="Generating") as bar:
            for numbers in by_settings.values():
                settings = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks))
                room = self._room(settings["max_gen_toks"])
                self.num_truncated += sum(len(contexts[number]) > room for number in numbers)
                prompts = {number: contexts[number][-room:] for number in numbers}
                prefix = shared_prefix(self.model, list(prompts.values()))
                for batch in _batches(numbers, self.batch_size, length=lambda n: len(contexts[n])):
                    texts = self._continue([prompts[n] for n in batch], settings, prefix)
                    for number, text in zip(batch, texts, strict=True):
                        results[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return results

    def _room(self, max_gen_toks: int) -> int:
        """Most tokens of a context."""
        room = self.max_length - max_gen_toks
        if room < 1:
            raise ValueError(
                f"max_gen_toks = {max_gen_toks} leaves no room for a context in max_length = {self.max_length}; "
                "lower it"
            )
        return room

    def _continue(self, prompts: list[list[int]], settings: dict[str, Any], prefix: Prefix | None) -> list[str]:
        """Continuations under one task's normalised ``generation_kwargs``, cut before the first stop sequence."""
        options = dict(settings)
        until = [text for text in handle_stop_sequences(options.pop("until"), eos=None) if text]
        max_new_tokens, sampled = options.pop("max_gen_toks"), options.pop("do_sample")
        temperature, top_k, top_p = (options.pop(name, None) for name in ("temperature", "top_k", "top_p"))
        if options:
            raise ValueError(f"generation_kwargs: {', '.join(map(repr, options))} is not supported; remove it")
        new_tokens = generate(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            prefix=prefix,
            eos_id=self.eot_token_id,
            stop=self._stop_at(until) if until else None,
            **({"temperature": temperature or 1.0, "top_k": top_k, "top_p": top_p} if sampled else {}),
        )
        return [postprocess_generated_text(self._text(new), until, None) for new in new_tokens]

    def _text(self, tokens: Sequence[int]) -> str:
        """Text of generated ``tokens``, of which a padded embedding may hold some that the tokenizer does not know."""
        return self.tokenizer.decode([token for token in tokens if token < self.tokenizer.vocab_size])

    def _stop_at(self, until: list[str]) -> Stop:
        # The last tokens are looked at first, because decoding all of them after every token is quadratic.
        tail = max(map(len, until)) + 3

        def stop(_: int, tokens: list[int]) -> bool:
            end = self._text(tokens[-tail:])
            return any(text in end and text in self._text(tokens) for text in until)

        return stop

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval notes about the model in its results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.embed_tokens.weight.dtype),
        }


def _batches(items: Iterable[Any], size: int, length: Callable[[Any], int] = len) -> Iterator[list[Any]]:
    """``items`` in batches of ``size``, the longest first: little padding, and memory runs out at once or never."""
    ordered = sorted(items, key=length, reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[B, S] int64, padded with token 0. No mask is needed: a causal decoder's scored positions come before it."""
    longest = max(map(len, rows))
    return torch.tensor([list(row) + [0] * (longest - len(row)) for row in rows], device=device)
