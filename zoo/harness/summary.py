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
from zoo.config_reading import to_dict
from zoo.harness.compare import Run
from zoo.harness.entries import Model
from zoo.harness.facts import guess_rates
from zoo.harness.headline import sentences
from zoo.harness.significance import SIGNIFICANCE, chance_p_value, combine, holm, is_accuracy, mcnemar_p_value
from zoo.harness.statistics import Array, align, bootstrap, seed_interval
from zoo.harness.study import Pair, Study, pairs
from zoo.harness.suites import generators
from zoo.harness.views import AXES, Axis, Points, contrast
from zoo.training.run import environment

SKILLS = ("knowledge", "comprehension")

Measured = Mapping[tuple[str, int, int], Mapping[str, Any]]
"""By model, seed and optimizer step: what ``zoo.harness.compare`` wrote."""


def summarise(study: Study, runs: Sequence[Run], out: Path, command: str) -> dict[str, Any]:
    """Everything that the report says, as plain data: that of ``report.schema.json``.

    Args:
        runs: all of them finished.
        out: directory of the study.
        command: as the user gave it.
    """
    models = list({run.model.name: run.model for run in runs}.values())
    measured = {
        (run.model.name, run.seed, step): json.loads(run.measured_file(step).read_text(encoding="utf-8"))
        for run in runs
        for step in study.training.evaluated_steps
    }
    points = _points(study, runs, models, measured)
    guesses = dict(next(iter(measured.values()))["guess"])
    if study.data.facts is not None:
        guesses |= {task: rate for task, rate in guess_rates(out / "facts").items() if task in guesses}
    if study.data.generated is not None:
        guesses |= generators.guess_rates(study.data.generated, out / "generated")
    skills = {skill: list(getattr(study.tasks, skill)) for skill in SKILLS}
    final = {name: {task: y[..., -1] for task, y in found.scores.items()} for name, found in points.items()}
    by_task = {name: task_scores(scores, guesses) for name, scores in final.items()}
    left_out = not_ranked(by_task)
    ranked = {skill: [task for task in tasks if task not in left_out] or tasks for skill, tasks in skills.items()}
    report: dict[str, Any] = {
        "study": study.name,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        **environment(),
        "config": to_dict(study),
        "seeds": list(study.seeds),
        "tokens": study.training.tokens,
        "tasks": skills | ({"apart": list(study.tasks.apart)} if study.tasks.apart else {}),
        "not_ranked": left_out,
        "models": [
            _model(study, model, [run for run in runs if run.model.name == model.name], measured, ranked)
            | {"scores": skill_scores(final[model.name], ranked, guesses) | by_task[model.name]}
            for model in models
        ],
    }
    by_name = {model["name"]: model for model in report["models"]}
    report["comparisons"] = [_comparison(pair, by_name, points, ranked) for pair in pairs(study, models)]
    report["sweeps"] = _sweeps(study, report["models"])
    return report | {"headline": sentences(report)}


