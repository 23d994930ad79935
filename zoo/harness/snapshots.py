"""Weights kept along the way of a training, with the time it took to get there."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from zoo.config import CONFIG_FILE
from zoo.files import write_text
from zoo.parallel import weights as parallel_weights
from zoo.training.module import ZooModule
from zoo.weights import save_model

SNAPSHOTS = "snapshots"
"""Folder of a run directory that holds them."""


def snapshot_directory(run_directory: Path, step: int) -> Path:
    """Where the weights after optimizer step ``step`` are."""
    return run_directory / SNAPSHOTS / f"step-{step:08d}"


def seconds_file(run_directory: Path, step: int) -> Path:
    """Where the time is that the optimizer steps up to ``step`` took."""
    return snapshot_directory(run_directory, step).with_suffix(".json")


class Snapshots(Callback):
    """Saves the weights after given optimizer steps, and how long the steps until then took.

    Only the steps themselves count: neither start-up nor validation nor saving, and what was repeated after a stop
    counts once.

    Args:
        steps: Optimizer steps after which to save; of the last, whose weights ``zoo fit`` saves, only the time is kept.

    Raises:
        ValueError: no step, or one below 1.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        if not steps or min(steps) < 1:
            raise ValueError(f"steps = {list(steps)}: give optimizer steps from 1 on")
        self.steps = sorted(steps)
        self._seconds = 0.0
        self._began = 0.0
        self._last_step = 0

    def state_dict(self) -> dict[str, Any]:
        """The time so far."""
        return {"seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the time of a stopped run."""
        self._seconds = state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps taken before this process are saved already."""
        self._last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock, and save at the end of an optimizer step that is due."""
        self._seconds += time.perf_counter() - self._began
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        run = Path(trainer.default_root_dir)
        if step not in self.steps or (snapshot_directory(run, step) / CONFIG_FILE).exists():
            return
        if trainer.is_global_zero:
            (run / SNAPSHOTS).mkdir(exist_ok=True)
            write_text(seconds_file(run, step), json.dumps({"seconds": self._seconds}) + "\n")
        if step != self.steps[-1]:
            assert isinstance(pl_module, ZooModule) and pl_module.model is not None
            save = save_model if pl_module.parallel is None else parallel_weights.save_model
            save(pl_module.model, pl_module.spec, snapshot_directory(run, step))
