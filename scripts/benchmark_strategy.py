"""Time a training step under ``MoEParallelStrategy`` with one rank against Lightning's plain trainer, in one process.

    OMP_NUM_THREADS=1 python scripts/benchmark_strategy.py

Two trainers on equal models and data take turns, one step each, because absolute times on a shared machine drift.
Printed is the median over the rounds of each one's step and of their ratio within a round, both of the time that passed
and of processor time, which other processes disturb less. A step is all that lies between the ends of two batches:
forward and backward pass, norm, clipping, AdamW, and what Lightning does in between.
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
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore
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

WARM_UP = 5
"""Rounds that are not counted."""


class Turns(Callback):
    """Takes every step in a turn of its own, and its time: seconds that passed, and seconds of the processor."""

    def __init__(self, mine: Semaphore, other: Semaphore) -> None:
        self.mine, self.other = mine, other
        self.seconds: list[tuple[float, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first turn."""
        self._begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time, let the other have its turn, and wait for the next."""
        passed, busy = self._start
        self.seconds.append((time.perf_counter() - passed, time.process_time() - busy))
        self.other.release()
        self._begin()

    def _begin(self) -> None:
        self.mine.acquire()
        self._start = time.perf_counter(), time.process_time()


def batches(vocab_size: int, rows: int, length: int, count: int) -> list[dict[str, Tensor]]:
    """Micro-batches of random tokens, each row one document."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(vocab_size, (rows, length + 1), generator=generator)
        documents = torch.zeros(rows, length, dtype=torch.int64)
        made.append({"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone(), "document_ids": documents})
    return made


def train(model: str, strategy: str, precision: Any, data: list[dict[str, Tensor]], turns: Turns) -> None:
    """One step a batch of ``data``; the strategy ``auto`` is the plain trainer."""
    with tempfile.TemporaryDirectory() as root:
        trainer = Trainer(
            **TRAINER_DEFAULTS,
            accelerator="cpu",
            strategy="auto" if strategy == "auto" else MoEParallelStrategy(strategy),
            precision=precision,
            max_steps=len(data),
            callbacks=[turns],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=root,
        )
        module = ZooModule(model, load_balance_coef=0.01 if find_spec(model).model.moe else 0.0)
        try:
            trainer.fit(module, DataLoader(data, batch_size=None))
        finally:
            # Also where it failed: the other would wait for ever.
            turns.other.release(len(data))


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mixtral-tiny")
    parser.add_argument("--strategy", default="fsdp", choices=plan_names())
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    data = batches(find_spec(args.model).model.vocab_size, args.rows, args.length, WARM_UP + args.rounds)
    first, second = Semaphore(1), Semaphore(0)
    turns = {"auto": Turns(first, second), args.strategy: Turns(second, first)}
    with ThreadPoolExecutor(len(turns)) as threads:
        runs = [threads.submit(train, args.model, name, args.precision, data, turns[name]) for name in turns]
        for run in runs:
            run.result()
    plain, ours = (1000 * torch.tensor(turn.seconds[WARM_UP:], dtype=torch.float64) for turn in turns.values())
    ratios = (ours / plain).sort(dim=0).values
    medians = {"auto": plain.median(dim=0).values, args.strategy: ours.median(dim=0).values}
    result = (
        {
            "model": f"{args.model}, {args.rows * args.length} tokens a step, {args.precision}",
            "rounds": args.rounds,
        }
        | {
            kind: {
                "ms": {name: round(median[i].item(), 1) for name, median in medians.items()},
                "ratio": round(ratios.median(dim=0).values[i].item(), 4),
                "quartiles": [round(ratios[args.rounds * q // 4, i].item(), 4) for q in (1, 3)],
            }
            for i, kind in enumerate(("passed", "processor"))
        }
        | {
            "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            "versions": f"torch {torch.__version__}, lightning {lightning.__version__}",
            "date": str(datetime.date.today()),
        }
    )
    print(json.dumps(result, indent=2) if args.json else "\n".join(f"{k:10} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
