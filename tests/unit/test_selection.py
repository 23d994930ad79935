"""Ways of choosing experts by hand and by their properties; rows 22 and 23 of the correctness table."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_layers import D, E, layer_of, layout_of, routing_block, small

from zoo.moe.dispatch import KeptDispatcher, LocalDispatcher
from zoo.moe.experts import experts_loop
from zoo.moe.router import RouterOutput
from zoo.moe.routers import make_router
from zoo.moe.selection import capacity, expert_choice, hash_experts, sinkhorn, use_second, within_capacity
from zoo.moe.stats import dropped_fraction, expert_counts

# ---------------------------------------------------------------------------------------------------------------
# Capacity and second experts
# ---------------------------------------------------------------------------------------------------------------


def test_row_23_capacity_by_hand() -> None:
    assert capacity(10, 2, 4, 1.25) == 7  # 6.25; without K it would be 4
    assert capacity(10, 1, 11, 1.1) == 1  # exactly, where 1.1 · 10 / 11 in floating point is a little more
    assert capacity(3, 1, 8, 1.0) == 1
    assert capacity(torch.tensor([10, 0, 8]), 2, 4, 1.25).tolist() == [7, 0, 5]


@given(st.integers(0, 5000), st.integers(1, 8), st.integers(1, 256), st.integers(1, 400))
def test_row_23_capacity_is_the_rounded_up_share(tokens: int, top_k: int, experts: int, percent: int) -> None:
    expected = math.ceil(Fraction(percent, 100) * top_k * tokens / experts)
    assert capacity(tokens, top_k, experts, percent / 100) == expected
    assert int(capacity(torch.tensor(tokens), top_k, experts, percent / 100)) == expected


def test_row_22_places_are_taken_from_left_to_right() -> None:
    # Two sequences of three tokens with two choices each.
    experts = torch.tensor([[0, 1, 0, 2, 1, 0], [2, 0, 2, 0, 2, 0]])
    assert within_capacity(experts, 3, 2, None).int().tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]
    counted = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]]).bool()
    assert within_capacity(experts, 3, 2, counted).int().tolist() == [[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]]
    of_each = torch.tensor([[1], [3]])
    assert within_capacity(experts, 3, of_each, None).int().tolist() == [[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 9), st.integers(0, 6))
def test_row_22_no_later_choice_takes_a_place_and_no_expert_is_too_full(
    seed: int, rows: int, length: int, most: int
) -> None:
    torch.manual_seed(seed)
    experts, counted = torch.randint(E, (rows, length)), torch.rand(rows, length) > 0.2
    kept = within_capacity(experts, E, most, counted)
    for expert in range(E):
        wanted = (experts == expert) & counted
        assert ((kept & wanted).sum(1) == wanted.sum(1).clamp(max=most)).all()
    first = torch.randint(length, ())
    assert torch.equal(within_capacity(experts[:, :first], E, most, counted[:, :first]), kept[:, :first])
    assert not (kept & ~counted).any()


@pytest.mark.parametrize(("threshold", "share"), [(0.2, 1.0), (0.5, 0.6)])
def test_row_22_the_second_expert_is_used_with_its_probability(threshold: float, share: float) -> None:
    torch.manual_seed(0)
    used = use_second(torch.tensor([[0.7, 0.3]]).expand(20_000, 2), threshold)
    assert used[:, 0].all()
    assert used[:, 1].double().mean().item() == pytest.approx(share, abs=0.02)
    assert use_second(torch.tensor([[0.95, 0.05]]).expand(20_000, 2), 0.2)[:, 1].double().mean() == pytest.approx(
        0.25, abs=0.02
    )


def test_row_22_both_limits_of_a_router_by_hand() -> None:
    """Weights stay those of the two best; who finds no place weighs 0, and counts as chosen."""
    router = make_router(3, routing_block(2, 3, norm=True, capacity_factor=0.5, eval_capacity_factor=1.0))
    logits = torch.tensor([[2.0, 1.0, 0.0], [3.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
    router.weight.data = logits.T.contiguous()
    for training, most in ((True, 1), (False, 2)):  # ceil(2 · 3 · 0.5 / 3) and ceil(2 · 3 / 3)
        out = router.train(training)(torch.eye(3))
        assert out.experts.tolist() == [[0, 1], [0, 2], [0, 1]]
        places = [[True, True], [most > 1, True], [False, most > 1]]
        assert out.kept.tolist() == places and out.chosen is None
        whole = logits.softmax(-1).gather(1, out.experts)
        expected = (whole / whole.sum(-1, keepdim=True)) * torch.tensor(places)
        torch.testing.assert_close(out.weights, expected)
        assert expert_counts(out).tolist() == [3, 2, 1]
        assert dropped_fraction(out).item() == pytest.approx(1 - sum(map(sum, places)) / 6)
    only_first = expert_counts(out, torch.tensor([[True, False, False]]))
    assert only_first.tolist() == [1, 1, 0]


# ---------------------------------------------------------------------------------------------------------------
# Who chooses
# ---------------------------------------------------------------------------------------------------------------


def test_experts_choose_tokens_by_hand() -> None:
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]]])
    assert expert_choice(scores, 1, None)[0].int().tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    valid = torch.tensor([[False, True, True, False]])
    assert expert_choice(scores, 1, valid)[0].int().tolist() == [[0, 0], [1, 0], [0, 1], [0, 0]]
    router = make_router(2, routing_block(1, 2, choice="expert"))
    torch.nn.init.normal_(router.weight)
    out = router(torch.randn(6, 2))
    torch.testing.assert_close(out.weights, out.scores * out.chosen)
    assert expert_counts(out).tolist() == [3, 3] and dropped_fraction(out) == 0


def test_a_balanced_plan_by_hand() -> None:
    """Two tokens that both want expert 0: the odds ratio of a plan is that of exp(logits), and 4 here."""
    logits = torch.tensor([[math.log(8.0), 0.0], [math.log(2.0), 0.0]])
    torch.testing.assert_close(sinkhorn(logits, None), torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]))
    padded = sinkhorn(torch.cat((logits, torch.tensor([[9.0, 0.0]]))), torch.tensor([True, True, False]))
    torch.testing.assert_close(padded[:2], torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 40), st.integers(1, 8))
def test_a_plan_gives_every_expert_as_much(seed: int, tokens: int, experts: int) -> None:
    torch.manual_seed(seed)
    plan = sinkhorn(torch.randn(tokens, experts, dtype=torch.float64), None)
    torch.testing.assert_close(plan.sum(1), torch.ones(tokens, dtype=torch.float64))
    torch.testing.assert_close(
        plan.sum(0), torch.full((experts,), tokens / experts, dtype=torch.float64), rtol=0.02, atol=0
    )


def test_sinkhorn_routing_balances_training_and_weighs_by_the_scores() -> None:
    router = make_router(D, routing_block(1, choice="sinkhorn"))
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(400, D)
    x[:, 0], router.weight.data[:, 0] = 1.0, torch.tensor([20.0, 0.0, 0.0, 0.0])  # all tokens prefer one expert
    plain, balanced = router.eval()(x), router.train()(x)
    assert expert_counts(plain)[0] > 390 and expert_counts(balanced).max() < 150
    torch.testing.assert_close(balanced.weights, balanced.scores.gather(1, balanced.experts))


def test_hashes_spread_ids_evenly_and_know_nothing_else() -> None:
    ids = torch.arange(8192)
    experts = hash_experts(ids, 8, 2)
    assert (experts[:, 0] != experts[:, 1]).all()
    counts = torch.bincount(experts[:, 0], minlength=8)
    assert counts.sum() == 8192 and (counts - 1024).abs().max() < 64
    assert torch.equal(hash_experts(ids.flip(0), 8, 2), experts.flip(0))
    runs = (experts[1:, 0] == experts[:-1, 0]).double().mean()
    assert runs < 0.2, "neighbouring ids are not neighbours"
    out = make_router(D, routing_block(2, 8, choice="hash"))(torch.randn(8, D), layout_of(ids[:8].view(2, 4)))
    assert torch.equal(out.experts, experts[:8]) and (out.weights == 0.5).all()


def test_dense_training_weighs_all_experts_and_inference_some() -> None:
    router = make_router(D, routing_block(2, dense_training=True))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(5, D)
    dense, sparse = router.train()(x), router.eval()(x)
    assert torch.equal(dense.experts.sort(-1).values, torch.arange(E).expand(5, E))
    torch.testing.assert_close(dense.weights, dense.scores.gather(1, dense.experts))
    torch.testing.assert_close(sparse.weights, sparse.scores.topk(2).values)


def test_a_dense_mixture_is_the_sum_over_all_experts() -> None:
    layer = layer_of(small("dense-mixture-tiny"), training=True)
    x = torch.randn(1, 3, D, dtype=torch.float64)
    scores = (x[0] @ layer.router.weight.T).softmax(-1)
    gate_up, down = layer.experts.gate_up, layer.experts.down
    expected = sum(
        scores[:, e, None] * experts_loop(x[0], torch.tensor([3]), gate_up[e : e + 1], down[e : e + 1])
        for e in range(E)
    )
    torch.testing.assert_close(layer(x)[0][0], expected)


# ---------------------------------------------------------------------------------------------------------------
# Rows of kept assignments
# ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 9), st.integers(1, E))
def test_only_kept_assignments_have_rows(seed: int, tokens: int, top_k: int) -> None:
    torch.manual_seed(seed)
    kept = torch.rand(tokens, top_k) > 0.4
    scores = torch.rand(tokens, E, dtype=torch.float64)
    weights = torch.rand(tokens, top_k, dtype=torch.float64).masked_fill(~kept, 0).requires_grad_()
    routing = RouterOutput(scores, scores, weights, scores.topk(top_k).indices, None, kept)
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    results = []
    for dispatcher in (KeptDispatcher(), LocalDispatcher()):  # the other one computes all, weighted with 0
        rows, counts, state = dispatcher.dispatch(x, routing)
        scale = torch.repeat_interleave(torch.arange(1.0, E + 1, dtype=torch.float64), counts)
        out = dispatcher.combine(rows * scale[:, None], state)  # type: ignore[arg-type]
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, weights))])
        expected = kept.sum() if isinstance(dispatcher, KeptDispatcher) else kept.numel()
        assert len(rows) == counts.sum() == expected
    results[1][2] = results[1][2].masked_fill(~kept, 0)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_row_24_a_token_that_no_expert_takes_is_never_read() -> None:
    layer = layer_of(small("switch-decoder-tiny"), training=False)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    x = torch.randn(1, 4, D, dtype=torch.float64)
    expected = layer(x, layout_of(ids, torch.tensor([[0, 1, 1, 1]])))[0]
    x[0, 0] = torch.nan
    out = layer(x, layout_of(ids, torch.tensor([[0, 1, 1, 1]])))[0]
    assert (out[0, 0] == 0).all()
    torch.testing.assert_close(out, expected)
