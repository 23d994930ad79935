"""Optimizer groups and learning-rate schedules."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

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


@pytest.mark.parametrize(
    ("make", "message"),
    [
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
