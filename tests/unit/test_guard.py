"""Steps whose loss or gradient is not finite, or far from those before: skipped, counted, and named."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from training_steps import BIASED, SMALL, batches, fit_steps, trainer_of

from zoo.model import build
from zoo.moe.router import Router, update_selection_bias
from zoo.moe.stats import expert_counts
from zoo.training.guard import SpikeConfig, robust_limit
from zoo.training.module import ZooModule
from zoo.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer


class Poison(Callback):
    """Makes the loss or a gradient of some optimizer steps, from 0, not finite."""

    def __init__(self, kind: str, steps: tuple[int, ...]) -> None:
        self.kind, self.steps = kind, steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def infinite(module: Any, args: Any, out: Tensor) -> Tensor:
            return out * (math.inf if self.kind == "loss" and trainer.global_step in self.steps else 1)

        pl_module.model.norm.register_forward_hook(infinite)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.kind == "gradient" and trainer.global_step in self.steps:
            pl_module.model.norm.weight.grad[3] = math.nan


def train_poisoned(module: ZooModule, kind: str, poisoned: tuple[int, ...], tmp_path: Path, steps: int = 6) -> None:
    fit_steps(module, steps, tmp_path, Poison(kind, poisoned), accumulate_grad_batches=2, gradient_clip_val=0.1)


def test_a_step_that_is_not_finite_names_the_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first whose output is not finite, or the first gradient, not those that follow from it."""
    drawn = []

    class Break(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            layers = pl_module.model.layers
            layers[1].ffn.router.register_forward_hook(lambda *_: drawn.append(torch.rand(1).item()))
            # In the second micro-batch of step 1 only.
            layers[0].mixer.o_proj.register_forward_hook(
                lambda m, args, out: out / (0 if trainer.global_step == 1 and args[0].shape[0] == 1 else 1)
            )

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 2:
                for name, parameter in pl_module.model.named_parameters():
                    if name.startswith(("embed", "layers.0")) or name == "layers.1.mixer_norm.weight":
                        parameter.grad[0] = math.nan

    data = batches(8)
    data[3] = {key: value[:1] for key, value in data[3].items()}
    module = ZooModule("mixtral-tiny", SMALL)
    trainer = trainer_of(tmp_path, Break(), max_steps=4, accumulate_grad_batches=2)
    trainer.fit(module, DataLoader(data, batch_size=None))
    assert capsys.readouterr().err.splitlines() == [
        "step 2 is skipped: training loss is not finite, first in the output of layers.0.mixer.o_proj",
        "step 3 is skipped: training gradient norm is not finite, first in the gradient of layers.1.mixer_norm.weight",
    ]
    # The second run of either micro-batch of step 2 gave the random numbers back that it drew.
    assert len(drawn) == 10
    assert len(set(drawn)) == 8


def test_loss_spikes_are_skipped_up_to_a_limit_also_after_a_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Spike(Callback):
        """Gradients of some steps, from 0, are a hundred times too large."""

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            for parameter in pl_module.parameters():
                if parameter.grad is not None and trainer.global_step in (1, 6, *range(9, 14)):
                    parameter.grad.mul_(100)

    skipped = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
            after = pl_module.model.norm.weight.detach().clone()
            skipped.append(bool(self.__dict__.get("before", after - 1).equal(after)))
            self.before = after

    def train(steps: int, checkpoint: Path | None = None) -> ZooModule:
        constant = ScheduleConfig(shape="wsd")
        spikes = SpikeConfig(threshold=20, window=5, max_in_a_row=3)
        module = ZooModule("mixtral-tiny", SMALL, spikes=spikes, schedule=constant)
        trainer = trainer_of(tmp_path, Spike(), Watch(), max_steps=steps)
        trainer.fit(module, DataLoader(batches(1) * 16, batch_size=None), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    # Step 1 is before the window is full; of five in a row the first three are skipped.
    module = train(16)
    assert [step for step, was in enumerate(skipped) if was] == [6, 9, 10, 11]
    assert (module.guard.skipped.total, module.guard.skipped.spikes) == (4, 4)
    assert module.step_metrics["train/skipped_spikes"].item() == 4
    assert re.fullmatch(r"step 7 is skipped: gradient norm \S+ is above \S+", capsys.readouterr().err.splitlines()[0])

    train(11)
    again = train(16, tmp_path / "11.ckpt")
    assert again.guard.skipped == module.guard.skipped
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_robust_limit_by_hand() -> None:
    # Median 3; distances 2, 1, 0, 1, 97, of median 1.
    assert robust_limit((1.0, 2.0, 3.0, 4.0, 100.0), 2.0) == pytest.approx(3 + 2 * 1.4826)
    assert robust_limit((5.0, 5.0, 5.0), 10.0) == pytest.approx(5.5)
    for field, value in {"threshold": 0.0, "window": 2, "max_in_a_row": 0}.items():
        with pytest.raises(ValueError, match=f"spikes.{field} = {value}"):
            SpikeConfig(**{field: value})


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing_but_the_schedule_and_the_data(kind: str, tmp_path: Path) -> None:
    schedule = ScheduleConfig(warmup_steps=3)
    module = ZooModule("deepseek-v3-tiny", BIASED, bias_update_rate=0.01, seed=1, schedule=schedule)
    train_poisoned(module, kind, (0, 3), tmp_path)
    assert (module.guard.skipped.total, module.guard.skipped.in_a_row) == (2, 0)
    assert module.step_metrics["train/skipped_steps"].item() == 2

    model = build(module.spec.model, seed=1)
    adamw, lr = build_optimizer(model, OptimizerConfig(), schedule, 6)
    routers = [m for m in model.modules() if isinstance(m, Router)]
    data = batches(12)
    for step in range(6):
        outputs = [(b, model(b["input_ids"], document_ids=b["document_ids"])) for b in data[2 * step : 2 * step + 2]]
        labels = sum((b["labels"] != -100).sum() for b, _ in outputs)
        nlls = (F.cross_entropy(out.logits.mT, b["labels"], reduction="sum") for b, out in outputs)
        (sum(nlls) / labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if step not in (0, 3):
            adamw.step()
            for i, router in enumerate(routers):
                counts = sum(expert_counts(out.router_outputs[i], b["document_ids"] >= 0) for b, out in outputs)
                update_selection_bias(router.bias, counts, 0.01)
        adamw.zero_grad()
        lr.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    patient = ZooModule("mixtral-tiny", SMALL, max_skipped_steps=2)
    train_poisoned(patient, "gradient", (0, 1, 3, 4), tmp_path)
    assert patient.guard.skipped.total == 4
    module = ZooModule("mixtral-tiny", SMALL, max_skipped_steps=2)
    with pytest.raises(ValueError, match="training loss = nan at step 4, after 2 skipped steps in a row"):
        train_poisoned(module, "loss", (1, 2, 3), tmp_path)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
