"""A callback that measures a training's time and memory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from zoo.bench.memory import Peak
from zoo.claims.measures import PROBE_FILE
from zoo.files import write_text
from zoo.training.module import ZooModule

MEMORY_STEP = 2
"""Number, from 0, of the step whose memory is measured: the optimizer has its state by then."""


class Probe(Callback):
    """Writes ``probe.json`` into the run directory: seconds of a step (median), peak memory, trained parameters.

    A run that is stopped and resumed has the median of its last part; the step whose memory is measured, which is a
    slow one, does not count.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._memory: int | None = None
        self._peak: Peak | None = None
        self._began = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {"memory": self._memory}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what an earlier process measured."""
        self._memory = state_dict["memory"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, or in one step the count of memory."""
        if self._memory is None and self._peak is None and trainer.global_step >= MEMORY_STEP:
            for optimizer in trainer.optimizers:
                optimizer.zero_grad()  # gradients of the step before would be freed while those of this one are counted
            self._peak = Peak(pl_module.device)
            self._peak.__enter__()
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop them."""
        seconds = time.perf_counter() - self._began
        if self._peak is None:
            self._seconds.append(seconds)
        elif trainer.global_step > MEMORY_STEP:
            self._peak.__exit__(None, None, None)
            self._memory, self._peak = self._peak.bytes + _held(trainer), None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        assert isinstance(pl_module, ZooModule)
        steps = trainer.accumulate_grad_batches
        found = {
            "step_seconds": median(self._seconds) * steps if self._seconds else 0.0,
            "memory": float(self._memory or 0),
            "trainable_parameters": float(sum(p.numel() for p in pl_module.parameters() if p.requires_grad)),
        }
        if trainer.is_global_zero:
            write_text(Path(trainer.default_root_dir, PROBE_FILE), json.dumps(found) + "\n")


def _held(trainer: Trainer) -> int:
    """Bytes of weights and optimizer state, which are there all the time; gradients come and go within a step."""
    weights = sum(p.nbytes for p in trainer.lightning_module.parameters())
    states = (value for o in trainer.optimizers for state in o.state.values() for value in state.values())
    return weights + sum(value.nbytes for value in states if isinstance(value, Tensor))
