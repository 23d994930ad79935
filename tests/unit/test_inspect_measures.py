"""Measures of routing against numbers worked out by hand, and tests of specialisation against what was planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.inspect.measures import (
    choices,
    chosen_experts,
    co_activations,
    expected_co_activations,
    jaccard,
    router_z,
    routing_entropy,
)
from zoo.inspect.metrics import AgreementMetric, RoutingMetric, TokenExpertMetric, WindowMetric
from zoo.inspect.specialisation import Specialist, domain_tests, mutual_information, pair_tests, specialists
from zoo.moe.router import RouterOutput
from zoo.moe.stats import dead_experts, effective_experts


def routed(experts: list[list[int]] | Tensor, num_experts: int = 4, **given: Tensor) -> RouterOutput:
    """Routing to given experts, with logits 0."""
    chosen = torch.as_tensor(experts)
    logits = torch.zeros(len(chosen), num_experts)
    return RouterOutput(logits, logits.softmax(-1), torch.ones(chosen.shape), chosen, **given)


def random_experts(tokens: int, num_experts: int, top_k: int, seed: int = 0, skew: float = 0.0) -> Tensor:
    """[T, K], drawn without a look at the token; ``skew`` makes loads uneven."""
    generator = torch.Generator().manual_seed(seed)
    noise = -torch.rand(tokens, num_experts, generator=generator).log().neg().log()
    return (noise + skew * torch.arange(num_experts)).topk(top_k).indices


def test_pairs_of_experts_are_counted_by_hand_and_padding_is_not() -> None:
    output = routed([[0, 1], [1, 0], [2, 1], [3, 0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert choices(output, mask).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert co_activations(choices(output, mask)).tolist() == [[2, 2, 0, 0], [2, 3, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_what_the_router_did_not_choose_counts_nowhere() -> None:
    chosen = torch.tensor([[True, False], [True, True]])
    output = routed([[0, 1], [2, 3]], chosen=chosen, kept=chosen)
    assert choices(output).tolist() == [[1, 0, 0, 0], [0, 0, 1, 1]]
    assert chosen_experts(output).tolist() == [[0, -1], [2, 3]]


def test_overlap_is_that_of_sets() -> None:
    one = torch.tensor([[0, 1], [0, 1], [0, 1], [-1, 2], [-1, -1]])
    other = torch.tensor([[1, 0], [1, 2], [2, 3], [2, -1], [-1, -1]])
    assert jaccard(one, other).tolist() == pytest.approx([1, 1 / 3, 0, 1, 1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 4), st.integers(1, 4))
def test_overlap_is_symmetric_and_between_0_and_1(seed: int, experts: int, k: int, other_k: int) -> None:
    one, other = (random_experts(20, experts, min(n, experts), seed + n) for n in (k, other_k))
    overlap = jaccard(one, other)
    assert torch.equal(overlap, jaccard(other, one)) and torch.equal(jaccard(one, one), torch.ones(20))
    assert bool(((overlap >= 0) & (overlap <= 1)).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0, 1))
def test_pairs_are_symmetric_and_loads_sum_to_the_assignments(seed: int, experts: int, skew: float) -> None:
    pairs = co_activations(choices(routed(random_experts(50, experts, 2, seed, skew), experts)))
    assert torch.equal(pairs, pairs.T)
    assert int(pairs.diagonal().sum()) == 100 and int(pairs.sum()) == 200
    expected = expected_co_activations(pairs)
    assert torch.equal(expected, expected.T) and float(expected.sum()) == pytest.approx(100, rel=1e-2)


def test_a_token_without_preference_has_entropy_1_and_z_the_square_of_ln_e() -> None:
    logits = torch.tensor([[0.0, 0, 0, 0], [math.log(3), 0, -math.inf, -math.inf]])
    output = RouterOutput(logits, logits.softmax(-1), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64))
    # Of scores 3/4 and 1/4: (3/4 ln 4/3 + 1/4 ln 4) / ln 4.
    second = (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(4)
    assert routing_entropy(output).tolist() == pytest.approx([1, second])
    assert router_z(output).tolist() == pytest.approx([math.log(4) ** 2] * 2)


def test_sigmoid_scores_are_normalised_before_their_entropy() -> None:
    scores = torch.tensor([[0.9, 0.9, 0.9, 0.9]])
    output = RouterOutput(scores.logit(), scores, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    assert routing_entropy(output).tolist() == pytest.approx([1])


def test_experts_are_dead_below_a_tenth_of_an_equal_share_if_there_are_enough_tokens() -> None:
    assert dead_experts(torch.tensor([100, 10, 9, 281])) == [2]
    assert dead_experts(torch.tensor([0, 0, 30, 30])) is None


def test_effective_experts_of_three_equal_loads_are_three() -> None:
    assert float(effective_experts(torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))) == pytest.approx(3)


def test_a_uniform_choice_of_two_of_four_expects_a_sixth_of_the_tokens_in_each_pair() -> None:
    pairs = torch.full((4, 4), 100) + 200 * torch.eye(4, dtype=torch.int64)
    expected = expected_co_activations(pairs)
    assert expected[0, 1].item() == pytest.approx(100) and expected.diagonal().tolist() == [0] * 4


def test_expected_pairs_have_the_loads_margins_and_no_more_structure() -> None:
    """Of three experts, two a token, the loads say all: who is left out decides the pair."""
    pairs = torch.tensor([[90, 70, 20], [70, 80, 10], [20, 10, 30]])
    assert torch.allclose(expected_co_activations(pairs), (pairs - pairs.diagonal().diag()).double())
    assert not expected_co_activations(torch.diag(torch.tensor([5, 6]))).any()


def test_metrics_add_up_over_batches() -> None:
    experts, ids = random_experts(60, 4, 2), torch.arange(60).view(6, 10) % 7
    kept = torch.rand(60, 2) > 0.3
    mask = torch.ones(6, 10, dtype=torch.bool)
    mask[-1, 5:] = False
    types = torch.tensor([2, 5])

    def metrics(parts: int) -> tuple:
        routing, tokens, windows, same = RoutingMetric(1, 4), TokenExpertMetric(1, 4, types), WindowMetric(), None
        same = AgreementMetric(1)
        for part in torch.arange(6).chunk(parts):
            rows = torch.cat([torch.arange(10 * i, 10 * i + 10) for i in part.tolist()])
            output = routed(experts[rows], kept=kept[rows])
            routing.update([output], mask[part])
            tokens.update([output], ids[part], mask[part])
            windows.update([output], mask[part])
            same.update([experts[rows]], [experts[rows]])
        return routing.compute(), tokens.compute(), windows.compute(), same.compute()

    whole, parts = metrics(1), metrics(3)
    assert whole[0].tokens == parts[0].tokens == 55
    assert torch.equal(whole[0].pairs, parts[0].pairs)
    assert whole[0].dropped == parts[0].dropped == pytest.approx([1 - kept[mask.flatten()].double().mean().item()])
    assert whole[0].untaken == pytest.approx([(kept[mask.flatten()].sum(-1) == 0).double().mean().item()])
    assert torch.equal(whole[1], parts[1]) and torch.equal(whole[2], parts[2])
    of_type = choices(routed(experts))[(ids.flatten() == 5) & mask.flatten()].sum(0)
    assert torch.equal(whole[1][0, 1], of_type)
    assert torch.equal(whole[2].sum(dim=0)[0], whole[0].counts[0])
    assert whole[3].equal == whole[3].jaccard == [1.0] and whole[3].by_chance[0] < 0.6


def find_specialists(experts: Tensor, ids: Tensor, num_experts: int) -> list[Specialist]:
    table = choices(routed(experts, num_experts))
    types, occurrences = ids.unique(return_counts=True)
    metric = TokenExpertMetric(1, num_experts, types)
    metric.update([routed(experts, num_experts)], ids.unsqueeze(0), torch.ones(1, len(ids), dtype=torch.bool))
    totals = table.sum(dim=0, keepdim=True)
    return specialists(metric.compute().numpy(), occurrences.numpy(), totals.numpy(), len(ids))


def test_a_planted_specialist_is_found_with_its_counts() -> None:
    """Token 3 always goes to expert 5 and to one drawn at random, all others to two at random."""
    ids = torch.arange(2000) % 20
    experts = random_experts(2000, 8, 2)
    ours = ids == 3
    experts[ours] = torch.stack([torch.full((100,), 5), experts[ours][:, 0] % 5], dim=1)
    first = find_specialists(experts, ids, 8)[0]
    assert (first.type, first.expert, first.count, first.occurrences) == (3, 5, 100, 100)
    share = (experts == 5).any(dim=1).double().mean().item()
    assert first.pmi == pytest.approx(-math.log2(share)) and first.p_holm < 1e-20
    assert {(s.type, s.expert) for s in find_specialists(experts, ids, 8)} == {(3, 5)}


def test_a_router_that_does_not_look_at_tokens_has_no_specialists() -> None:
    """At a level of 5% at most one text in twenty shows any; with uneven loads and two experts a token as well."""
    ids = torch.arange(600) % 15
    found = sum(bool(find_specialists(random_experts(600, 6, 2, seed, 0.3), ids, 6)) for seed in range(100))
    assert found <= 9  # of 100 texts at 5%, more than 9 have a probability of 3%; Fisher's test stays well below 5%


def test_pairs_of_a_random_router_are_not_told_apart_and_a_planted_one_is() -> None:
    def told(experts: Tensor) -> set[tuple[int, int]]:
        pairs = co_activations(choices(routed(experts, 6)))
        tests = pair_tests(pairs[None].numpy(), expected_co_activations(pairs)[None].numpy(), len(experts))
        found = np.argwhere(tests.p_holm[0] <= 0.05)
        assert np.allclose(tests.p_holm, tests.p_holm.transpose(0, 2, 1))
        return {(int(a), int(b)) for a, b in found if a < b}

    assert sum(bool(told(random_experts(600, 6, 2, seed, 0.3))) for seed in range(100)) <= 9
    planted = random_experts(600, 6, 2)
    planted[:100] = torch.tensor([2, 4])
    assert (2, 4) in told(planted)


def test_windows_of_one_kind_are_not_told_apart_even_where_each_has_experts_of_its_own() -> None:
    """Each window has a favourite expert: tokens are not independent, windows are."""
    labels = np.arange(40) % 2
    found = 0  # at a level of 5%, more than 2 of 10 have a probability of 1%
    for seed in range(10):
        generator = np.random.default_rng(seed)
        favourites = np.eye(4)[generator.integers(0, 4, 40)]
        windows = (10 + 100 * favourites[:, None, :]).astype(np.int64)
        found += bool((domain_tests(windows, labels, seed).p_holm <= 0.05).any())
    assert found <= 2


def test_sets_of_data_with_experts_of_their_own_are_told_apart() -> None:
    labels = np.arange(40) % 2
    generator = np.random.default_rng(0)
    windows = generator.integers(20, 30, (40, 2, 4))
    windows[labels == 1, 1, 3] += 30
    tests = domain_tests(windows, labels, 0)
    assert tests.p_holm[0] > 0.05 and tests.p_holm[1] == pytest.approx(2 / 2000)
    assert tests.information[1] > 10 * tests.by_chance[1]


def test_information_of_an_expert_that_tells_all_is_a_bit() -> None:
    assert mutual_information(np.array([[5.0, 0], [0, 5]])).item() == pytest.approx(1)
    assert mutual_information(np.array([[5.0, 5], [1, 1]])).item() == pytest.approx(0)