def _sweeps(study: Study, models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The study's series, with the final loss of each model over its seeds."""
    last = study.training.steps
    losses = {m["name"]: [point["loss"] for point in m["checkpoints"] if point["step"] == last] for m in models}
    return [
        {
            "name": series.name,
            "dial": series.dial,
            "points": [
                {"value": value, "model": name, "loss": asdict(seed_interval(losses[name]))}
                for value, name in series.models.items()
            ],
        }
        for series in study.series
    ]


def _points(study: Study, runs: Sequence[Run], models: Sequence[Model], measured: Measured) -> dict[str, Points]:
    """The checkpoints of every model, items in one order for all models, seeds and steps."""
    steps, seeds = study.training.evaluated_steps, study.seeds
    keys = [(model.name, seed, step) for model in models for seed in seeds for step in steps]
    shape = (len(models), len(seeds), len(steps))
    scores = {
        task: np.moveaxis(align([measured[key]["scores"][task] for key in keys]).T.reshape(*shape, -1), 3, 2)
        for task in study.tasks.all
    }
    losses = np.array([measured[key]["validation_loss"] for key in keys]).reshape(shape)
    tokens = np.array(steps) * study.training.tokens / study.training.steps
    result = {}
    for number, model in enumerate(models):
        flops = training_flops(model.spec.model, study.training.sequence_length) * tokens
        axes: dict[Axis, Array] = {"loss": losses[number]}
        axes |= {"tokens": np.tile(tokens, (len(seeds), 1)), "flops": np.tile(flops, (len(seeds), 1))}
        seconds = [[run.seconds(step) for step in steps] for run in runs if run.model.name == model.name]
        if all(value is not None for run in seconds for value in run):
            axes["seconds"] = np.array(seconds, dtype=np.float64)
        result[model.name] = Points(axes, {task: table[number] for task, table in scores.items()})
    return result


def task_scores(scores: Mapping[str, Array], guesses: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Scores of one model by task, with intervals and tests against guessing, which Holm corrects for their number.

    Args:
        scores: [S, N] by task.
        guesses: what guessing reaches, by task.
    """
    result = {task: _score([table], [guesses[task]]) for task, table in scores.items()}
    adjusted = holm({task: score["p_value"] for task, score in result.items() if score["p_value"] is not None})
    for task, score in result.items():
        score["p_holm"] = adjusted.get(task)
        score["at_chance"] = None if task not in adjusted else adjusted[task] > SIGNIFICANCE
    return result


def skill_scores(
    scores: Mapping[str, Array], skills: Mapping[str, Sequence[str]], guesses: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """The same of the means over the tasks of each skill.

    Args:
        skills: names of the tasks, by skill.
    """
    return {
        skill: _score([scores[task] for task in tasks], [guesses[task] for task in tasks], seed)
        for seed, (skill, tasks) in enumerate(skills.items())
    }


def not_ranked(by_task: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Tasks on which no model is above chance: they would only add noise to the mean of a skill, and are left out.

    Args:
        by_task: ``task_scores`` by model.
    """
    models = list(by_task.values())
    return [task for task in models[0] if all(scores[task]["at_chance"] for scores in models)]


def _score(tables: Sequence[Array], rates: Sequence[float], seed: int = 0) -> dict[str, Any]:
    estimate = bootstrap([table[..., None] for table in tables], seed=seed).score(0)
    return {**asdict(estimate), **_against_guessing(tables, rates)}


def _against_guessing(tables: Sequence[Array], rates: Sequence[float]) -> dict[str, Any]:
    """Items, guess rate, and the exact test where answers are right or wrong; of several seeds the worst counts."""
    items = [table.shape[1] for table in tables]
    chance = float(np.average(rates, weights=items))
    p_value = None
    if all(is_accuracy(table) for table in tables):
        correct = np.sum([table.sum(axis=1) for table in tables], axis=0)
        p_value = max(chance_p_value(round(float(right)), sum(items), chance) for right in correct)
    return {"items": sum(items), "guess": chance, "p_value": p_value}


def _model(
    study: Study, model: Model, runs: Sequence[Run], measured: Measured, skills: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Sizes, costs and curves of one model; losses and loads are means over its seeds."""
    parameters = count_parameters(model.spec.model)
    flops = training_flops(model.spec.model, study.training.sequence_length)
    last = [measured[model.name, run.seed, study.training.steps] for run in runs]
    loss = float(np.mean([m["validation_loss"] for m in last]))
    costs = [run.costs() for run in runs]
    return {
        "name": model.name,
        "sparse": model.spec.model.moe is not None,
        "twin_of": list(model.twin.models) if model.twin else [],
        "matched_by": model.twin.by if model.twin else None,
        "config": to_dict(model.spec.model),
        "total_parameters": parameters.total,
        "active_parameters": parameters.active,
        "training_flops_per_token": flops,
        "validation_loss": loss,
        "perplexity": math.exp(loss),
        "expert_load": np.mean([m["expert_load"] for m in last], axis=0).tolist(),
        "task_load": {
            task: np.mean([m["task_load"][task] for m in last], axis=0).tolist()
            for task in last[0].get("task_load", {})
        },
        "wall_seconds": float(np.mean([sum(start["wall_seconds"] for start in run) for run in costs])) or None,
        "peak_memory_bytes": max((start["peak_memory_bytes"] for run in costs for start in run), default=0) or None,
        "threads": max((start["threads"] for run in costs for start in run), default=0) or None,
        "curves": [{"seed": run.seed, **read_curve(run.fit_directory / "metrics.csv")} for run in runs],
        "checkpoints": [
            {
                "seed": run.seed,
                "step": step,
                "tokens": step * study.training.tokens // study.training.steps,
                "flops": step * study.training.tokens // study.training.steps * flops,
                "seconds": run.seconds(step),
                "loss": measured[model.name, run.seed, step]["validation_loss"],
                "scores": _means(measured[model.name, run.seed, step]["scores"], skills),
            }
            for run in runs
            for step in study.training.evaluated_steps
        ],
    }


def _means(scores: Mapping[str, Mapping[str, float]], skills: Mapping[str, list[str]]) -> dict[str, float]:
    """Of one checkpoint, by skill and task."""
    tasks = {task: float(np.mean(list(items.values()))) for task, items in scores.items()}
    return {skill: float(np.mean([tasks[task] for task in members])) for skill, members in skills.items()} | tasks


def _comparison(
    pair: Pair, models: Mapping[str, Mapping[str, Any]], points: Mapping[str, Points], skills: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Two models: differences are first minus second."""
    first, second = points[pair.first], points[pair.second]
    several = first.axes["loss"].shape[1] > 1
    axes: list[Axis] = [axis for axis in AXES if axis in first.axes and axis in second.axes] if several else ["tokens"]
    at_chance = [
        task
        for task in first.scores
        if models[pair.first]["scores"][task]["at_chance"] and models[pair.second]["scores"][task]["at_chance"]
    ]
    return {
        "first": pair.first,
        "second": pair.second,
        "matched_by": pair.matched_by,
        "views": {axis: contrast(first, second, axis, skills) for axis in axes},
        "mcnemar": mcnemar(
            {task: (first.scores[task][..., -1], second.scores[task][..., -1]) for task in first.scores}
        ),
        "at_chance": at_chance,
    }


def mcnemar(pairs: Mapping[str, tuple[Array, Array]]) -> dict[str, dict[str, Any]]:
    """Tests of two models' accuracies [S, N] by task: of each seed, of all, and of all corrected for the tasks."""
    by_seed = {
        task: [mcnemar_p_value(*seed) for seed in zip(first, second, strict=True)]
        for task, (first, second) in pairs.items()
        if is_accuracy(first) and is_accuracy(second)
    }
    combined = {task: combine(p_values) for task, p_values in by_seed.items()}
    adjusted = holm(combined)
    return {task: {"by_seed": by_seed[task], "p_value": combined[task], "p_holm": adjusted[task]} for task in by_seed}


def read_curve(path: Path) -> dict[str, list[list[float]]]:
    """``train`` and ``validation``: [step, loss] pairs of the metrics that ``zoo fit`` wrote.

    It writes none where it takes fewer steps than there are between two lines.
    """
    columns = {"train": "train/lm_loss", "validation": "val/loss"}
    rows: list[dict[str, str]] = []
    if path.exists():
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
