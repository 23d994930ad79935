"""Ways of choosing experts by hand and by their properties; rows 22 and 23 of the correctness table.

Models are those of ``configs/models/papers``; ``LAYERS`` has the MoE layer of each, in double precision.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.config import ModelConfig, MoEConfig
from zoo.config_routing import RoutingConfig, TemperatureConfig
from zoo.layers.sequence import SequenceLayout, sequence_layout
from zoo.moe.dispatch import KeptDispatcher, LocalDispatcher
from zoo.moe.experts import DropoutExperts, Experts, experts_loop
from zoo.moe.exploration import Jitter, NoisyLogits, Temperature, set_step
from zoo.moe.layer import MoE, moe_layer
from zoo.moe.router import RouterOutput
from zoo.moe.routers import make_router
from zoo.moe.selection import capacity, expert_choice, hash_experts, sinkhorn, use_second, within_capacity
from zoo.moe.stats import dropped_fraction, expert_counts
from zoo.moe.ungated import relu_loop
from zoo.registry import find_spec, paper_names

D, FFN, E = 6, 5, 4
NAMES = [name for name in paper_names() if name.endswith("-tiny")]


def small(name: str, **changes: Any) -> ModelConfig:
    """The model ``name`` with 4 narrow experts."""
    config = find_spec(name).model
    assert config.moe is not None
    top_k = E if config.moe.top_k == config.moe.num_experts else min(config.moe.top_k, 2)
    moe = dataclasses.replace(config.moe, num_experts=E, top_k=top_k, moe_intermediate_size=FFN, **changes)
    return dataclasses.replace(config, hidden_size=D, moe=moe)


def layer_of(config: ModelConfig, training: bool, seed: int = 0) -> MoE:
    layer = moe_layer(config).double().train(training)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer


def layout_of(ids: Tensor, mask: Tensor | None = None) -> SequenceLayout:
    return sequence_layout(ids, attention_mask=mask, document_ids=None, past=0, past_valid=None)


def routing_block(top_k: int, num_experts: int = E, norm: bool = False, **routing: Any) -> MoEConfig:
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        moe_intermediate_size=FFN,
        score_func="softmax",
        norm_topk_prob=norm,
        routing=RoutingConfig(**routing),
    )


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
# Exploration and dropout
# ---------------------------------------------------------------------------------------------------------------


def test_noisy_top_k_is_equations_3_to_5() -> None:
    router = make_router(D, routing_block(2, norm=True, noise=True))
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(7, D)
    torch.manual_seed(3)
    out = router.train()(x)
    torch.manual_seed(3)
    noisy = x @ router.weight.T + torch.randn(7, E) * F.softplus(x @ router.noise.weight.T)
    best = noisy.topk(2)
    torch.testing.assert_close(out.logits, noisy)
    assert torch.equal(out.experts, best.indices)
    torch.testing.assert_close(out.weights, best.values.softmax(-1))
    torch.testing.assert_close(router.eval()(x).logits, x @ router.weight.T)
    assert isinstance(router.noise, NoisyLogits)


def test_jitter_is_within_its_bounds_and_of_training_only() -> None:
    jitter, x = Jitter(0.25), torch.randn(100, D)
    factor = jitter(x) / x
    assert 0.75 <= factor.min() < 0.8 < 1.2 < factor.max() <= 1.25
    assert jitter.eval()(x) is x


def test_row_13_explored_logits_are_fp32_under_autocast() -> None:
    router = make_router(D, routing_block(2, noise=True, jitter=0.1, router_dropout=0.5, capacity_factor=1.0))
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = router.bfloat16()(torch.randn(9, D).bfloat16())
    assert out.logits.dtype == out.weights.dtype == torch.float32


def test_temperature_follows_the_step_and_is_kept() -> None:
    router = make_router(D, routing_block(2, temperature=TemperatureConfig(start=4.0, end=1.0, steps=30)))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(3, D)
    raw = x @ router.weight.T
    for step, temperature in ((0, 4.0), (10, 3.0), (30, 1.0), (1000, 1.0)):
        set_step(router, step)
        torch.testing.assert_close(router(x).logits, raw / temperature)
    set_step(router, 1001)
    other = Temperature(TemperatureConfig(start=4.0, end=1.0, steps=30))
    other.load_state_dict(router.bfloat16().temperature.state_dict())
    assert other.step == 1001, "bf16 has no 1001"


def test_dropout_inside_the_experts_is_of_what_enters_down() -> None:
    torch.manual_seed(0)
    experts = DropoutExperts(1, D, FFN, F.silu, 0.4)
    plain = Experts(1, D, FFN)
    for parameter, copy in zip(experts.parameters(), plain.parameters(), strict=True):
        torch.nn.init.normal_(parameter)
        copy.data = parameter.data
    rows, counts = torch.randn(50, D), torch.tensor([50])
    torch.manual_seed(1)
    out = experts.train()(rows, counts)
    torch.manual_seed(1)
    gate, up = rows @ experts.gate_up[0, 0].T, rows @ experts.gate_up[0, 1].T
    kept = F.dropout(torch.ones(50, FFN), 0.4)
    torch.testing.assert_close(out, (F.silu(gate) * up * kept) @ experts.down[0].T)
    torch.testing.assert_close(experts.eval()(rows, counts), plain(rows, counts))
    assert experts.mixes(rows) and not experts.train().mixes(rows)


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


# ---------------------------------------------------------------------------------------------------------------
# Of every model: equations, symmetries, causality, gradients
# ---------------------------------------------------------------------------------------------------------------


def run(layer: MoE, x: Tensor, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, RouterOutput]:
    """The layer with the same random numbers each time."""
    torch.manual_seed(7)
    return layer(x, layout_of(ids, mask))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NAMES)
def test_every_routing_is_the_weighted_sum_of_what_takes_the_token(name: str, training: bool) -> None:
    config = small(name, expert_dropout=0.0)
    layer, moe = layer_of(config, training), config.moe
    assert moe is not None
    x, ids = torch.randn(3, 8, D, dtype=torch.float64), torch.randint(50, (3, 8))
    out, routing = run(layer, x, ids)
    kept = torch.ones_like(routing.experts, dtype=torch.bool) if routing.kept is None else routing.kept
    expected = torch.zeros(24, D, dtype=torch.float64)
    for t, k in kept.nonzero().tolist():
        e = int(routing.experts[t, k])
        loop = relu_loop if config.expert_ffn == "relu" else experts_loop
        weights = [parameter[e : e + 1] for parameter in layer.experts.weights]
        one = loop(x.flatten(0, 1)[t : t + 1], torch.tensor([1]), *weights)
        expected[t] += routing.weights[t, k] * one[0]
    torch.testing.assert_close(out.flatten(0, 1), expected)
    assert (routing.weights[~kept] == 0).all() and not (
        kept & ~(routing.chosen if routing.chosen is not None else kept)
    ).any()
    factor = moe.routing and (moe.routing.capacity_factor if training else moe.routing.eval_capacity_factor)
    if factor:
        for row in range(3):
            here = slice(8 * row, 8 * row + 8)
            taken = torch.bincount(routing.experts[here][kept[here]], minlength=E)
            assert taken.max() <= capacity(8, moe.top_k, E, factor)
    elif moe.norm_topk_prob:
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(24, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_sequences_and_padding_change_nothing_of_each_other(name: str) -> None:
    """A row by itself, and one with padding before it, come out as in the batch."""
    layer = layer_of(small(name), training=False)
    x, ids = torch.randn(2, 8, D, dtype=torch.float64), torch.randint(50, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    out, _ = run(layer, x, ids, mask)
    torch.testing.assert_close(run(layer, x[:1], ids[:1])[0], out[:1])
    torch.testing.assert_close(run(layer, x[1:, 3:], ids[1:, 3:])[0], out[1:, 3:])
    order = torch.tensor([1, 0])
    torch.testing.assert_close(run(layer, x[order], ids[order], mask[order])[0], out[order])


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_tokens_matters_only_where_places_are_limited(name: str) -> None:
    config = small(name)
    routing = config.moe and config.moe.routing
    layer = layer_of(config, training=False)
    x, ids, order = torch.randn(1, 8, D, dtype=torch.float64), torch.randint(50, (1, 8)), torch.randperm(8)
    if not (routing and routing.eval_capacity_factor):
        torch.testing.assert_close(run(layer, x[:, order], ids[:, order])[0], run(layer, x, ids)[0][:, order])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NAMES)
def test_no_later_token_changes_an_earlier_output_but_where_it_is_said(name: str, training: bool) -> None:
    config = small(name)
    routing = config.moe and config.moe.routing
    causal = routing is None or (routing.causal_in_training if training else routing.causal)
    changed = False
    for seed in range(6):
        layer = layer_of(config, training, seed)
        x, ids = torch.randn(2, 8, D, dtype=torch.float64), torch.randint(50, (2, 8))
        later, later_ids = x.clone(), ids.clone()
        later[:, 5:] = torch.randn(2, 3, D, dtype=torch.float64)
        later_ids[:, 5:] = torch.randint(50, (2, 3))
        # Dropout is of rows, of which later tokens may have others: an element at a time is what is compared.
        if config.moe and config.moe.expert_dropout:
            layer.experts.eval()
        before, after = run(layer, x, ids)[0][:, :5], run(layer, later, later_ids)[0][:, :5]
        changed |= not torch.allclose(before, after)
    assert changed == (not causal)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_every_routing_by_finite_differences(name: str) -> None:
    layer = layer_of(small(name), training=True, seed=2)
    ids = torch.randint(50, (2, 4), generator=torch.Generator().manual_seed(0))
    names = [n for n, _ in layer.named_parameters()]
    x = torch.randn(2, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def out(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(7)
        state = dict(zip(names, values, strict=True))
        result, routing = torch.func.functional_call(layer, state, (x, layout_of(ids)))
        return result, routing.scores

    assert torch.autograd.gradcheck(out, (x, *layer.parameters()), fast_mode=True)
