"""The grouped matrix products of CUDA against the readable loop in fp64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zoo.model import build
from zoo.moe.clamped import clamped_grouped, clamped_loop
from zoo.moe.experts import experts_grouped, experts_loop
from zoo.moe.layer import MoE
from zoo.registry import find_spec

pytestmark = pytest.mark.gpu

HALF = 2.0**-8
"""Distance of two neighbours in bf16, relative to the number."""


def forward_and_gradients(way: Callable[..., Tensor], rows: Tensor, counts: Tensor, *weights: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (rows, *weights)]
    out = way(leaves[0], counts, *leaves[1:])
    return [out, *torch.autograd.grad(out.square().sum() / 2, leaves)]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


COUNTS = [[300, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0], [128, 256, 0, 64] * 8, [7] * 64]


@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: f"{len(counts)}x{max(counts)}")
@pytest.mark.parametrize("sizes", [(64, 24), (256, 128), (512, 896)], ids=str)
def test_grouped_products_equal_the_loop(counts: list[int], sizes: tuple[int, int]) -> None:
    """Each result is a sum of products of bf16 numbers in fp32: it is as good as its rounding."""
    hidden, ffn = sizes
    gate_up = torch.randn(len(counts), 2, ffn, hidden, device="cuda", dtype=torch.bfloat16) / hidden**0.5
    down = torch.randn(len(counts), hidden, ffn, device="cuda", dtype=torch.bfloat16) / ffn**0.5
    rows = torch.randn(sum(counts), hidden, device="cuda", dtype=torch.bfloat16)
    on_device = torch.tensor(counts, device="cuda")
    got = forward_and_gradients(experts_grouped, rows, on_device, gate_up, down)
    want = forward_and_gradients(experts_loop, rows.double(), on_device, gate_up.double(), down.double())
    for ours, exact in zip(got, want, strict=True):
        assert ours.shape == exact.shape
        if exact.numel() and exact.any():
            assert relative(ours, exact) < 3 * HALF
        else:
            assert not ours.any()


def test_grouped_products_of_clamped_experts_equal_the_loop() -> None:
    """Small integers and halves make every pre-activation exact, so that rounding moves none over the limit."""
    counts = [40, 0, 7, 93]
    gate_up, down, rows = (
        torch.randint(-1, 2, shape, device="cuda").bfloat16()
        for shape in ((4, 2, 48, 64), (4, 64, 48), (sum(counts), 64))
    )
    biases = torch.full((4, 2, 48), 0.5, device="cuda").bfloat16(), torch.randn(4, 64, device="cuda").bfloat16()
    on_device = torch.tensor(counts, device="cuda")

    def limited(way: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: way(*args, 5.0)

    weights = (gate_up, down, *biases)
    got = forward_and_gradients(limited(clamped_grouped), rows, on_device, *weights)
    want = forward_and_gradients(limited(clamped_loop), rows.double(), on_device, *(w.double() for w in weights))
    for ours, exact in zip(got, want, strict=True):
        assert relative(ours, exact) < 4 * HALF


def moe_layer(hidden_size: int, ffn: int) -> MoE:
    tiny = find_spec("mixtral-tiny").model
    assert tiny.moe is not None
    moe = dataclasses.replace(tiny.moe, moe_intermediate_size=ffn)
    config = dataclasses.replace(tiny, hidden_size=hidden_size, num_layers=1, vocab_size=64, moe=moe)
    (layer,) = [module for module in build(config, device="cuda").modules() if isinstance(module, MoE)]
    return layer


@pytest.mark.parametrize("sizes", [(64, 24), (64, 20), (60, 24)], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["bf16", "autocast"])
def test_a_layer_in_half_precision_is_near_the_exact_one(sizes: tuple[int, int], mixed: bool) -> None:
    """Also where sizes are not the multiples of 16 bytes that CUDA's grouped products want."""
    layer = moe_layer(*sizes)
    for parameter in layer.parameters():
        parameter.data = parameter.data.mul_(5).bfloat16().float()
    x = torch.randn(2, 30, sizes[0], device="cuda").bfloat16()
    exact, routing = layer.double()(x.double())
    layer = layer.float() if mixed else layer.bfloat16()
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        out, ours = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(ours.experts, routing.experts)
    assert relative(out, exact) < 5 * HALF
    out.float().square().sum().backward()
    for parameter in layer.parameters():
        assert (
            parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.dtype == parameter.dtype
        )


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16", "autocast"])
def test_half_precision_asks_the_device_nothing(mixed: bool) -> None:
    """No step of the layer waits for a number from the GPU."""
    layer = moe_layer(64, 24)
    layer = layer if mixed else layer.bfloat16()
    x = torch.randn(2, 30, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        layer(x)[0].sum().backward()  # what is compiled or tuned at first use may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
