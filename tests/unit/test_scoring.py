"""Log-likelihoods with shared beginnings and batches by tokens, against one request at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

import zoo
from zoo.config import ModelConfig
from zoo.harness.lm import Request, ZooLM
from zoo.harness.prefixes import Group, Input, batches, grouped, padded
from zoo.model import Decoder
from zoo.prefix import FORWARD_COSTS
from zoo.registry import find_spec
from zoo.tokenizer import Tokenizer

TOLERANCE = 1e-4
"""On log-likelihoods, in nats."""
POSITIONS = 48
MODELS = [
    "llama-tiny",
    "mixtral-tiny",
    "deepseek-v3-tiny",
    "mistral-tiny",
    "gpt-oss-tiny",
    "gemma2-tiny",
    "llama4-tiny",
    "jamba-tiny",
]
"""Dense, sparse, MLA with shared experts, windows, sinks, windows in every other layer, chunks, a recurrent state."""


def small(config: ModelConfig) -> ModelConfig:
    """Few positions, and a window shorter than them where there is one."""
    config = replace(config, vocab_size=300, num_layers=2, max_position_embeddings=POSITIONS)
    attention = config.attention
    if attention and attention.sliding_window:
        config = replace(config, attention=replace(attention, sliding_window=8))
    if attention and attention.interleaved_rope:
        interleaved = replace(attention.interleaved_rope, chunk_size=8)
        config = replace(config, attention=replace(attention, interleaved_rope=interleaved))
    return config


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Decoder:
    model = zoo.build(small(find_spec(request.param).model), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # as built, all logits are nearly equal
    return model


@pytest.fixture(scope="module")
def tokenizer(token_data: Path) -> Tokenizer:
    return Tokenizer.load(token_data.parent / "tokenizer")


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def questions(seed: int, count: int) -> list[Request]:
    """Passages with questions with choices: of one token, of several, the same twice, and some beyond the positions."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [draw.randrange(3, 300) for _ in range(draw.randint(low, high))]

    requests: list[Request] = []
    for _ in range(count):
        passage = [1, *words(1, POSITIONS)]
        for _ in range(draw.randint(1, 3)):
            context = passage + words(0, 6)
            answer = words(1, 1)
            requests += [(None, context, choice) for choice in (answer, answer + words(1, 4), words(1, 8), words(1, 1))]
    long = (None, words(POSITIONS + 5, POSITIONS + 5), words(3, 3))
    return [*requests, requests[0], long, (None, [1], [7]), (None, [1], [7, 8])]


@torch.inference_mode()
def one_at_a_time(model: Decoder, requests: list[Request]) -> list[tuple[float, bool]]:
    """The definition: a forward over the last tokens that fit, all but the last; no batch, padding or cache."""
    results = []
    for _, context, continuation in requests:
        inputs = (context + continuation)[-(POSITIONS + 1) : -1]
        log_probs = model(torch.tensor([inputs])).logits[0, -len(continuation) :].log_softmax(-1)
        targets = torch.tensor(continuation)
        total = log_probs.gather(1, targets[:, None]).sum()
        results.append((float(total), bool((log_probs.argmax(-1) == targets).all())))
    return results


def assert_equal_scores(ours: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in expected], abs=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_one_request_at_a_time(model: Decoder, tokenizer: Tokenizer, batch_size: int) -> None:
    requests = questions(seed=batch_size, count=5)
    lm = ZooLM(model, tokenizer, batch_size=batch_size)
    scores = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert_equal_scores(scores, one_at_a_time(model, requests))
    assert lm.num_truncated > 0, "no request was longer than the positions"


def test_scores_do_not_depend_on_order_or_company(model: Decoder, tokenizer: Tokenizer) -> None:
    requests = questions(seed=9, count=4)
    lm = ZooLM(model, tokenizer, batch_size=4)
    scores = dict(enumerate(lm._loglikelihood_tokens(requests, disable_tqdm=True)))
    some = random.Random(0).sample(range(len(requests)), len(requests) // 2)
    assert_equal_scores(
        lm._loglikelihood_tokens([requests[n] for n in some], disable_tqdm=True), [scores[n] for n in some]
    )


def test_scores_do_not_depend_on_the_number_of_threads(tokenizer: Tokenizer, two_threads: None) -> None:
    model, requests = zoo.build(small(find_spec("mixtral-tiny").model), seed=1), questions(seed=3, count=2)
    lm = ZooLM(model, tokenizer, batch_size=4)
    scores = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    torch.set_num_threads(1)
    assert_equal_scores(lm._loglikelihood_tokens(requests, disable_tqdm=True), scores)


def test_a_shared_passage_is_computed_once(tokenizer: Tokenizer) -> None:
    """40 choices of 4 tokens after 40: 40 + 40 · 4 positions with one of the context, not 40 · 44."""
    model = zoo.build(small(find_spec("llama-tiny").model), seed=1)
    draw = random.Random(0)
    context = [draw.randrange(300) for _ in range(40)]
    requests: list[Request] = [(None, context, [draw.randrange(300) for _ in range(4)]) for _ in range(40)]
    computed = []
    model.embed_tokens.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].numel()))
    ZooLM(model, tokenizer, batch_size=64)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert sum(computed) == 39 + 40 * 4


