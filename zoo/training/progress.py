"""The progress of a run: a live bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from zoo.training.module import ZooModule

REFRESH_SECONDS = 0.5
LINE_SECONDS = 20.0


class TrainingProgress(ProgressBar):
    """Optimizer steps, loss, tokens per second and the time left, on standard error.

    Speed and time left are those of this process so far, without the time that validation took.
    """

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._enabled = True
        self._text = ""
        self._tokens = 0
        self._steps = 0
        self._seconds = 0.0
        self._resumed = 0.0
        self._shown = 0.0
        self._last_step = 0

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and the bar where there is a terminal."""
        self._last_step = trainer.global_step
        self._resumed = self._shown = time.monotonic()
        if self._enabled and self._console.is_interactive:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, transient=False)
            self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the micro-batch, and show the step if it is time to."""
        assert isinstance(pl_module, ZooModule)
        place = trainer.distributed_sampler_kwargs
        self._tokens += batch["input_ids"].numel() * (place["num_replicas"] if place else 1)
        if trainer.global_step == self._last_step:
            return
        self._steps += 1
        self._last_step = trainer.global_step
        now = time.monotonic()
        self._seconds += now - self._resumed
        self._resumed = now
        last = trainer.global_step == trainer.max_steps
        if last or now - self._shown >= (REFRESH_SECONDS if self._bar else LINE_SECONDS):
            self._show(trainer, pl_module)
            self._shown = now

    def _show(self, trainer: Trainer, pl_module: ZooModule) -> None:
        if not self._enabled:
            return
        left = timedelta(seconds=round(self._seconds / self._steps * (trainer.max_steps - trainer.global_step)))
        loss = pl_module.step_metrics["train/loss"].item()
        text = f"loss {loss:.4f}  {self._tokens / self._seconds:,.0f} tokens/s  {left} left"
        if self._bar:
            self._text = text
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, description=text)
        else:
            self._print(f"step {trainer.global_step}/{trainer.max_steps}  {text}")

    def _print(self, line: str) -> None:
        # One line whatever the width: it may be read by a program.
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what takes the time."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description="validating")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation loss and start the clock again."""
        self._resumed = time.monotonic()
        assert isinstance(pl_module, ZooModule)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=self._text)
        if self._enabled and not trainer.sanity_checking:
            loss, perplexity = (pl_module.val_metrics[f"val/{name}"].item() for name in ("loss", "perplexity"))
            step = f"step {trainer.global_step}/{trainer.max_steps}"
            self._print(f"{step}  validation loss {loss:.4f}  perplexity {perplexity:.2f}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the finished bar on the screen."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back before the error is printed."""
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
