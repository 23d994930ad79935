"""What is measured of a training, read from what it wrote down."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TypeVar

T = TypeVar("T")

MEASURES = {
    "validation_loss": "validation loss at the end, nats a token",
    "least_validation_loss": "least validation loss along the way, nats a token",
    "validation_loss_rise": "validation loss at the end above its least, nats a token",
    "training_loss": "language-model loss over the last quarter, nats a token",
    "spikes": "logged steps with a loss more than half a nat above the median of the ten before",
    "skipped_steps": "steps left out because loss or gradient was not finite",
    "load_entropy": "entropy of expert load over the last quarter, 1 = uniform, mean over layers",
    "busiest_load": "load of the busiest expert over the mean, last quarter, mean over layers",
    "dead_experts": "share of experts with less than a tenth of the mean load, last quarter",
    "dropped_fraction": "share of assignments that no expert had room for, last quarter",
    "router_z": "mean of logsumexp² of the router's logits over the last quarter",
    "step_seconds": "seconds of an optimizer step",
    "memory": "bytes at the peak of a training step: weights, gradients, optimizer state and activations",
    "trainable_parameters": "parameters that are trained",
}
"""Name → what it is, with its unit."""

PROBE_FILE = "probe.json"
"""What ``zoo.claims.probe`` writes into a run directory."""

DEAD = 0.1
SPIKE = 0.5
_BEFORE = 10


def measure(run_directory: Path) -> dict[str, float]:
    """Those of ``MEASURES`` that a finished run of ``zoo fit`` with a ``Probe`` has.

    Raises:
        ValueError: it wrote nothing down: it had fewer steps than lie between two lines.
    """
    with (run_directory / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses, validation = _column(rows, "train/lm_loss"), _column(rows, "val/loss")
    if not losses or not validation:
        raise ValueError(
            f"{run_directory}: it logged {len(losses)} training and {len(validation)} validation losses; lower "
            "trainer.log_every_n_steps and trainer.val_check_interval"
        )
    found = {
        "validation_loss": validation[-1],
        "least_validation_loss": min(validation),
        "validation_loss_rise": validation[-1] - min(validation),
        "training_loss": fmean(_last_quarter(losses)),
        "spikes": float(spikes(losses)),
        "skipped_steps": _column(rows, "train/skipped_steps")[-1],
        **json.loads((run_directory / PROBE_FILE).read_text(encoding="utf-8")),
    }
    for name, column in (("router_z", "train/z_loss"), ("dropped_fraction", "train/dropped_fraction")):
        if values := _column(rows, column):
            found[name] = fmean(_last_quarter(values))
    if entropy := _of_layers(rows, "entropy"):
        found["load_entropy"] = fmean(entropy)
        found["busiest_load"] = fmean(_of_layers(rows, "max_over_mean"))
        found["dead_experts"] = dead_experts(run_directory / "expert_load.jsonl")
    return found


def spikes(losses: Sequence[float]) -> int:
    """How many of ``losses``, in order, are more than half a nat above the median of the ten before them."""
    return sum(
        loss > median(losses[max(0, i - _BEFORE) : i]) + SPIKE for i, loss in enumerate(losses) if i >= _BEFORE // 2
    )


def dead_experts(file: Path) -> float:
    """Share of experts, over layers, whose load in the last quarter of the lines is below a tenth of the mean."""
    lines = [json.loads(line)["layers"] for line in file.read_text(encoding="utf-8").splitlines()]
    dead = []
    for layer in lines[0]:
        loads = [line[layer] for line in _last_quarter(lines)]
        means = [fmean(values) for values in zip(*loads, strict=True)]
        dead += [load * len(means) < DEAD for load in means]
    return fmean(dead)


def _of_layers(rows: Sequence[dict[str, str]], kind: str) -> list[float]:
    names = [name for name in rows[0] if name.startswith("router/") and name.endswith(f"/{kind}")]
    return [fmean(_last_quarter(_column(rows, name))) for name in names]


def _column(rows: Sequence[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]


def _last_quarter(values: Sequence[T]) -> Sequence[T]:
    return values[-max(1, len(values) // 4) :]
