"""What experts in blocks take at their peak, against the sum of what is needed at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from zoo.bench.memory import peak_bytes
from zoo.layers.linear import libraries, product, products_by
from zoo.moe.blocked import mix_blocked
from zoo.moe.router import RouterOutput

T, E, D, FFN = 512, 4, 256, 512
ROWS = T // E
"""Of each expert, with one expert a token."""
ROUTING = 2**16
"""Bytes; more than the order of the tokens takes."""


@pytest.fixture(autouse=True, params=libraries())
def library(request: pytest.FixtureRequest) -> Iterator[None]:
    with products_by(request.param):
        yield


@pytest.fixture(params=[ROWS, T], ids=["one expert a block", "all in one"])
def block_rows(request: pytest.FixtureRequest) -> int:
    rows: int = request.param
    return rows


def layer() -> tuple[Tensor, RouterOutput, Tensor, Tensor]:
    experts = torch.arange(T).remainder(E).unsqueeze(1)
    weights = torch.rand(T, 1, requires_grad=True)
    x, gate_up, down = (torch.randn(s, requires_grad=True) for s in ((T, D), (E, 2, FFN, D), (E, D, FFN)))
    return x, RouterOutput(weights, weights, weights, experts), gate_up, down


def beside(rows: int, inputs: int, outputs: int, transposed: bool = False) -> int:
    """Numbers that a product takes beside what is there: oneDNN has scratch space, and may lay out factors."""
    shapes = ((inputs, rows), (inputs, outputs)) if transposed else ((rows, inputs), (outputs, inputs))
    x, weight = (torch.randn(shape).t() if transposed else torch.randn(shape) for shape in shapes)
    out = torch.empty(rows, outputs)
    product(x, weight, out)
    return peak_bytes(lambda: product(x, weight, out)) // 4


def test_forward_takes_one_block(block_rows: int) -> None:
    arguments = layer()
    with torch.no_grad():
        mix_blocked(*arguments, block_rows=block_rows)
        peak = peak_bytes(lambda: mix_blocked(*arguments, block_rows=block_rows))
    block = block_rows * (D + FFN + 2 * FFN)  # rows, inner activations, pre-activations
    scratch = max(beside(ROWS, D, 2 * FFN), beside(ROWS, FFN, D))
    assert peak <= 4 * (T * D + block + scratch) + ROUTING


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
def test_a_step_takes_gradients_one_block_and_the_pre_activations(block_rows: int, keep: bool) -> None:
    x, routing, gate_up, down = layer()
    gradient = torch.randn(T, D)

    def step() -> None:
        out = mix_blocked(x, routing, gate_up, down, block_rows=block_rows, keep=keep)
        torch.autograd.grad(out, (x, routing.weights, gate_up, down), gradient)

    step()
    peak = peak_bytes(step)
    gradients = T * D + gate_up.numel() + down.numel()
    kept = T * 2 * FFN if keep else 0
    # Rows, pre-activations where they are computed again, their gradients, those of the inner activations.
    block = block_rows * (D + (0 if keep else 2 * FFN) + 2 * FFN + FFN)
    # Then the products that are summed to the gradients of weights, or one of these gradients.
    largest = max(block_rows * FFN, beside(2 * FFN, ROWS, D, transposed=True))
    assert peak <= 4 * (T * D + gradients + kept + block + largest) + ROUTING
