"""Balance losses and statistics by hand; rows 1 to 4 and 8 of the correctness table."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.moe.balance import load_balance_loss, z_loss
from zoo.moe.router import RouterOutput
from zoo.moe.stats import expert_counts, expert_load, load_entropy, max_over_mean


def routed(logits: Tensor, top_k: int, sigmoid: bool = False) -> RouterOutput:
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    weights, experts = scores.topk(top_k)
    return RouterOutput(logits, scores, weights, experts)


def test_row_1_z_loss_by_hand_without_padding() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [50.0, 50.0]])
    mask = torch.tensor([[True, True, False]])
    expected = (math.log(2.0) ** 2 + math.log(4.0) ** 2) / 2
    assert z_loss([routed(logits, 1)], mask).item() == pytest.approx(expected)


def test_row_1_z_loss_gradient_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(z_loss([routed(logits, 1)]), logits)
    expected = 2 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (8, 3)])
def test_row_2_balanced_routing_costs_exactly_one(experts: int, top_k: int) -> None:
    # Token t prefers experts t, t + 1, …: every expert is chosen equally often, and mean scores are uniform.
    base = torch.linspace(3, -3, experts)
    logits = torch.stack([base.roll(t) for t in range(experts)])
    assert load_balance_loss([routed(logits, top_k)]).item() == pytest.approx(1.0, abs=1e-6)


def test_row_2_collapsed_routing_costs_the_number_of_experts() -> None:
    logits = torch.tensor([[100.0, 0.0, 0.0, 0.0]]).repeat(5, 1)
    assert load_balance_loss([routed(logits, 1)]).item() == pytest.approx(4.0)


def test_row_2_layers_are_averaged_and_never_pooled() -> None:
    # Two layers collapsed on different experts: pooled they would look balanced.
    first = routed(torch.tensor([[100.0, 0.0]]).repeat(3, 1), 1)
    second = routed(torch.tensor([[0.0, 100.0]]).repeat(3, 1), 1)
    assert load_balance_loss([first, second]).item() == pytest.approx(2.0)


def test_row_2_by_hand_with_padding() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.98, 0.01, 0.01]])
    out = routed(probs.log(), 2)
    mask = torch.tensor([[True, True, False]])
    # f = [1, 2, 1] / 4; P = [0.4, 0.4, 0.2].
    assert load_balance_loss([out], mask).item() == pytest.approx(3 * (0.25 * 0.4 + 0.5 * 0.4 + 0.25 * 0.2))


def test_row_3_sequence_and_micro_batch_are_different_losses() -> None:
    logits = torch.tensor([[100.0, 0.0]] * 2 + [[0.0, 100.0]] * 2)
    out = routed(logits, 1)
    assert load_balance_loss([out], scope="micro_batch", batch_size=2).item() == pytest.approx(1.0)
    assert load_balance_loss([out], scope="sequence", batch_size=2).item() == pytest.approx(2.0)


def test_row_3_sequence_scope_does_not_depend_on_the_micro_batch_split() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4 * 6, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 6) > 0.2
    mask[:, 0] = True
    whole = load_balance_loss([routed(logits, 2)], mask, scope="sequence")
    (expected,) = torch.autograd.grad(whole, logits)
    for split in (2, 4):
        parts = [
            load_balance_loss([routed(part, 2)], m, scope="sequence") / split
            for part, m in zip(logits.chunk(split), mask.chunk(split), strict=True)
        ]
        (grad,) = torch.autograd.grad(torch.stack(parts).sum(), logits)
        torch.testing.assert_close(grad, expected)


def test_row_3_with_the_counts_of_the_whole_batch_the_split_does_not_matter() -> None:
    logits = torch.randn(12, 4)
    whole = load_balance_loss([routed(logits, 2)])
    counts = [expert_counts(routed(logits, 2))]
    parts = [(load_balance_loss([routed(part, 2)], counts=counts), len(part)) for part in logits.split([3, 7, 2])]
    torch.testing.assert_close(sum(loss * tokens for loss, tokens in parts) / 12, whole)
    with pytest.raises(ValueError, match="'sequence'"):
        load_balance_loss([routed(logits, 2)], scope="sequence", counts=counts)


def test_row_3_a_sequence_of_padding_does_not_count() -> None:
    out = routed(torch.tensor([[100.0, 0.0]] * 4), 1)
    mask = torch.tensor([[True, True], [False, False]])
    assert load_balance_loss([out], mask, scope="sequence").item() == pytest.approx(2.0)
    assert load_balance_loss([out], torch.zeros(2, 2, dtype=torch.bool)).isfinite()


def test_row_4_gradient_goes_through_p_and_not_through_f() -> None:
    torch.manual_seed(2)
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    out = routed(logits, 1)
    (grad,) = torch.autograd.grad(load_balance_loss([out]), logits)
    f = torch.bincount(out.experts.flatten(), minlength=3).double() / 6
    p = logits.softmax(-1)
    # d/dz of E Σ f_i mean_t p_ti = E/T · p_tj (f_j − Σ_i f_i p_ti)
    expected = 3 / 6 * p * (f - (p * f).sum(-1, keepdim=True))
    torch.testing.assert_close(grad, expected)


def test_row_8_sigmoid_scores_are_normalised_over_all_experts() -> None:
    scores = torch.tensor([[0.8, 0.4, 0.2, 0.2]])
    out = routed(torch.logit(scores), 2, sigmoid=True)
    # P = [.5, .25, .125, .125] over all four, and not [2/3, 1/3] over the two chosen; f = [1/2, 1/2, 0, 0].
    loss = load_balance_loss([out], scope="sequence", batch_size=1)
    assert loss.item() == pytest.approx(4 * (0.5 * 0.5 + 0.5 * 0.25), rel=1e-5)


def test_a_dense_model_has_nothing_to_balance() -> None:
    for loss in (load_balance_loss, z_loss):
        with pytest.raises(ValueError, match="no MoE layer"):
            loss([])


def test_statistics_by_hand() -> None:
    out = routed(torch.tensor([[3.0, 2.0, 0.0, -1.0], [3.0, 0.0, 2.0, -1.0], [0.0, 0.0, 0.0, 9.0]]), 2)
    counts = expert_counts(out, torch.tensor([[True, True, False]]))
    assert counts.tolist() == [2, 1, 1, 0]
    load = expert_load(counts)
    assert load.tolist() == [0.5, 0.25, 0.25, 0.0]
    assert load_entropy(load).item() == pytest.approx(1.5 * math.log(2) / math.log(4))
    assert max_over_mean(load).item() == 2.0
    assert load_entropy(torch.full((2, 8), 1 / 8)).tolist() == pytest.approx([1.0, 1.0])
    assert load_entropy(torch.tensor([1.0])).item() == 1.0
