"""What a run writes down: metrics as CSV and for TensorBoard, expert load as JSON lines.

Every file continues over a stop and a resume: lines of steps after the checkpoint are dropped, because those steps are
taken again. A line's ``step`` is the number of optimizer steps taken.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from torch import Tensor

from zoo.files import write_text
from zoo.moe.stats import dead_experts, expert_load, load_entropy, max_over_mean
from zoo.training.module import ZooModule

METRICS_FILE = ExperimentWriter.NAME_METRICS_FILE
LOAD_FILE = "expert_load.jsonl"


def build_loggers(run: Path, step: int) -> list[CSVLogger | TensorBoardLogger]:
    """CSV and TensorBoard loggers of a run that goes on after optimizer step ``step``; 0 starts it."""
    return [
        ContinuedCSVLogger(run, step),
        TensorBoardLogger(run, name="tensorboard", version="", default_hp_metric=False, purge_step=step + 1),
    ]


class ContinuedCSVLogger(CSVLogger):
    """Lightning's CSV logger, except that it keeps the rows up to ``step`` that an earlier process wrote."""

    def __init__(self, run: Path, step: int) -> None:
        super().__init__(run, name="", version="", flush_logs_every_n_steps=1)
        self._step = step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of ``metrics.csv``, made on first use."""
        writer = self._experiment
        if not isinstance(writer, ExperimentWriter):
            writer = self._experiment = _ContinuedWriter(self.log_dir, self._step)
        return writer


class _ContinuedWriter(ExperimentWriter):
    """Never rewrites the file in place, so that a kill loses no row."""

    def __init__(self, log_dir: str, step: int) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if path.exists():
            rows = [row for row in _read_rows(path) if int(row["step"]) <= step]
            self.metrics_keys = sorted({"step"}.union(*rows))
            _write_rows(path, self.metrics_keys, rows)

    def _check_log_dir_exists(self) -> None:
        """Lightning's would delete the file."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        rows = _read_rows(path)
        _write_rows(path, fieldnames, rows)


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Complete rows; a last one that a kill cut short is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and (row["step"] or "").isdigit()]


def _write_rows(path: Path, fieldnames: list[str], rows: list[dict[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=fieldnames)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


class MetricsLog(Callback):
    """Hands the metrics of ``ZooModule`` to the loggers as soon as a step or a validation is over.

    Lightning's own ``self.log`` reaches the disk after the checkpoint of the same step was saved; a kill between the
    two would lose the row for good. Callbacks run before checkpoints, so here no saved step lacks its row.

    Args:
        every_n_steps: Optimizer steps between two rows.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps taken before this process are logged already."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log if this micro-batch was the last of an optimizer step that is due."""
        assert isinstance(pl_module, ZooModule)
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if trainer.global_step % self.every_n_steps == 0:
            log_metrics(trainer, {name: value.item() for name, value in pl_module.step_metrics.items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log validation loss and perplexity."""
        assert isinstance(pl_module, ZooModule)
        if not trainer.sanity_checking:
            log_metrics(trainer, {name: value.item() for name, value in pl_module.val_metrics.items()})


class ExpertLoad(Callback):
    """How the tokens of a logging interval were spread over the experts of every MoE layer.

    Entropy (1 = uniform), the busiest expert's load over the mean and the number of dead experts (where there are
    enough tokens to tell) join the module's metrics, which ``MetricsLog`` after it writes; the load of every expert, as
    fractions that sum to 1 a layer, goes to ``expert_load.jsonl``:
    ``{"step": 100, "layers": {"1": [0.12, …], …}}``.

    Args:
        every_n_steps: Optimizer steps in an interval.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.interval_counts: dict[int, Tensor] = {}
        """Assignments to each expert by layer in the last interval, after its last step; empty after other steps."""
        self._counts: Tensor | None = None
        self._last_step = 0

    def state_dict(self) -> dict[str, Any]:
        """The counts of the interval that is under way."""
        return {"counts": self._counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the interval where the checkpoint left it."""
        self._counts = state_dict["counts"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop lines of steps that will be taken again."""
        self._last_step = trainer.global_step
        path = Path(trainer.default_root_dir, LOAD_FILE)
        if trainer.is_global_zero and path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= self._last_step]
            write_text(path, "".join(f"{line}\n" for line in kept))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the counts of a finished optimizer step; write them out at the end of a logging interval."""
        assert isinstance(pl_module, ZooModule)
        config = pl_module.spec.model
        if config.moe is None or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.interval_counts = {}
        counts = pl_module.step_expert_counts
        self._counts = counts if self._counts is None else self._counts.to(counts.device) + counts
        if trainer.global_step % self.every_n_steps == 0:
            number = config.num_layers + (config.mtp_depth if pl_module.mtp_coef else 0)
            layers = [i for i in range(number) if config.is_moe_layer(i)]
            self.interval_counts = dict(zip(layers, self._counts.cpu(), strict=True))
            self._counts = None
            loads = {layer: expert_load(counts) for layer, counts in self.interval_counts.items()}
            for layer, load in loads.items():
                pl_module.step_metrics[f"router/layer_{layer}/entropy"] = load_entropy(load)
                pl_module.step_metrics[f"router/layer_{layer}/max_over_mean"] = max_over_mean(load)
                dead = dead_experts(self.interval_counts[layer])
                if dead is not None:
                    pl_module.step_metrics[f"router/layer_{layer}/dead_experts"] = torch.tensor(len(dead))
            if trainer.is_global_zero:
                line = {"step": trainer.global_step, "layers": {str(i): load.tolist() for i, load in loads.items()}}
                with Path(trainer.default_root_dir, LOAD_FILE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def log_metrics(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Write ``metrics`` of the current optimizer step to every logger, to the disk."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
        logger.save()


def _step(line: str) -> float:
    """Step of a JSON line, or infinity where a kill cut it short."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")
