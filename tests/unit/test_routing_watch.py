"""When routing counts as collapsed, and that a training says so once, with the remedy."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from zoo.inspect.inspection import moe_layers
from zoo.model import build
from zoo.training.fit import fit
from zoo.training.module import ZooModule
from zoo.training.routing_watch import CollapseDetector, remedy, spread
from zoo.weights import save_model


def counts(*shares: float, total: int = 1000) -> dict[int, Tensor]:
    """Of one layer, number 3."""
    return {3: (torch.tensor(shares) * total).long()}


def test_spread_is_1_where_load_is_uniform_and_0_where_k_experts_have_all() -> None:
    assert spread(torch.full((8,), 1 / 8), 2) == pytest.approx(1)
    assert spread(torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]), 2) == pytest.approx(0, abs=1e-6)
    assert spread(torch.tensor([0.25, 0.25, 0.25, 0.25, 0, 0, 0, 0]), 2) == pytest.approx(1 / 3)
    assert spread(torch.tensor([0.5, 0.5]), 2) == 1  # every token goes to all experts


def test_a_collapse_is_told_once_and_again_only_after_it_was_over() -> None:
    balanced, between = counts(0.25, 0.25, 0.25, 0.25), counts(0.55, 0.45, 0, 0)  # spread 1 and 0.33
    collapsed, nearly = counts(1, 0, 0, 0), counts(0.7, 0.3, 0, 0)  # spread 0 and 0.28
    detector = CollapseDetector(top_k=1)
    told = [detector.update(c) for c in (balanced, nearly, collapsed, nearly, collapsed, between, balanced, collapsed)]
    nothing: tuple[list[int], list[int]] = ([], [])
    assert told == [nothing, nothing, ([3], []), nothing, nothing, nothing, ([], [3]), ([3], [])]
    assert detector.collapsed == {3}


def test_layers_are_watched_each_on_its_own() -> None:
    detector = CollapseDetector(top_k=1)
    both = {1: torch.tensor([100, 0, 0, 0]), 2: torch.tensor([25, 25, 25, 25])}
    assert detector.update(both) == ([1], [])
    assert detector.update({1: both[2], 2: both[1]}) == ([2], [1])


def test_few_tokens_tell_nothing() -> None:
    assert CollapseDetector(top_k=1).update(counts(1, 0, 0, 0, total=60)) == ([], [])


def test_a_random_router_never_collapses() -> None:
    """The fewest tokens that count: 20 assignments an expert."""
    torch.manual_seed(0)
    detector = CollapseDetector(top_k=2)
    for _ in range(200):
        drawn = torch.rand(80, 8).topk(2).indices.flatten()
        assert detector.update({0: torch.bincount(drawn, minlength=8)}) == ([], [])


def test_the_remedy_names_the_key_that_is_set_and_its_value() -> None:
    assert remedy(ZooModule("mixtral-tiny")) == "set model.load_balance_coef to 0.01"
    assert remedy(ZooModule("deepseek-v3-tiny")).endswith("or model.bias_update_rate to 0.001")
    assert remedy(ZooModule("mixtral-tiny", load_balance_coef=0.02)).startswith("raise model.load_balance_coef = 0.02")
    assert remedy(ZooModule("deepseek-v3-tiny", bias_update_rate=0.01)).startswith(
        "raise model.bias_update_rate = 0.01"
    )


@pytest.fixture
def collapsed_checkpoint(fit_config: Path, tmp_path: Path) -> Path:
    """A model whose selection biases always choose the same experts."""
    module = ZooModule("deepseek-v3-tiny", yaml.safe_load(fit_config.read_text())["model"]["overrides"])
    model = build(module.spec.model)
    for layer in moe_layers(model):
        layer.router.bias[: module.spec.model.moe.top_k] = 10.0
    save_model(model, module.spec, tmp_path / "collapsed")
    return tmp_path / "collapsed"


def run(fit_config: Path, changes: dict[str, object], **trainer: object) -> None:
    config = yaml.safe_load(fit_config.read_text())
    config["model"] = {"optimizer": {"lr": 3.0e-3}, **changes}
    config["trainer"] |= trainer
    fit_config.write_text(yaml.safe_dump(config))
    assert fit(["--config", str(fit_config)]) == 0


def test_a_collapsing_training_is_warned_of_once_after_the_warm_up(
    fit_config: Path, collapsed_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"name": str(collapsed_checkpoint), "schedule": {"warmup_steps": 4}}
    run(fit_config, changes, max_steps=12, log_every_n_steps=2)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "routing" in line]
    assert warning.startswith("step 6: routing collapses in layer 1 (4.0 effective experts of 8, 4 dead); the usual")
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [row["router/collapsed_layers"] for row in rows] == ["0", "0", "1", "1", "1", "1"]
    assert {row["router/layer_1/dead_experts"] for row in rows} == {"4"}
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    (picture,) = events.Images("router/load")
    assert picture.step == 12 and picture.encoded_image_string.startswith(b"\x89PNG")


class Intervene(Callback):
    """Interrupts the first process at step 12; from step 18 on all tokens go to the one or the other half in turn."""

    interrupted = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: object) -> None:
        if trainer.global_step == 12 and not Intervene.interrupted:
            Intervene.interrupted = True
            raise KeyboardInterrupt
        if trainer.global_step >= 18:
            for layer in moe_layers(pl_module.model):
                layer.router.bias.copy_(layer.router.bias.flip(0))


def test_a_resumed_training_does_not_warn_again_but_of_the_recovery(
    fit_config: Path, collapsed_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = {"class_path": f"{Intervene.__module__}.Intervene"}
    Intervene.interrupted = False
    with pytest.raises(KeyboardInterrupt):
        run(fit_config, {"name": str(collapsed_checkpoint)}, callbacks=[callback], log_every_n_steps=2)
    assert "step 2: routing collapses in layer 1" in capsys.readouterr().err
    assert fit(["--config", str(fit_config)]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "routing" in line]
    assert line == "step 20: routing has recovered in layer 1 (8.0 effective experts of 8, 0 dead)"
