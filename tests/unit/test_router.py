"""Routing against hand-worked cases and properties; rows 5, 6, 7, 10, 12, 13 of the correctness table."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.config import ModelConfig, MoEConfig
from zoo.moe.router import BiasedRouter, Router, limit_groups, update_selection_bias
from zoo.registry import find_spec

BASE: dict[str, Any] = {
    "num_experts": 4,
    "top_k": 2,
    "moe_intermediate_size": 8,
    "score_func": "softmax",
    "norm_topk_prob": True,
}


def router_of(logits: list[list[float]], bias: list[float] | None = None, **config: Any) -> Any:
    """Route identity inputs, so that row t of ``logits`` [T, E] is what token t gets."""
    table = torch.tensor(logits, dtype=torch.float32)
    router = Router(
        len(logits), MoEConfig(**{**BASE, "num_experts": table.shape[1], "router_bias": bias is not None, **config})
    )
    router.weight.data = table.T.contiguous()
    if bias is not None:
        router.bias = torch.tensor(bias)
    return router(torch.eye(len(logits)))


def test_row_10_mixtral_renormalises_and_qwen2_moe_does_not() -> None:
    logits = [[math.log(4.0), math.log(3.0), math.log(2.0), math.log(1.0)]]
    normalised = router_of(logits)
    assert normalised.experts.tolist() == [[0, 1]]
    assert normalised.weights[0].tolist() == pytest.approx([4 / 7, 3 / 7])
    plain = router_of(logits, norm_topk_prob=False)
    assert plain.weights[0].tolist() == pytest.approx([0.4, 0.3])


def test_a_bias_of_the_logits_counts_in_choice_and_weight() -> None:
    config = MoEConfig(**{**BASE, "num_experts": 3, "router_logit_bias": True, "norm_topk_prob": True, "top_k": 2})
    router = BiasedRouter(1, config)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.0], [1.0], [2.0]]))
        router.logit_bias.copy_(torch.tensor([3.0, 0.0, 0.0]))
    out = router(torch.ones(1, 1))
    assert out.logits.tolist() == [[3.0, 1.0, 2.0]]
    assert out.experts.tolist() == [[0, 2]]
    torch.testing.assert_close(out.weights, torch.tensor([[3.0, 2.0]]).softmax(-1))


def test_row_05_deepseek_v2_groups_by_their_maximum() -> None:
    # Groups {0,1} {2,3} {4,5}: maxima 5, 4, 3 choose groups 0 and 1; sums of two would choose groups 1 and 2.
    logits = [[5.0, -9.0, 4.0, 3.9, 3.0, 2.9]]
    out = router_of(logits, num_groups=3, top_k_groups=2, top_k=3, norm_topk_prob=False, routed_scaling_factor=16.0)
    assert sorted(out.experts[0].tolist()) == [0, 2, 3]
    probs = torch.tensor(logits).softmax(-1)[0]
    expected = {e: 16.0 * probs[e].item() for e in (0, 2, 3)}
    assert dict(zip(out.experts[0].tolist(), out.weights[0].tolist(), strict=True)) == pytest.approx(expected)


def test_row_06_deepseek_v3_selects_with_the_bias_and_weighs_without() -> None:
    scores = [0.9, 0.1, 0.6, 0.5, 0.2, 0.3]
    logits = [[math.log(s / (1 - s)) for s in scores]]
    # s + b: 0.9, 0.1 | 0.6, 0.5 | 0.7, 0.8. Sums of two: 1.0, 1.1, 1.5 choose groups 2 and 1; maxima would choose 0.
    out = router_of(
        logits,
        bias=[0.0, 0.0, 0.0, 0.0, 0.5, 0.5],
        score_func="sigmoid",
        num_groups=3,
        top_k_groups=2,
        group_score="top2_sum",
        routed_scaling_factor=2.5,
    )
    assert out.experts.tolist() == [[5, 4]]
    assert out.weights[0].tolist() == pytest.approx([2.5 * 0.3 / 0.5, 2.5 * 0.2 / 0.5], rel=1e-5)


def test_row_06_a_negative_bias_never_lets_another_group_in() -> None:
    out = router_of(
        [[0.0] * 4], bias=[-5.0, -6.0, -7.0, -8.0], score_func="sigmoid", num_groups=2, top_k_groups=1, top_k=2
    )
    assert out.experts.tolist() == [[0, 1]]


def test_row_07_bias_moves_by_its_rate_towards_balance() -> None:
    bias = torch.tensor([0.0, 0.5, -0.5, 0.0])
    update_selection_bias(bias, torch.tensor([10, 2, 2, 2]), rate=0.25)
    assert bias.tolist() == [-0.25, 0.75, -0.25, 0.25]


def test_row_07_forward_leaves_the_bias_alone_and_it_has_no_gradient() -> None:
    router = Router(8, MoEConfig(**{**BASE, "score_func": "sigmoid", "router_bias": True}))
    torch.nn.init.normal_(router.weight)
    assert router.bias is not None
    router.bias += 0.25
    router.train()(torch.randn(16, 8)).weights.sum().backward()
    assert router.bias.tolist() == [0.25] * 4 and not router.bias.requires_grad
    assert router.weight.grad is not None and router.weight.grad.abs().sum() > 0


def test_row_07_casting_keeps_every_bit_of_the_bias() -> None:
    router = Router(8, MoEConfig(**{**BASE, "router_bias": True}))
    router.bias = torch.tensor([0.1001, 1.0002, -0.3003, 0.0])
    before = router.bias.clone()
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.bias, before)


def test_row_12_the_one_weight_of_top_1_carries_the_gradient_of_the_router() -> None:
    """Where it is not renormalised: so it is 1 whatever the logits are, and the config refuses that."""
    with pytest.raises(ValueError, match=r"moe.top_k = 1: with norm_topk_prob = true .* the router gets no gradient"):
        model_of(MoEConfig(**{**BASE, "top_k": 1}))
    for norm, moves in ((True, False), (False, True)):
        router = Router(8, MoEConfig(**{**BASE, "top_k": 1, "norm_topk_prob": norm}))
        torch.nn.init.normal_(router.weight)
        router(torch.randn(16, 8)).weights.sum().backward()
        assert router.weight.grad is not None
        assert (router.weight.grad.abs().max().item() > 1e-6) == moves


def model_of(moe: MoEConfig) -> ModelConfig:
    return dataclasses.replace(find_spec("mixtral-tiny").model, moe=moe)


@pytest.mark.parametrize("how", ["bf16 weights", "autocast"])
def test_row_13_routing_is_fp32(how: str) -> None:
    router = Router(64, MoEConfig(**{**BASE, "num_experts": 64}))
    torch.nn.init.normal_(router.weight)
    router.weight.data = router.weight.bfloat16().float()
    x = torch.randn(256, 64).bfloat16()
    expected = router(x.float())
    if how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = router(x)
    else:
        out = router.bfloat16()(x)
    assert out.logits.dtype == out.weights.dtype == torch.float32
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=0)
    assert torch.equal(out.experts, expected.experts)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    tokens=st.integers(1, 9),
    groups=st.sampled_from([1, 2, 4]),
    sigmoid=st.booleans(),
    norm=st.booleans(),
    data=st.data(),
)
def test_routing_properties(
    seed: int, tokens: int, groups: int, sigmoid: bool, norm: bool, data: st.DataObject
) -> None:
    chosen_groups = data.draw(st.integers(1, groups))
    config = MoEConfig(
        num_experts=8,
        top_k=2,
        moe_intermediate_size=4,
        score_func="sigmoid" if sigmoid else "softmax",
        norm_topk_prob=norm,
        num_groups=groups,
        top_k_groups=chosen_groups,
        routed_scaling_factor=1.5,
    )
    torch.manual_seed(seed)
    router = Router(6, config)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(tokens, 6)
    out = router(x)
    assert all(len(set(row)) == 2 for row in out.experts.tolist())
    assert all(len({e // (8 // groups) for e in row}) <= chosen_groups for row in out.experts.tolist())
    if norm:
        torch.testing.assert_close(out.weights.sum(-1), torch.full((tokens,), 1.5))
    else:
        torch.testing.assert_close(out.weights, 1.5 * out.scores.gather(-1, out.experts))
    order = torch.randperm(tokens)
    assert torch.equal(router(x[order]).experts, out.experts[order])


def test_limit_groups_masks_with_minus_infinity() -> None:
    limited = limit_groups(torch.tensor([[0.1, 0.2, 0.9, 0.0]]), 2, 1, "max")
    assert limited.tolist() == [[-math.inf, -math.inf, pytest.approx(0.9), 0.0]]
