"""Optimizer groups and learning-rate schedules."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from zoo.model import build
from zoo.registry import find_spec
from zoo.training.muon import hidden_matrices
from zoo.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer, lr_factor, parameter_groups


def factors(schedule: ScheduleConfig, total: int) -> list[float]:
    return [lr_factor(schedule, step, total) for step in range(total)]


def test_cosine_by_hand() -> None:
    quarter, three_quarters = (1 + math.sqrt(0.5)) / 2, (1 - math.sqrt(0.5)) / 2
    expected = [0.5, 1.0, 1.0, 0.1 + 0.9 * quarter, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * three_quarters]
    assert factors(ScheduleConfig(warmup_steps=2, min_ratio=0.1), 6) == pytest.approx(expected)


def test_warmup_stable_decay_by_hand() -> None:
    schedule = ScheduleConfig(shape="wsd", warmup_steps=2, decay_steps=4, min_ratio=0.2)
    assert factors(schedule, 9) == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])


def test_without_decay_the_plateau_lasts() -> None:
    assert factors(ScheduleConfig(shape="wsd", warmup_steps=1), 5) == [1.0] * 5


@given(
    shape=st.sampled_from(["cosine", "wsd"]),
    total=st.integers(1, 60),
    warmup=st.integers(0, 60),
    decay=st.integers(0, 60),
    minimum=st.floats(0, 1),
)
def test_rises_to_the_peak_then_falls_and_never_leaves_its_range(
    shape: str, total: int, warmup: int, decay: int, minimum: float
) -> None:
    decay = decay if shape == "wsd" else 0
    schedule = ScheduleConfig(shape=shape, warmup_steps=warmup, decay_steps=decay, min_ratio=minimum)  # type: ignore[arg-type]
    if warmup + decay > total:
        with pytest.raises(ValueError, match=rf"= {warmup + decay}: the run has only {total} "):
            lr_factor(schedule, 0, total)
        return
    values = [*factors(schedule, total), lr_factor(schedule, total, total)]
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert max(values) == 1.0 or warmup == 0
    assert min(values[warmup:]) >= minimum - 1e-12


class Mixed(nn.Module):
    """Every kind of parameter, one frozen and one shared."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.norm = nn.LayerNorm(2)
        self.experts = nn.Parameter(torch.zeros(3, 2, 2))
        self.head = nn.Linear(2, 4)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_groups_hold_every_trainable_parameter_once_and_decay_matrices_only() -> None:
    model = Mixed()
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == ["experts", "embed.weight"]
    assert [names[id(p)] for p in plain["params"]] == ["norm.weight", "norm.bias", "head.bias"]


def test_the_schedule_drives_the_optimizer() -> None:
    adamw, schedule = build_optimizer(
        Mixed(), OptimizerConfig(lr=2.0), ScheduleConfig(warmup_steps=2, min_ratio=0.0), total_steps=4
    )
    used = []
    for _ in range(4):
        used.append([group["lr"] for group in adamw.param_groups])
        adamw.step()
        schedule.step()
    assert used == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0], [1.0, 1.0]]


def test_muon_is_torchs_on_every_matrix_of_the_blocks_and_adamw_the_rest() -> None:
    spec = find_spec("qwen2-moe-tiny").model
    moe = dataclasses.replace(spec.moe, num_experts=3, top_k=2, moe_intermediate_size=8)
    attention = dataclasses.replace(spec.attention, num_heads=2, num_kv_heads=1, head_dim=8)
    config = dataclasses.replace(
        spec, vocab_size=20, num_layers=1, hidden_size=16, intermediate_size=24, moe=moe, attention=attention
    )
    model, twin = build(config, seed=1), build(config, seed=1)
    muon = {name for name, p in model.named_parameters() if any(p is q for q in hidden_matrices(model))}
    kinds = {name.split(".", 2)[-1] for name in muon}
    assert {"mixer.q_proj.weight", "ffn.experts.gate_up", "ffn.experts.down"} < kinds
    rest = {name for name, _ in model.named_parameters()} - muon
    assert {"embed_tokens.weight", "lm_head.weight", "layers.0.ffn.router.weight", "layers.0.mixer_norm.weight"} < rest
    assert "layers.0.ffn.shared_expert_gate.weight" in rest

    settings = OptimizerConfig(name="muon", lr=0.01, weight_decay=0.2, momentum=0.9)
    optimizer, _ = build_optimizer(model, settings, ScheduleConfig(shape="wsd"), 10)
    # The same by torch: each matrix of a stack is a parameter of its own, which shares memory with the stack.
    slices = {
        name: [nn.Parameter(m) for m in p.detach().view(-1, *p.shape[-2:])]
        for name, p in twin.named_parameters()
        if name in muon
    }
    of_rest = [p for name, p in twin.named_parameters() if name in rest]
    others = [{"params": [p], "weight_decay": 0.2 if p.ndim > 1 else 0.0} for p in of_rest]
    theirs = [
        torch.optim.Muon(
            [m for stack in slices.values() for m in stack],
            lr=0.01,
            weight_decay=0.2,
            momentum=0.9,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True),
    ]
    for _ in range(3):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            for matrix, gradient in zip(slices.get(name, []), p.grad.view(-1, *p.shape[-2:]), strict=False):
                matrix.grad = gradient.clone()
        for name, p in twin.named_parameters():
            p.grad = model.get_parameter(name).grad.clone() if name in rest else None
        for one in (optimizer, *theirs):
            one.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-6, atol=1e-7, msg=name)

    # Its state survives a save, and a parameter without a gradient stays.
    again, _ = build_optimizer(twin, settings, ScheduleConfig(shape="wsd"), 10)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, p in model.named_parameters():
        gradient = None if name.endswith("down") else torch.randn_like(p)
        p.grad = gradient
        twin.get_parameter(name).grad = gradient
    before = model.layers[0].ffn.experts.down.clone()
    optimizer.step()
    again.step()
    assert torch.equal(model.layers[0].ffn.experts.down, before)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-6, atol=1e-7, msg=name)


def test_muon_refuses_matrices_in_parts() -> None:
    model = build(find_spec("mixtral-tiny").model)
    down = model.layers[0].ffn.experts.down
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        model.layers[0].ffn.experts.down = nn.Parameter(DTensor.from_local(down.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"optimizer\.name = muon: it needs whole matrices"):
            build_optimizer(model, OptimizerConfig(name="muon"), ScheduleConfig(), 10)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(momentum=1.0), "optimizer.momentum = 1.0"),
        (lambda: OptimizerConfig(lr=-1.0), "optimizer.lr = -1.0"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), r"optimizer.betas = \(0.9, 1.0\)"),
        (lambda: ScheduleConfig(warmup_steps=-1), "schedule.warmup_steps = -1"),
        (lambda: ScheduleConfig(min_ratio=2.0), "schedule.min_ratio = 2.0"),
        (lambda: ScheduleConfig(decay_steps=5), "schedule.decay_steps = 5: the cosine"),
    ],
)
def test_impossible_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
