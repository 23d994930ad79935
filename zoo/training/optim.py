"""AdamW, Muon beside it, and the learning-rate schedules, which are pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zoo.model import Decoder
from zoo.training.muon import MuonAdamW, hidden_matrices


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101); the defaults are those of GPT-3 and most MoE papers.

    Attributes:
        name: ``muon`` updates the matrices inside the blocks, those of every expert by themselves, with Muon
            (arXiv 2502.16982), and embeddings, head, routers and vectors with AdamW; on one device.
        lr: Peak learning rate; the schedule multiplies it with a factor in [0, 1].
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of matrices; norms, biases and other vectors are never decayed.
        momentum: Of Muon.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optimizer.lr", self.lr, "give a positive number such as 3e-4")
        _require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "give two numbers in [0, 1)")
        _require(self.eps > 0, "optimizer.eps", self.eps, "give a positive number such as 1e-8")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "give 0 or more")
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "give a number in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine or a plateau with a linear decay at the end.

    Attributes:
        shape: ``cosine`` (arXiv 1608.03983) or ``wsd``: warm-up, stable, decay (arXiv 2404.06395).
        warmup_steps: Optimizer steps until the peak.
        decay_steps: Last optimizer steps over which ``wsd`` decays; 0 keeps the peak to the end.
        min_ratio: Where the decay ends, as a fraction of the peak.
    """

    shape: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "give 0 or more steps")
        _require(self.decay_steps >= 0, "schedule.decay_steps", self.decay_steps, "give 0 or more steps")
        _require(0 <= self.min_ratio <= 1, "schedule.min_ratio", self.min_ratio, "give a fraction between 0 and 1")
        _require(
            self.shape == "wsd" or self.decay_steps == 0,
            "schedule.decay_steps",
            self.decay_steps,
            "the cosine decays over all steps after the warm-up; set it to 0 or use shape: wsd",
        )


def lr_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Fraction of the peak learning rate that update number ``step`` (from 0) of ``total_steps`` uses.

    The last warm-up step uses the peak itself; the decay would reach ``min_ratio`` one step after the last, so that
    no step is spent on it where it is 0.

    Raises:
        ValueError: warm-up and decay together are longer than the run.
    """
    busy = schedule.warmup_steps + schedule.decay_steps
    if busy > total_steps:
        raise ValueError(
            f"schedule.warmup_steps + schedule.decay_steps = {busy}: the run has only {total_steps} optimizer steps; "
            "shorten them or raise trainer.max_steps"
        )
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    decay_steps = schedule.decay_steps if schedule.shape == "wsd" else total_steps - schedule.warmup_steps
    done = step - (total_steps - decay_steps)
    if done <= 0:
        return 1.0
    progress = min(done / decay_steps, 1.0) if decay_steps else 0.0
    falling = (1 + math.cos(math.pi * progress)) / 2 if schedule.shape == "cosine" else 1 - progress
    return schedule.min_ratio + (1 - schedule.min_ratio) * falling


def parameter_groups(
    model: nn.Module, weight_decay: float, without: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Every trainable parameter but ``without`` once: matrices (two dimensions or more) decayed, vectors not."""
    left_out = {id(parameter) for parameter in without}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in left_out]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, optimizer: OptimizerConfig, schedule: ScheduleConfig, total_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The optimizer of ``model`` and its schedule, to be stepped once an optimizer step.

    Raises:
        ValueError: warm-up and decay together are longer than ``total_steps``, or Muon of matrices in parts.
    """
    settings: dict[str, Any] = {"lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps, "fused": True}
    if optimizer.name == "muon":
        assert isinstance(model, Decoder)
        matrices = hidden_matrices(model)
        if any(isinstance(matrix, DTensor) for matrix in matrices):
            raise ValueError(
                "model.optimizer.name = muon: it needs whole matrices, and the model is spread over processes; use "
                "adamw, or one device"
            )
        others = parameter_groups(model, optimizer.weight_decay, matrices)
        decay, momentum = optimizer.weight_decay, optimizer.momentum
        adamw: torch.optim.AdamW = MuonAdamW(matrices, others, momentum=momentum, weight_decay=decay, **settings)
    else:
        adamw = torch.optim.AdamW(parameter_groups(model, optimizer.weight_decay), **settings)
    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: lr_factor(schedule, step, total_steps))


def _require(holds: bool, field: str, value: Any, fix: str) -> None:
    if not holds:
        raise ValueError(f"{field} = {value}: {fix}")
