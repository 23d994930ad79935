"""Bounded capacity: what is dropped, against a loop over tokens; shapes that do not depend on the routing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from layouts import LAYOUTS, MODELS, Layout, make_parallel, whole
from pool import Pools
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from zoo.model import build
from zoo.moe.dispatch import LocalDispatcher
from zoo.moe.router import RouterOutput
from zoo.parallel.apply import ParallelOptions
from zoo.parallel.capacity import places


class DroppingDispatcher(LocalDispatcher):
    """The reference on one process: the weights of dropped assignments are 0, found by walking from left to right."""

    def __init__(self, factor: float, shares: int) -> None:
        self.factor, self.shares, self.dropped = factor, shares, 0

    def dispatch(self, x: Tensor, routing: RouterOutput) -> tuple[Tensor, Tensor, Any]:
        tokens, top_k = routing.experts.shape
        num_experts, share = routing.scores.shape[-1], -(-tokens // self.shares)
        capacity = math.ceil(top_k * share * self.factor / num_experts)
        kept = torch.zeros_like(routing.weights)
        for start in range(0, tokens, share):
            taken = [0] * num_experts
            for t in range(start, min(start + share, tokens)):
                for k, expert in enumerate(routing.experts[t].tolist()):
                    taken[expert] += 1
                    kept[t, k] = taken[expert] <= capacity
        self.dropped += int((kept == 0).sum())
        return super().dispatch(
            x, RouterOutput(routing.logits, routing.scores, routing.weights * kept, routing.experts)
        )


def even_batch(model: torch.nn.Module, data_rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(data_rank)
    return torch.randint(model.config.vocab_size, (2, 9), generator=generator)


def gradients_alone(name: str, layout: Layout, factor: float) -> tuple[dict[str, np.ndarray], int]:
    model = build(MODELS[name], seed=3, dtype=torch.float64)
    dispatcher = DroppingDispatcher(factor, layout.tensor)
    for block in model.layers:
        if hasattr(block.ffn, "dispatcher"):
            block.ffn.dispatcher = dispatcher
    for rank in range(layout.data):
        model(even_batch(model, rank)).logits.square().sum().backward()
    return {key: whole(p.grad) for key, p in model.named_parameters()}, dispatcher.dropped


def gradients(name: str, layout: Layout, factor: float) -> dict[str, np.ndarray]:
    model, meshes = make_parallel(name, layout, options=ParallelOptions(capacity_factor=factor))
    model(even_batch(model, meshes.data.get_local_rank())).logits.square().sum().backward()
    return {key: whole(p.grad) for key, p in model.named_parameters()}


@pytest.mark.parametrize("factor", [0.5, 8.0])
@pytest.mark.parametrize("layout", ["ep2", "fsdp2_ep2", "tp2_ep2"])
@pytest.mark.parametrize("model", ["mixtral", "deepseek-v3"])
def test_tokens_are_dropped_from_left_to_right(pools: Pools, model: str, layout: str, factor: float) -> None:
    expected, dropped = gradients_alone(model, LAYOUTS[layout], factor)
    assert (dropped > 0) == (factor < 1)
    for result in pools[LAYOUTS[layout].world].run(gradients, model, LAYOUTS[layout], factor):
        for name, values in expected.items():
            np.testing.assert_allclose(result[name], values, rtol=1e-9, atol=1e-9, err_msg=name)


def test_places_count_equal_values_to_the_left() -> None:
    assert places(torch.tensor([2, 0, 2, 2, 1, 0]), 3).tolist() == [0, 0, 1, 2, 0, 1]


def exchanged(layout: Layout) -> list[int]:
    """Collective calls and bytes of one forward pass, for two routings."""
    model, meshes = make_parallel("mixtral", layout, options=ParallelOptions(capacity_factor=1.0))
    result = []
    for bias in (0.0, -100.0):
        model.layers[0].ffn.router.bias[4:] = bias
        traffic = model.layers[0].ffn.dispatcher.traffic
        traffic.reset()
        with torch.no_grad(), CommDebugMode() as comm:
            model(even_batch(model, meshes.data.get_local_rank()))
        result += [traffic.sent, comm.get_total_counts()]
    return result


def test_the_exchange_does_not_depend_on_the_routing(pools: Pools) -> None:
    for sent, calls, sent_again, calls_again in pools[2].run(exchanged, LAYOUTS["ep2"]):
        assert (sent, calls) == (sent_again, calls_again)
        capacity = math.ceil(2 * 18 / 8)
        assert sent == 2 * 4 * capacity * 16 * 8  # both ways, 4 experts elsewhere, D = 16 of fp64


def factor_error(layout: Layout, factor: float) -> str:
    with pytest.raises(ValueError) as caught:
        make_parallel("mixtral", layout, options=ParallelOptions(capacity_factor=factor))
    return str(caught.value)


def test_a_factor_that_makes_no_sense_is_refused(pools: Pools) -> None:
    assert "capacity_factor = 0.0" in pools[2].run(factor_error, LAYOUTS["ep2"], 0.0)[0]
    assert "nothing is exchanged" in pools[2].run(factor_error, LAYOUTS["fsdp2"], 1.0)[0]
