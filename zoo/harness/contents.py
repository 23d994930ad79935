"""What a study's report says, in sections of tables and words, whichever page they end up on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.cli.text import binary, short
from zoo.harness.headline import MATCHED, SKILLS, interval, percent, points, ranked_tasks, ratio_text
from zoo.harness.views import AXES, Axis


@dataclass(frozen=True)
class Table:
    """Numbers under headings; the first column is text."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """A part of the report. The plots that name it belong to it as well."""

    name: str
    title: str
    note: str
    tables: list[Table]


_OF_ITEMS = (
    "Intervals are 95% bootstrap intervals over the evaluation items. They speak about other items of the same kind, "
    "not about other training runs: only several seeds show those."
)

_OF_SEEDS = (
    "Intervals are 95% bootstrap intervals over the evaluation items and {seeds} training seeds (Student's t on "
    "{freedom} degrees of freedom). They speak about other items and other training runs of the same kind."
)

_READING = (
    "Differences are paired by item and seed; the first model minus the second. p is the probability of so many right "
    "answers by guessing (exact one-sided binomial test, of several seeds the worst); guessing is the better of random "
    "choices and the one answer that is right most often. A model is at chance on a task where that p, corrected by "
    "Holm for the number of tasks, is above 0.05. Where both models of a difference are, it is not ranked; a task on "
    "which all are is left out of the mean of its skill, and so of all that is said above. McNemar's exact test "
    "speaks about the trained models, not about other runs; its p is corrected by Holm as well. A score of 0% or 100% "
    "has an interval of no width; a true rate up to 3 ÷ items away is still compatible with it."
)


def sections(report: Mapping[str, Any]) -> list[Section]:
    """Everything but headline and provenance, in the order of interest; a section may have no table."""
    by_task = [_task_differences(comparison, report["tasks"]) for comparison in report["comparisons"]]
    experts = _balance(report)
    sweeps = [Section("sweeps", "More experts, more width", _SWEEPS_NOTE, [])] if report["sweeps"] else []
    return [
        Section("scores", "Scores", _skill_note(report), [_skills(report)]),
        Section("curves", "At equal loss, tokens, compute and time", _CURVES_NOTE, _differences(report)),
        *sweeps,
        Section("comparisons", "Model against model", "Differences at the end of training, by task.", by_task),
        Section("tasks", "Task by task", "", [_tasks(report)]),
        Section("experts", "Experts", "Which experts the routers choose.", [experts] if experts.rows else []),
        Section("training", "Training and cost", "", [_sizes(report), _costs(report)]),
    ]


_CURVES_NOTE = "Of the same runs: at the furthest point that both models reach, read off between their checkpoints."

_SWEEPS_NOTE = (
    "The models of each sweep, at the end of training. Variants have the active parameters of the dense model that "
    "they are made from; where a sweep has one expert, that is the dense model itself."
)


def reading(report: Mapping[str, Any]) -> str:
    """How the numbers are to be read."""
    seeds = len(report["seeds"])
    return f"{_OF_SEEDS.format(seeds=seeds, freedom=seeds - 1) if seeds > 1 else _OF_ITEMS} {_READING}"


def provenance(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What it takes to repeat the study."""
    machine = report["machine"]
    memory = f"{binary(machine['memory_bytes'])} memory"
    parts = [machine["processor"], f"{machine['cores']} cores", memory, machine["gpu"]]
    git = report["git"]
    training = report["config"]["training"]
    pairs = [
        ("command", report["command"]),
        ("date", report["date"]),
        ("machine", ", ".join(part for part in parts if part)),
        ("system", report["platform"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        ("code", "not a git checkout" if git is None else git["commit"] + (" with changes" if git["dirty"] else "")),
        ("seeds", ", ".join(map(str, report["seeds"]))),
        (
            "budget",
            f"{report['tokens']:,} tokens a model: {training['steps']:,} steps of {training['batch_size']} sequences "
            f"of {training['sequence_length']} tokens, the same ones in the same order for every model",
        ),
    ]
    if "facts" in report["config"]["data"]:
        from zoo.harness.facts.world import ATTRIBUTION

        pairs.append(("facts", ATTRIBUTION))
    return pairs


def _skill_note(report: Mapping[str, Any]) -> str:
    """Which tasks a skill is the mean of."""
    means = [
        f"{skill} is the mean of {', '.join(ranked_tasks(report, skill) or tasks)}" for skill, tasks in _of(report)
    ]
    left_out = [
        task for task in report["not_ranked"] if any(ranked_tasks(report, s) for s, t in _of(report) if task in t)
    ]
    text = "; ".join(means) + "."
    return (
        text[0].upper() + text[1:] + (f" Left out, no model above chance: {', '.join(left_out)}." if left_out else "")
    )


def _of(report: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    return [(skill, report["tasks"][skill]) for skill in SKILLS]


def _skills(report: Mapping[str, Any]) -> Table:
    header = ["model", "knowledge", "p", "comprehension", "p", "perplexity"]
    rows = []
    for model in report["models"]:
        cells = [model["name"]]
        for skill in SKILLS:
            score = model["scores"][skill]
            cells += [_scored(score), _p_value(score["p_value"])]
        rows.append([*cells, f"{model['perplexity']:.3f}"])
    guesses = [percent(report["models"][0]["scores"][skill]["guess"]) for skill in SKILLS]
    return Table("Knowledge and comprehension", header, [*rows, ["guessing", guesses[0], "", guesses[1], "", ""]])


def _differences(report: Mapping[str, Any]) -> list[Table]:
    """One row for each comparison and view."""
    header = ["pair", "matched by", "at equal", *(f"{skill}, points" for skill in SKILLS), "ratio of relative gains"]
    rows = []
    for comparison in report["comparisons"]:
        ranked = [bool(ranked_tasks(report, skill, comparison)) for skill in SKILLS]
        for axis, view in comparison["views"].items():
            matched = MATCHED.get(comparison["matched_by"], "–")
            cells = [
                f"{comparison['first']} − {comparison['second']}",
                matched,
                f"{AXES[axis]}: {_at(axis, view['at'])}",
            ]
            if view["scores"] is None:
                rows.append([*cells, "passed before", "the first checkpoint", "not determined"])
                continue
            differences = [_signed(view["scores"][skill]["difference"]) for skill in SKILLS]
            cells += [text if told else "at chance: not ranked" for text, told in zip(differences, ranked, strict=True)]
            known = all(ranked) and view["gain_ratio"]
            rows.append([*cells, ratio_text(known) if known else "not determined"])
    return [Table("Sparse against dense", header, rows)] if rows else []


def _at(axis: Axis, value: float) -> str:
    if axis == "loss":
        return f"{math.exp(value):.3f}"
    return f"{value:,.0f} s" if axis == "seconds" else short(value)


def _signed(difference: Mapping[str, float]) -> str:
    return f"{points(difference['value'])} ({interval(difference)})"


def _tasks(report: Mapping[str, Any]) -> Table:
    names = list(dict.fromkeys(task for tasks in report["tasks"].values() for task in tasks))
    first = report["models"][0]["scores"]
    header = ["task", "items", "guessing", *(model["name"] for model in report["models"])]
    rows = []
    for name in names:
        scores = [model["scores"][name] for model in report["models"]]
        cells = [_scored(score) + (" at chance" if score["at_chance"] else "") for score in scores]
        label = f"{name}: no model above chance, not ranked" if name in report["not_ranked"] else name
        rows.append([label, f"{first[name]['items']:,}", percent(first[name]["guess"]), *cells])
    return Table("Scores by task", header, rows)


def _task_differences(comparison: Mapping[str, Any], tasks: Mapping[str, Sequence[str]]) -> Table:
    header = ["task", "skill", "difference, points", "McNemar p", "Holm p"]
    scores = comparison["views"]["tokens"]["scores"]
    rows = []
    for skill, members in tasks.items():
        for task in members:
            test = comparison["mcnemar"].get(task)
            cells = [task, skill, _signed(scores[task]["difference"])]
            if task in comparison["at_chance"]:
                cells[2] = "both at chance: not ranked"
            rows.append([*cells, *(_p_value(test and test[key]) for key in ("p_value", "p_holm"))])
    return Table(f"{comparison['first']} − {comparison['second']}, at equal tokens", header, rows)


def _sizes(report: Mapping[str, Any]) -> Table:
    header = ["model", "parameters", "active", "training FLOPs a token"]
    rows = [
        [m["name"], short(m["total_parameters"]), short(m["active_parameters"]), short(m["training_flops_per_token"])]
        for m in report["models"]
    ]
    return Table("Sizes", header, rows)


def _costs(report: Mapping[str, Any]) -> Table:
    header = ["model", "wall time", "tokens a second", "threads", "peak memory"]
    rows = []
    for model in report["models"]:
        seconds, memory = model["wall_seconds"], model["peak_memory_bytes"]
        timed = [f"{seconds:.0f} s", f"{report['tokens'] / seconds:,.0f}"] if seconds else ["–", "–"]
        rows.append([model["name"], *timed, str(model["threads"] or "–"), binary(memory) if memory else "–"])
    return Table("Cost of training, start-up included", header, rows)


def _balance(report: Mapping[str, Any]) -> Table:
    """One row for each MoE layer; the load of each expert is in the figures."""
    header = ["model, MoE layer", "experts", "highest load", "lowest load", "experts below half the mean"]
    rows = []
    for model in report["models"]:
        for number, layer in enumerate(model["expert_load"]):
            load = [share * len(layer) for share in layer]
            few = sum(value < 0.5 for value in load)
            rows.append(
                [f"{model['name']}, {number}", str(len(load)), f"{max(load):.2f}", f"{min(load):.2f}", str(few)]
            )
    return Table("Balance on the validation text, load ÷ mean load", header, rows)


def _scored(score: Mapping[str, float]) -> str:
    return f"{percent(score['value'])} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 1e-6" if p < 1e-6 else f"{p:.2g}"
