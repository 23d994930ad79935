"""``zoo fit --find``: a learning rate or a batch size to begin with, by Lightning's Tuner; nothing is trained."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.tuner import Tuner

from zoo.files import replacing
from zoo.parallel.strategy import MoEParallelStrategy
from zoo.training.data import TokenDataModule
from zoo.training.module import ZooModule

LR_RANGE = (1e-6, 1.0)
LR_STEPS = 100
SMOOTHING = 0.98
"""Of the Tuner's losses."""
LARGEST_BATCH = 8192
CURVE_FILE = "lr_finder.png"
ASIDE = ".find"
"""Folder of the run directory, removed in the end."""


def find(
    what: Literal["lr", "batch_size"], trainer: Trainer, module: ZooModule, data: TokenDataModule, run: Path
) -> str:
    """What was found, for people. The ``ASIDE`` in ``run``, where ``trainer`` keeps what it comes back to, is removed.

    Raises:
        ValueError: several devices, or nothing was found.
    """
    if isinstance(trainer.strategy, MoEParallelStrategy):
        raise ValueError(f"--find {what}: it needs trainer.strategy = auto and one device")
    try:
        return find_lr(trainer, module, data, run) if what == "lr" else find_batch_size(trainer, module, data)
    finally:
        shutil.rmtree(run / ASIDE, ignore_errors=True)


def find_lr(trainer: Trainer, module: ZooModule, data: TokenDataModule, run: Path) -> str:
    """Train up to 100 steps with a learning rate that grows from 1e-6 to 1; the curve goes to ``lr_finder.png``.

    Returns:
        What was found, for people: where the loss falls fastest per factor of the learning rate, and where it is
        lowest (arXiv 1506.01186).

    Raises:
        ValueError: too few steps before the loss grew.
    """
    # The end of the range is meant to diverge.
    module.guard.max_not_finite = LR_STEPS
    smallest, largest = LR_RANGE
    finder = Tuner(trainer).lr_find(
        module, datamodule=data, min_lr=smallest, max_lr=largest, num_training=LR_STEPS, update_attr=False
    )
    assert finder is not None
    curve = relative_losses(finder.results["lr"], finder.results["loss"])
    steepest, lowest = suggestions(curve)
    path = run / CURVE_FILE
    _draw(curve, steepest, path)
    return f"model.optimizer.lr: {steepest:.1e}, where the loss falls fastest; it is lowest at {lowest:.1e}: {path}"


def find_batch_size(trainer: Trainer, module: ZooModule, data: TokenDataModule) -> str:
    """Double ``data.batch_size`` while three steps fit into memory.

    Returns:
        What was found, for people.
    """
    tried = data.batch_size
    found = Tuner(trainer).scale_batch_size(
        module, datamodule=data, mode="power", init_val=tried, max_val=LARGEST_BATCH
    )
    assert found is not None
    windows = len(data.train_dataset)
    limit = "the data has no more" if found >= windows else f"{LARGEST_BATCH} is the largest tried"
    return f"data.batch_size: {found}" + (f" fits, and {limit}" if found >= min(windows, LARGEST_BATCH) else "")


def relative_losses(rates: list[float], losses: list[float]) -> list[tuple[float, float]]:
    """(learning rate, smoothed loss over that of the first step) where the loss is finite.

    The Tuner's running mean begins at 0 and is corrected for one step too many: it seems to rise from half.
    """
    exact = [loss * (1 - SMOOTHING ** (step + 1)) / (1 - SMOOTHING**step) for step, loss in enumerate(losses, start=1)]
    return [(rate, loss / exact[0]) for rate, loss in zip(rates, exact, strict=False) if math.isfinite(loss)]


def suggestions(curve: list[tuple[float, float]]) -> tuple[float, float]:
    """Learning rates where the loss falls fastest per factor, and where it is lowest.

    Slopes are over five points on either side; the Tuner's own suggestion takes them per unit of the learning rate,
    in which all small ones look steep.

    Raises:
        ValueError: fewer than 20 points.
    """
    if len(curve) < 20:
        raise ValueError(f"--find lr: the loss grew within {len(curve)} of {LR_STEPS} steps; look at data and model")
    slopes = [
        ((after[1] - before[1]) / math.log(after[0] / before[0]), rate)
        for before, (rate, _), after in zip(curve, curve[5:], curve[10:], strict=False)
    ]
    return min(slopes)[1], min((loss, rate) for rate, loss in curve)[1]


def _draw(curve: list[tuple[float, float]], steepest: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True))
    axes.axvline(steepest, color="tab:red", linestyle="--", label=f"falls fastest: {steepest:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="smoothed loss over that of the first step")
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
