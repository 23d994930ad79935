"""Time a training step under ``MoEParallelStrategy`` with one rank against Lightning's plain trainer, in one process.

    OMP_NUM_THREADS=1 python scripts/benchmark_strategy.py

In a round each trains a fresh model for some steps; who begins changes from round to round, because absolute times on a
shared machine drift. Printed are medians over the rounds, of each one's step and of their ratio in a round, both of the
time that passed and of processor time, which other processes disturb less. A step is all that lies between the ends of
two batches: forward and backward pass, norm, clipping, AdamW, and what Lightning does in between. ``--strategy auto``
shows by how much two equal trainers differ.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import tempfile
import time
import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from zoo.parallel.plan import plan_names
from zoo.parallel.strategy import MoEParallelStrategy
from zoo.registry import find_spec
from zoo.training.fit import TRAINER_DEFAULTS
from zoo.training.module import ZooModule

WARM_UP = 3
"""Steps of every run that are not counted."""


class Stopwatch(Callback):
    """Milliseconds of every step: that passed, and of the processor."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self._last = (0.0, 0.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the times since the end of the step before."""
        now = (1000 * time.perf_counter(), 1000 * time.process_time())
        self.steps.append((now[0] - self._last[0], now[1] - self._last[1]))
        self._last = now


def batches(vocab_size: int, rows: int, length: int, count: int) -> list[dict[str, Tensor]]:
    """Micro-batches of random tokens, each row one document."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(vocab_size, (rows, length + 1), generator=generator)
        documents = torch.zeros(rows, length, dtype=torch.int64)
        made.append({"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone(), "document_ids": documents})
    return made


def median_step(model: str, strategy: str, precision: Any, data: list[dict[str, Tensor]]) -> Tensor:
    """[2] median milliseconds of a step: that passed, and of the processor. ``auto`` is the plain trainer."""
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as root:
        trainer = Trainer(
            **TRAINER_DEFAULTS,
            accelerator="cpu",
            strategy="auto" if strategy == "auto" else MoEParallelStrategy(strategy),
            precision=precision,
            max_steps=len(data),
            callbacks=[stopwatch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=root,
        )
        module = ZooModule(model, load_balance_coef=0.01 if find_spec(model).model.moe else 0.0)
        trainer.fit(module, DataLoader(data, batch_size=None))
    return torch.tensor(stopwatch.steps[WARM_UP:]).median(dim=0).values


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mixtral-tiny")
    parser.add_argument("--strategy", default="fsdp", choices=["auto", *plan_names()])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=7, help="of each in a round, beside the warm-up")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    data = batches(find_spec(args.model).model.vocab_size, args.rows, args.length, WARM_UP + args.steps)
    both = ("auto", args.strategy)
    times = torch.zeros(args.rounds, 2, 2)
    for round_number in range(args.rounds):
        for who in (0, 1) if round_number % 2 else (1, 0):
            times[round_number, who] = median_step(args.model, both[who], args.precision, data)
    result: dict[str, Any] = {
        "run": f"{args.model}, {args.rows * args.length} tokens a step, {args.precision}, {args.rounds} rounds",
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, lightning {lightning.__version__}",
        "date": str(datetime.date.today()),
    }
    for i, kind in enumerate(("passed", "processor")):
        plain, ours = times[:, 0, i], times[:, 1, i]
        low, middle, high = (ours / plain).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        result[kind] = {
            "plain ms": round(plain.median().item(), 1),
            f"{args.strategy} ms": round(ours.median().item(), 1),
            "ratio": round(middle, 4),
            "quartiles": [round(low, 4), round(high, 4)],
        }
    print(json.dumps(result, indent=2) if args.json else "\n".join(f"{k:10} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
