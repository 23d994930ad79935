"""Time our lm-eval adapter against lm-eval's ``hf`` model on the same weights, requests and machine, side by side.

    python scripts/benchmark_adapter.py --data-root MIRROR --text TEXT.txt --tokenizer DIRECTORY

Each model has random weights and is exported for ``hf``, which runs at every one of ``--hf-batch-sizes`` and is
compared at the best of them; ours runs at ``--batch-size``. A time is that of ``loglikelihood`` with text in and scores
out. Rounds are interleaved and the median of their ratios printed, because absolute times on a shared machine drift;
``cpu_ratio`` is that of processor time, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.huggingface import HFLM

import zoo
from zoo.harness.lm import ZooLM
from zoo.harness.runner import task_manager
from zoo.registry import find_spec
from zoo.training.data.sources import Source
from zoo.training.data.tokenizer_training import train_tokenizer
from zoo.weights import export_checkpoint, save_model

MODELS = {"dense": "llama-tiny", "mixtral": "mixtral-tiny", "large-vocabulary": "mixtral-tiny"}
TASKS = ["boolq", "copa", "cb", "sglue_rte", "wic", "wsc", "multirc", "superglue_record"]


class Recorder(LM):
    """A model that only remembers what it was asked."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """See ``LM``."""
        self.requests = requests
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """See ``LM``."""
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """See ``LM``."""
        raise NotImplementedError


def recorded(task: str, shots: int, limit: int, data_root: Path) -> list[Instance]:
    """The log-likelihood requests of the first ``limit`` documents."""
    recorder, manager = Recorder(), task_manager([task], None, data_root)
    lm_eval.simple_evaluate(
        recorder, tasks=[task], task_manager=manager, limit=limit, num_fewshot=shots, bootstrap_iters=0
    )
    return recorder.requests


def build(name: str, tokenizer_dir: Path, positions: int, work: Path) -> None:
    """Write random weights as a zoo checkpoint ``work / "zoo"`` and their export ``work / "hf"``."""
    spec, vocab_size = find_spec(name), zoo.tokenizer.Tokenizer.load(tokenizer_dir).vocab_size
    spec = replace(spec, model=replace(spec.model, vocab_size=vocab_size, max_position_embeddings=positions))
    model = zoo.build(spec.model, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # as built, all logits are nearly equal
    save_model(model, spec, work / "zoo", tokenizer_dir)
    export_checkpoint(work / "zoo", work / "hf")


def measured(lm: TemplateLM, requests: list[Instance]) -> tuple[float, float, list[tuple[float, bool]]]:
    """Seconds on the clock and of the processor that all ``requests`` take, and their scores."""
    wall, cpu = time.perf_counter(), time.process_time()
    scores = lm.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - wall, time.process_time() - cpu, scores


def compare(lms: dict[str, TemplateLM], requests: list[Instance], rounds: int) -> dict[str, Any]:
    """Median seconds of each model, ratios of the best ``hf`` to ours, and the largest difference of scores."""
    wall: dict[str, list[float]] = {name: [] for name in lms}
    cpu: dict[str, list[float]] = {name: [] for name in lms}
    scores: dict[str, list[tuple[float, bool]]] = {}
    for _ in range(rounds):
        for name, lm in lms.items():
            elapsed, worked, scores[name] = measured(lm, requests)
            wall[name].append(elapsed)
            cpu[name].append(worked)
    best = min((name for name in lms if name != "zoo"), key=lambda name: statistics.median(cpu[name]))

    def ratio(times: dict[str, list[float]]) -> float:
        return round(statistics.median(hf / ours for hf, ours in zip(times[best], times["zoo"], strict=True)), 2)

    return {
        "requests": len(requests),
        "best_hf": best,
        "hf_seconds": round(statistics.median(wall[best]), 3),
        "zoo_seconds": round(statistics.median(wall["zoo"]), 3),
        "ratio": ratio(wall),
        "cpu_ratio": ratio(cpu),
        "largest_difference": max(abs(a[0] - b[0]) for a, b in zip(scores["zoo"], scores[best], strict=True)),
    }


def main() -> None:
    """Print one line a model, task and number of shots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="mirror of data sets, as of `zoo eval`")
    parser.add_argument("--text", type=Path, required=True, help="text that the small tokenizer is trained on")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of the large tokenizer")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--shots", nargs="+", type=int, default=[0, 5])
    parser.add_argument("--limit", type=int, default=50, help="documents of each task")
    parser.add_argument("--positions", type=int, default=2048, help="the models' max_position_embeddings")
    parser.add_argument("--batch-size", type=int, default=8, help="of ours")
    parser.add_argument("--hf-batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    machine = f"{datetime.date.today()}, {platform.machine()}, {args.threads} thread(s), torch {torch.__version__}"
    if not args.json:
        print(machine)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        train_tokenizer([Source(str(args.text))], 4000, work / "tokenizer")
        asked = {
            (task, shots): recorded(task, shots, args.limit, args.data_root)
            for task in args.tasks
            for shots in args.shots
        }
        for name in args.models:
            build(
                MODELS[name],
                args.tokenizer if name == "large-vocabulary" else work / "tokenizer",
                args.positions,
                work / name,
            )
            lms: dict[str, TemplateLM] = {
                f"hf {size}": HFLM(pretrained=str(work / name / "hf"), device="cpu", batch_size=size)
                for size in args.hf_batch_sizes
            }
            lms["zoo"] = ZooLM(str(work / name / "zoo"), batch_size=args.batch_size, device="cpu")
            for (task, shots), requests in asked.items():
                rows.append({"model": name, "task": task, "shots": shots, **compare(lms, requests, args.rounds)})
                if not args.json:
                    print(rows[-1], flush=True)
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
