"""The exponential average of the weights, over a training and over its stops; Muon stops and goes on with it."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file

from zoo.training.data import TokenDataModule
from zoo.training.fit import fit
from zoo.training.module import ZooModule

RESULTS = ("metrics.csv", "final/model.safetensors")
AVERAGED = ("--model.ema_decay", "0.8", "--model.optimizer.name", "muon", "--checkpoint.keep", "9")


def test_the_average_by_hand_and_the_last_selection_bias(token_data: Path, tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
            seen.append({name: value.clone() for name, value in pl_module.model.state_dict().items()})

    module = ZooModule("deepseek-v3-tiny", {"vocab_size": 300, "num_layers": 2}, bias_update_rate=0.01, ema_decay=0.8)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        callbacks=[Watch()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, TokenDataModule(token_data, sequence_length=16, batch_size=2))
    for name, value in module.model.state_dict().items():
        expected = seen[0][name]
        for weights in seen[1:]:
            expected = weights[name] if name.endswith("router.bias") else 0.8 * expected + 0.2 * weights[name]
        torch.testing.assert_close(value, expected, msg=name)


def test_a_stopped_run_goes_on_with_its_average_which_is_what_it_validates_and_leaves(
    fit_config: Path, token_data: Path, tmp_path: Path
) -> None:
    argv = ["--config", str(fit_config), *AVERAGED, "--checkpoint.every_n_steps", "12"]
    assert fit(argv) == 0
    run = tmp_path / "run"
    before = {name: (run / name).read_bytes() for name in RESULTS}
    last = torch.load(run / "checkpoints" / "step-00000024.ckpt", weights_only=True)
    final = load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(last["state_dict"][f"model.{name}"], value) for name, value in final.items())
    assert not all(torch.equal(last["current_model_state"][f"model.{name}"], value) for name, value in final.items())
    with (run / "metrics.csv").open(newline="") as file:
        validated = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    module = ZooModule(str(run / "final"))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.validate(module, TokenDataModule(token_data, 48, 4), verbose=False)
    assert validated[-1] == pytest.approx(module.val_metrics["val/loss"].item(), rel=1e-6)

    # Stopped before the model was written, then in the middle.
    for step in (24, 12):
        shutil.rmtree(run / "final")
        for checkpoint in (run / "checkpoints").iterdir():
            if checkpoint.stem > f"step-{step:08d}":
                checkpoint.unlink()
        assert fit(argv) == 0
        assert {name: (run / name).read_bytes() for name in RESULTS} == before, step


def test_an_average_that_cannot_be_is_refused(fit_config: Path) -> None:
    with pytest.raises(ValueError, match=r"model.ema_decay = 1.0: give a number between 0 and 1"):
        ZooModule("mixtral-tiny", ema_decay=1.0)
    argv = ["--config", str(fit_config), *AVERAGED]
    with pytest.raises(ValueError, match=r"set trainer.precision to bf16-mixed"):
        fit([*argv, "--trainer.precision", "bf16-true"])
    with pytest.raises(ValueError, match="weights are averaged on one device only"):
        fit([*argv, "--trainer.strategy", "ddp", "--model.optimizer.name", "adamw"])
