"""From the measurements of a study's runs to the numbers of its report: plain data, the report's JSON."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from zoo.accounting import count_parameters, training_flops
from zoo.config import to_dict
from zoo.harness.compare import Run
from zoo.harness.facts import guess_rates
from zoo.harness.headline import sentences
from zoo.harness.significance import chance_p_value
from zoo.harness.statistics import Array, Bootstrap, Estimate, align, bootstrap, gain_ratio
from zoo.harness.study import Model, Study
from zoo.training.run import environment

SKILLS = ("knowledge", "comprehension")

Scores = dict[str, list[Array]]
"""By task: one array [N items, M models] for each seed."""


def summarise(study: Study, runs: Sequence[Run], out: Path, command: str) -> dict[str, Any]:
    """Everything that the report says, as plain data.

    Args:
        runs: all of them finished.
        out: directory of the study.
        command: as the user gave it.
    """
    models = list({run.model.name: run.model for run in runs}.values())
    measured = {(run.model.name, run.seed): json.loads(run.measured_file.read_text(encoding="utf-8")) for run in runs}
    scores = {
        task: [align([measured[model.name, seed]["scores"][task] for model in models]) for seed in study.seeds]
        for task in study.tasks.all
    }
    guesses = next(iter(measured.values()))["guess"]
    if study.data.facts is not None:
        guesses |= {task: rate for task, rate in guess_rates(out / "facts").items() if task in guesses}
    boots = {skill: _bootstrap(scores, getattr(study.tasks, skill), seed) for seed, skill in enumerate(SKILLS)}
    by_task = {task: _bootstrap(scores, [task]) for task in study.tasks.all}
    comparisons = [
        _comparison(study, models, number, boots, by_task) for number, model in enumerate(models) if model.twin
    ]
    report: dict[str, Any] = {
        "study": study.name,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        **environment(),
        "config": to_dict(study),
        "tokens": study.training.tokens,
        "tasks": {skill: list(getattr(study.tasks, skill)) for skill in SKILLS},
        "models": [
            _model(study, model, [run for run in runs if run.model.name == model.name])
            | {
                "scores": {
                    name: _score(scores, tasks, guesses, boot, number)
                    for name, tasks, boot in [
                        *((skill, getattr(study.tasks, skill), boots[skill]) for skill in SKILLS),
                        *((task, [task], by_task[task]) for task in study.tasks.all),
                    ]
                }
            }
            for number, model in enumerate(models)
        ],
        "comparisons": comparisons,
    }
    return report | {"headline": sentences(report)}


def _bootstrap(scores: Scores, tasks: Sequence[str], seed: int = 0) -> Bootstrap:
    """Over items and training seeds; ``seed`` is that of the resampling of items."""
    return bootstrap([np.stack(scores[task]) for task in tasks], seed=seed)


def _score(
    scores: Scores, tasks: Sequence[str], guesses: Mapping[str, float | None], boot: Bootstrap, model: int
) -> dict[str, Any]:
    """Score with its interval, guess rate, and the test against guessing; of several seeds the worst counts."""
    items = [len(scores[task][0]) for task in tasks]
    result: dict[str, Any] = {**asdict(boot.score(model)), "items": sum(items), "guess": None, "p_value": None}
    rates = [guesses[task] for task in tasks]
    if all(rate is not None for rate in rates):
        chance = float(np.average([rate for rate in rates if rate is not None], weights=items))
        seeds = range(len(scores[tasks[0]]))
        correct = [sum(float(scores[task][seed][:, model].sum()) for task in tasks) for seed in seeds]
        result |= {"guess": chance, "p_value": max(chance_p_value(round(c), sum(items), chance) for c in correct)}
    return result


def _model(study: Study, model: Model, runs: Sequence[Run]) -> dict[str, Any]:
    """Sizes, costs and curves of one model; losses and loads are means over its seeds."""
    measured = [json.loads(run.measured_file.read_text(encoding="utf-8")) for run in runs]
    parameters = count_parameters(model.spec.model)
    loss = float(np.mean([m["validation_loss"] for m in measured]))
    costs = [run.costs() for run in runs]
    return {
        "name": model.name,
        "sparse": model.spec.model.moe is not None,
        "twin_of": model.twin.of if model.twin else None,
        "matched_by": model.twin.by if model.twin else None,
        "config": to_dict(model.spec.model),
        "total_parameters": parameters.total,
        "active_parameters": parameters.active,
        "training_flops_per_token": training_flops(model.spec.model, study.training.sequence_length),
        "validation_loss": loss,
        "perplexity": math.exp(loss),
        "expert_load": np.mean([m["expert_load"] for m in measured], axis=0).tolist(),
        "wall_seconds": float(np.mean([sum(start["wall_seconds"] for start in run) for run in costs])) or None,
        "peak_memory_bytes": max((start["peak_memory_bytes"] for run in costs for start in run), default=0) or None,
        "threads": max((start["threads"] for run in costs for start in run), default=0) or None,
        "curves": [{"seed": run.seed, **read_curve(run.fit_directory / "metrics.csv")} for run in runs],
    }


def _comparison(
    study: Study, models: Sequence[Model], number: int, boots: Mapping[str, Bootstrap], by_task: Mapping[str, Bootstrap]
) -> dict[str, Any]:
    """A sparse model against dense twin ``number``: differences are sparse minus dense."""
    twin = models[number].twin
    assert twin is not None
    sparse = [model.name for model in models].index(twin.of)
    differences = {
        name: {
            "difference": asdict(boot.difference(sparse, number)),
            "relative_gain": _plain(boot.relative_gain(sparse, number)),
        }
        for name, boot in {**boots, **by_task}.items()
    }
    return {
        "sparse": twin.of,
        "dense": models[number].name,
        "matched_by": twin.by,
        "scores": differences,
        "gain_ratio": _plain(gain_ratio(boots["knowledge"], boots["comprehension"], sparse, number)),
    }


def _plain(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else asdict(estimate)


def read_curve(path: Path) -> dict[str, list[list[float]]]:
    """``train`` and ``validation``: [step, loss] pairs of the metrics that ``zoo fit`` wrote."""
    columns = {"train": "train/lm_loss", "validation": "val/loss"}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        name: [[float(row["step"]), float(row[column])] for row in rows if row.get(column)]
        for name, column in columns.items()
    }


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in bytes, and GPU if there is one."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": model,
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