# The plan ------------------------------------------------------------------------------------------------------

inputs_of_few_letters = st.sets(
    st.lists(st.integers(0, 2), min_size=1, max_size=6).map(
        lambda letters: tuple(n for n in letters for _ in range(20))
    ),
    min_size=1,
    max_size=20,
)


def as_inputs(rows: set[tuple[int, ...]], draw: random.Random) -> list[Input]:
    return [Input(row, draw.randrange(len(row))) for row in sorted(rows)]


def work(groups: list[Group]) -> int:
    return sum(group.shared + sum(len(one.tokens) - group.shared for one in group.inputs) for group in groups)


@given(inputs_of_few_letters, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_groups_hold_every_input_once_and_share_what_is_equal(rows: set[tuple[int, ...]], draw: random.Random) -> None:
    inputs = as_inputs(rows, draw)
    groups = grouped(inputs)
    assert sorted(one.tokens for group in groups for one in group.inputs) == sorted(rows)
    for group in groups:
        assert len({one.tokens[: group.shared] for one in group.inputs}) == 1
        assert all(group.shared <= one.first for one in group.inputs), "a position whose hidden state is wanted"
        assert group.shared == 0 or len(group.inputs) > 1
    assert work(groups) <= sum(map(len, rows))
    shuffled = draw.sample(inputs, len(inputs))
    assert grouped(shuffled) == groups


def test_the_deeper_beginning_is_shared_where_that_takes_less() -> None:
    passage, other = (1, *range(100, 200)), (1, *range(200, 300))
    questions_of = [(*passage, 5), (*passage, 6), (*passage, 7, 7), (*other, 5), (*other, 6)]
    groups = grouped([Input(tokens, min(101, len(tokens) - 1)) for tokens in [*questions_of, (1, 2)]])
    assert sorted((len(group.inputs), group.shared) for group in groups) == [(1, 0), (2, 101), (3, 101)]
    assert work(groups) == (101 + 4) + (101 + 2) + 2


@given(inputs_of_few_letters, st.integers(40, 400), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_forwards_stay_within_the_budget(rows: set[tuple[int, ...]], budget: int, draw: random.Random) -> None:
    groups = grouped(as_inputs(rows, draw))
    seen = []
    for batch in batches(groups, budget):
        past = min(group.shared for group in batch)
        assert past * len(batch) <= budget or len(batch) == 1
        for forward in padded((one for group in batch for one in group.inputs), budget, past):
            assert len(forward) == 1 or len(forward) * max(len(one.tokens) for one in forward) <= budget
            seen += [one.tokens for one in forward]
    assert sorted(seen) == sorted(rows)


def test_inputs_of_unlike_length_are_not_padded_to_one() -> None:
    lengths = [1000, 990, 100, 99, 98, 97, 10]
    inputs = [Input(tuple([n] * n), n - 1) for n in lengths]
    forwards = [[len(one.tokens) for one in forward] for forward in padded(inputs, 4096)]
    assert forwards == [[1000, 990], [100, 99, 98, 97, 10]]


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=9, unique=True), st.integers(600, 3000), st.integers(600, 5000)
)
@settings(max_examples=100, deadline=None)
def test_no_other_cut_of_the_sorted_inputs_takes_less(lengths: list[int], budget: int, slots: int) -> None:
    past = 20
    lengths = sorted((past + length for length in lengths), reverse=True)
    inputs = [Input(tuple([n] * n), n - 1) for n in lengths]

    def cost(forwards: list[list[int]]) -> float:
        within = all(
            len(forward) == 1 or (len(forward) * (forward[0] - past) <= budget and len(forward) * forward[0] <= slots)
            for forward in forwards
        )
        return sum(len(forward) * (forward[0] - past) + FORWARD_COSTS for forward in forwards) if within else math.inf

    planned = [[len(one.tokens) for one in forward] for forward in padded(inputs, budget, past, slots)]
    assert [length for forward in planned for length in forward] == lengths
    inner = range(1, len(lengths))
    cuts = [[0, *some, len(lengths)] for count in range(len(lengths)) for some in combinations(inner, count)]
    assert cost(planned) == min(cost([lengths[a:b] for a, b in pairwise(ends)]) for ends in cuts)


def test_examples_that_all_contexts_begin_with_are_computed_once(repository: Path) -> None:
    lm = ZooLM(str(repository / "checkpoints" / "facts-mixtral"), batch_size=2)
    examples = "Question: What is the capital of Chad?\nAnswer: N'Djamena\n\n" * 12
    contexts = [examples + end for end in ("The capital of Peru is", "Question: What is", "Mali", "Question: What")]

    def continued(contexts: list[str]) -> list[str]:
        settings = {"until": ["\n"], "max_gen_toks": 6}
        asked = [Instance("generate_until", {}, (context, dict(settings)), 0) for context in contexts]
        return lm.generate_until(asked, disable_tqdm=True)

    alone = [text for context in contexts for text in continued([context])]
    counts: list[int] = []
    lm.model.embed_tokens.register_forward_pre_hook(lambda _, arguments: counts.append(arguments[0].numel()))
    assert continued(contexts) == alone
    assert len(set(alone)) > 1
    assert counts[0] > 0.9 * len(lm.tok_encode(examples))
    assert sum(counts[1:]) < counts[0] / 2
