"""Every routing of a paper: equations, symmetries, causality and gradients of whole MoE layers."""

from __future__ import annotations

import pytest
import torch
from routed_layers import NAMES, D, E, layer_of, layout_of, small
from torch import Tensor

from zoo.moe.experts import experts_loop
from zoo.moe.layer import MoE
from zoo.moe.router import RouterOutput
from zoo.moe.selection import capacity
from zoo.moe.ungated import relu_loop


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
