"""Noise, jitter, temperature and dropout of routing by hand and by their equations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from routed_layers import FFN, D, E, routing_block

from zoo.config_routing import TemperatureConfig
from zoo.moe.experts import DropoutExperts, Experts
from zoo.moe.exploration import Jitter, NoisyLogits, Temperature, set_step
from zoo.moe.routers import make_router


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
