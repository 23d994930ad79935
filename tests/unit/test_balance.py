"""Balance losses and statistics by hand, and their properties; rows 1 to 4, 8 and 9 of the correctness table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.moe.balance import communication_balance_loss, device_balance_loss, load_balance_loss, sent_tokens, z_loss
from zoo.moe.router import RouterOutput
from zoo.moe.stats import expert_counts, expert_load, load_entropy, max_over_mean


def routed(logits: Tensor, top_k: int, sigmoid: bool = False) -> RouterOutput:
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    weights, experts = scores.topk(top_k)
    return RouterOutput(logits, scores, weights, experts)


def test_row_01_z_loss_by_hand_without_padding() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [50.0, 50.0]])
    mask = torch.tensor([[True, True, False]])
    expected = (math.log(2.0) ** 2 + math.log(4.0) ** 2) / 2
    assert z_loss([routed(logits, 1)], mask).item() == pytest.approx(expected)


def test_row_01_z_loss_gradient_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(z_loss([routed(logits, 1)]), logits)
    expected = 2 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (8, 3)])
def test_row_02_balanced_routing_costs_exactly_one(experts: int, top_k: int) -> None:
    # Token t prefers experts t, t + 1, …: every expert is chosen equally often, and mean scores are uniform.
    base = torch.linspace(3, -3, experts)
    logits = torch.stack([base.roll(t) for t in range(experts)])
    assert load_balance_loss([routed(logits, top_k)]).item() == pytest.approx(1.0, abs=1e-6)


def test_row_02_collapsed_routing_costs_the_number_of_experts() -> None:
    logits = torch.tensor([[100.0, 0.0, 0.0, 0.0]]).repeat(5, 1)
    assert load_balance_loss([routed(logits, 1)]).item() == pytest.approx(4.0)


def test_row_02_layers_are_averaged_and_never_pooled() -> None:
    # Two layers collapsed on different experts: pooled they would look balanced.
    first = routed(torch.tensor([[100.0, 0.0]]).repeat(3, 1), 1)
    second = routed(torch.tensor([[0.0, 100.0]]).repeat(3, 1), 1)
    assert load_balance_loss([first, second]).item() == pytest.approx(2.0)


def test_row_02_load_is_what_the_router_chose_whether_or_not_it_had_room() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    chosen = torch.tensor([[True, True], [True, False]])
    out = replace(routed(probs.log(), 2), chosen=chosen, kept=torch.tensor([[True, False], [False, False]]))
    assert expert_counts(out).tolist() == [1, 2, 0]
    assert sent_tokens(out, 3).tolist() == [1, 2, 0]
    # f = [1, 2, 0] / 3; P = [0.4, 0.4, 0.2].
    assert load_balance_loss([out]).item() == pytest.approx(3 * (0.4 + 2 * 0.4) / 3)


def test_row_02_by_hand_with_padding() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.98, 0.01, 0.01]])
    out = routed(probs.log(), 2)
    mask = torch.tensor([[True, True, False]])
    # f = [1, 2, 1] / 4; P = [0.4, 0.4, 0.2].
    assert load_balance_loss([out], mask).item() == pytest.approx(3 * (0.25 * 0.4 + 0.5 * 0.4 + 0.25 * 0.2))


def test_row_03_sequence_and_micro_batch_are_different_losses() -> None:
    logits = torch.tensor([[100.0, 0.0]] * 2 + [[0.0, 100.0]] * 2)
    out = routed(logits, 1)
    assert load_balance_loss([out], scope="micro_batch", batch_size=2).item() == pytest.approx(1.0)
    assert load_balance_loss([out], scope="sequence", batch_size=2).item() == pytest.approx(2.0)


def test_row_03_sequence_scope_does_not_depend_on_the_micro_batch_split() -> None:
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


Loss = Callable[..., Tensor]


def whole_batch_losses(logits: Tensor, mask: Tensor, split: int) -> list[Tensor]:
    """Every loss whose load is taken over the whole batch, in ``split`` micro-batches weighted with their tokens."""
    whole = routed(logits, 2)
    counts, tokens = [expert_counts(whole, mask)], mask.sum()
    sent = [sent_tokens(whole, 3, mask) / tokens]
    totals = [logits.new_zeros(()) for _ in range(4)]
    for part, m in zip(logits.chunk(split), mask.chunk(split), strict=True):
        out = [routed(part, 2)]
        losses = (
            load_balance_loss(out, m, counts=counts),
            device_balance_loss(out, 3, m, counts=counts),
            communication_balance_loss(out, 3, 2, m, sent=sent),
            z_loss(out, m),
        )
        totals = [total + loss * m.sum() / tokens for total, loss in zip(totals, losses, strict=True)]
    return totals


def test_row_03_over_the_whole_batch_splits_1_2_and_4_have_one_gradient() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4 * 6, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 6) > 0.3
    out = [routed(logits, 2)]
    at_once = (
        load_balance_loss(out, mask),
        device_balance_loss(out, 3, mask),
        communication_balance_loss(out, 3, 2, mask),
        z_loss(out, mask),
    )
    for split in (1, 2, 4):
        for loss, expected in zip(whole_batch_losses(logits, mask, split), at_once, strict=True):
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(
                torch.autograd.grad(loss, logits, retain_graph=True),
                torch.autograd.grad(expected, logits, retain_graph=True),
            )


def test_row_03_counts_of_a_larger_batch_are_for_the_scope_of_a_batch() -> None:
    out = routed(torch.randn(12, 4), 2)
    with pytest.raises(ValueError, match="'sequence'"):
        load_balance_loss([out], scope="sequence", counts=[expert_counts(out)])


def test_row_03_a_sequence_of_padding_does_not_count() -> None:
    out = routed(torch.tensor([[100.0, 0.0]] * 4), 1)
    mask = torch.tensor([[True, True], [False, False]])
    assert load_balance_loss([out], mask, scope="sequence").item() == pytest.approx(2.0)
    assert load_balance_loss([out], torch.zeros(2, 2, dtype=torch.bool)).isfinite()


def test_row_04_gradient_goes_through_p_and_not_through_f() -> None:
    torch.manual_seed(2)
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    out = routed(logits, 1)
    (grad,) = torch.autograd.grad(load_balance_loss([out]), logits)
    f = torch.bincount(out.experts.flatten(), minlength=3).double() / 6
    p = logits.softmax(-1)
    # d/dz of E Σ f_i mean_t p_ti = E/T · p_tj (f_j − Σ_i f_i p_ti)
    expected = 3 / 6 * p * (f - (p * f).sum(-1, keepdim=True))
    torch.testing.assert_close(grad, expected)


def test_row_08_sigmoid_scores_are_normalised_over_all_experts() -> None:
    scores = torch.tensor([[0.8, 0.4, 0.2, 0.2]])
    out = routed(torch.logit(scores), 2, sigmoid=True)
    # P = [.5, .25, .125, .125] over all four, and not [2/3, 1/3] over the two chosen; f = [1/2, 1/2, 0, 0].
    loss = load_balance_loss([out], scope="sequence", batch_size=1)
    assert loss.item() == pytest.approx(4 * (0.5 * 0.5 + 0.5 * 0.25), rel=1e-5)


def test_row_09_device_loss_is_of_mean_loads_and_summed_scores() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]])
    out = routed(probs.log(), 1)
    # f = 4 · [2/3, 0, 0, 1/3]; f' = [4/3, 2/3]. P = [1, .6, .8, .6] / 3; P' = [1.6, 1.4] / 3.
    assert device_balance_loss([out], 2).item() == pytest.approx((4 * 1.6 + 2 * 1.4) / 9)


def test_row_09_communication_loss_counts_a_token_once_a_device() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.3, 0.2], [0.4, 0.35, 0.05, 0.2]])
    out = routed(probs.log(), 2)
    # Tokens 0 and 2 choose experts 0 and 1, both on device 0; token 1 chooses 0 and 2, one on either device.
    assert sent_tokens(out, 2).tolist() == [3, 1]
    # f'' = D/(M T) · [3, 1] = [1, 1/3]; P' = [1.95, 1.05] / 3.
    loss = communication_balance_loss([out], 2, 2)
    assert loss.item() == pytest.approx((1.95 + 1.05 / 3) / 3)
    # Over each row of two tokens, the last of which is padding: f'' = [1, 1/2] and [1, 0].
    out = routed(torch.cat((probs, probs[:1])).log(), 2)
    mask = torch.tensor([[True, True], [True, False]])
    rows = ((1.2 + 0.5 * 0.8) / 2, 0.75)
    assert communication_balance_loss([out], 2, 2, mask, "sequence").item() == pytest.approx(sum(rows) / 2)
    assert sent_tokens(out, 2, mask).tolist() == [3, 1]


def test_row_09_both_losses_are_one_when_balanced() -> None:
    # Token t chooses experts t and t + 3 of 6, which are on two of three devices.
    base = torch.tensor([3.0, 0.0, 0.0, 3.0, 0.0, 0.0])
    out = routed(torch.stack([base.roll(t) for t in range(6)]), 2)
    assert device_balance_loss([out], 3).item() == pytest.approx(1.0)
    assert communication_balance_loss([out], 3, 2).item() == pytest.approx(1.0)


LOSSES: dict[str, Loss] = {
    "load_balance": load_balance_loss,
    "load_balance_sequence": lambda out: load_balance_loss(out, scope="sequence", batch_size=2),
    "load_balance_counts": lambda out: load_balance_loss(out, counts=[torch.arange(6)]),
    "device": lambda out: device_balance_loss(out, 3),
    "communication": lambda out: communication_balance_loss(out, 3, 2),
    "z": z_loss,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_gradients_in_double_precision(name: str, sigmoid: bool) -> None:
    logits = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name]([routed(x, 2, sigmoid)]), logits)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), top_k=st.integers(1, 6), sigmoid=st.booleans())
def test_order_of_tokens_and_names_of_experts_do_not_matter(seed: int, top_k: int, sigmoid: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    tokens, experts = torch.randperm(8, generator=generator), torch.randperm(6, generator=generator)
    # Experts trade places within a device, and devices among each other.
    within = torch.arange(6).view(3, 2)[torch.randperm(3, generator=generator)].flip(1).flatten()
    out, shuffled, renamed, regrouped = (
        [routed(x, top_k, sigmoid)] for x in (logits, logits[tokens], logits[:, experts], logits[:, within])
    )
    for loss in (load_balance_loss, z_loss):
        torch.testing.assert_close(loss(renamed), loss(out))
    for name in ("load_balance", "device", "communication", "z"):
        torch.testing.assert_close(LOSSES[name](shuffled), LOSSES[name](out))
        torch.testing.assert_close(LOSSES[name](regrouped), LOSSES[name](out))
    # With an expert a device, V2's first loss is Switch's, and so is its second where tokens go to all M = K of them.
    torch.testing.assert_close(device_balance_loss(out, 6), load_balance_loss(out))
    torch.testing.assert_close(communication_balance_loss(out, 6, top_k), load_balance_loss(out))


def test_a_dense_model_has_nothing_to_balance() -> None:
    for loss in (load_balance_loss, z_loss, LOSSES["device"], LOSSES["communication"]):
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
