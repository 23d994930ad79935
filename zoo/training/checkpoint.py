"""Training checkpoints that a crash, a kill or a full disk cannot damage."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from zoo.files import replacing
from zoo.parallel.checkpoint import load_alone, remove, unwritable
from zoo.parallel.strategy import MoEParallelStrategy
from zoo.parallel.supervise import REQUEUE

CHECKPOINTS = "checkpoints"
"""Folder of a run directory that holds its training checkpoints."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs to disk, then renames: a checkpoint is there in full or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            OSError: the disk is full or not writable; nothing at ``path`` was touched.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch's zip writer reports a failed write as a RuntimeError of its own.
            raise unwritable(path, error) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A checkpoint of one process, or of several, put together."""
        return load_alone(Path(path)) if Path(path).is_dir() else super().load_checkpoint(path, *args, **kwargs)


class Checkpoint(ModelCheckpoint):
    """Saves the whole state of training every so many optimizer steps and keeps the newest.

    On SIGTERM or SIGUSR1 to any process of the run it saves at the end of the step and ends all of them with the exit
    code ``REQUEUE``: schedulers send these before they take a machine away.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
        keep: How many to keep; older ones are removed once a newer one is written.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 1) -> None:
        for field, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"checkpoint.{field} = {value}: give 1 or more")
        super().__init__(
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            save_top_k=-1,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._last_step = 0
        self._deferred = False
        self._saving = False
        self._told_to_stop = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the checkpoints into the run directory."""
        self.dirpath = str(Path(trainer.default_root_dir, CHECKPOINTS).absolute())
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps taken before this process are saved already. Signals are caught from here on."""
        self._last_step = trainer.global_step
        # In place of Lightning's handlers, which communicate inside the handler. Lightning puts the old ones back.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: Any) -> None:
        self._told_to_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the end of an optimizer step that is due, never between its micro-batches."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        # Saved before a validation of the same step, the run would not repeat it if it were killed meanwhile.
        self._deferred = _validation_follows(trainer)
        if not self._deferred:
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waited for the validation."""
        if self._deferred:
            self._deferred = False
            self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the checkpoint that is being written."""
        super().on_train_end(trainer, pl_module)
        self._finish(trainer, wait=True)

    def _save_if_due(self, trainer: Trainer) -> None:
        due = trainer.global_step % self.every_n_steps == 0
        stop = trainer.strategy.reduce_boolean_decision(self._told_to_stop, all=False)
        if due or stop:
            trainer.save_checkpoint(self.format_checkpoint_name({"step": torch.tensor(trainer.global_step)}))
            self._saving = True
        self._finish(trainer, wait=stop)
        if stop:
            if trainer.is_global_zero:
                print(f"told to stop: saved step {trainer.global_step}; the same command goes on", file=sys.stderr)
            raise SystemExit(REQUEUE)

    def _finish(self, trainer: Trainer, *, wait: bool) -> None:
        """Remove older checkpoints once the newest stands.

        Raises:
            OSError: on every rank, where one could not write it.
        """
        strategy = trainer.strategy
        if not self._saving or (isinstance(strategy, MoEParallelStrategy) and not strategy.saved(wait=wait)):
            return
        self._saving = False
        if trainer.is_global_zero:
            for old in list_checkpoints(Path(trainer.default_root_dir))[: -self.keep]:
                remove(old)


def _validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates right after the micro-batch that has just ended."""
    batches = trainer.num_val_batches
    available = sum(batches) if isinstance(batches, list) else batches
    interval = trainer.val_check_batch
    if not available or not interval:
        return False
    return (trainer.fit_loop.total_batch_idx + 1) % interval == 0


def list_checkpoints(run: Path) -> list[Path]:
    """Complete training checkpoints of a run directory, oldest first."""
    return sorted((run / CHECKPOINTS).glob("step-*.ckpt"))


class RandomState(Callback):
    """Keeps torch's random generators in the checkpoint, so that a resumed run draws what the stopped one would have.

    They are put back as the first batch starts: setting up the loaders draws from them.
    """

    def __init__(self) -> None:
        self._restore: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """States as byte tensors."""
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the states for the first batch."""
        self._restore = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the states back, once."""
        if self._restore is not None:
            torch.set_rng_state(self._restore["cpu"].cpu())
            torch.cuda.set_rng_state_all([s.cpu() for s in self._restore["cuda"][: torch.cuda.device_count()]])
            self._restore = None
