"""Reports with numbers that were made up: a small one to read, and a large one to look at."""

from __future__ import annotations

import copy
import random
from typing import Any

from zoo.harness.headline import sentences


def estimate(value: float, width: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - width, "high": value + width, **more}


def model(name: str, knowledge: float, comprehension: float, sparse: bool) -> dict[str, Any]:
    scores = {
        "knowledge": estimate(knowledge, 0.04, items=400, guess=0.06, p_value=1e-40),
        "comprehension": estimate(comprehension, 0.02, items=900, guess=0.5, p_value=1e-9),
    }
    tested = {"p_holm": 1e-8, "at_chance": False}
    of_task = {"facts_knowledge": scores["knowledge"] | tested, "facts_boolq": scores["comprehension"] | tested}
    load = [[0.25, 0.5, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]] if sparse else []
    means = {name: score["value"] for name, score in {**scores, **of_task}.items()}
    return {
        "name": name,
        "sparse": sparse,
        "twin_of": [] if sparse else ["sparse"],
        "matched_by": None if sparse else "active",
        "config": {},
        "total_parameters": 2_400_000 if sparse else 1_100_000,
        "active_parameters": 1_100_000,
        "training_flops_per_token": 5.5e6,
        "validation_loss": 0.7,
        "perplexity": 2.014,
        "scores": {**scores, **of_task},
        "expert_load": load,
        "task_load": {"facts_knowledge": load, "facts_boolq": load} if sparse else {},
        "wall_seconds": 100.0,
        "peak_memory_bytes": 600 * 2**20,
        "threads": 1,
        "curves": [{"seed": 0, "train": [[10, 3.0], [20, 2.0]], "validation": [[20, 2.1]]}],
        "checkpoints": [
            {
                "seed": 0,
                "step": s,
                "tokens": 512 * s,
                "flops": 2.8e9 * s,
                "seconds": 4.0 * s,
                "loss": 14 / s,
                "scores": means,
            }
            for s in (10, 20)
        ],
    }


def view(at: float, knowledge: dict[str, Any], comprehension: dict[str, Any]) -> dict[str, Any]:
    """``gain_ratio`` is not determined."""
    scores = {"knowledge": knowledge, "facts_knowledge": knowledge}
    return {
        "at": at,
        "scores": scores | {"comprehension": comprehension, "facts_boolq": comprehension},
        "gain_ratio": None,
    }


def small_report() -> dict[str, Any]:
    """Sparse clearly better on knowledge (by 20 points), not told apart on comprehension."""
    knowledge = {"values": [0.6, 0.4], "difference": estimate(0.2, 0.05), "relative_gain": estimate(0.5, 0.1)}
    comprehension = {
        "values": [0.905, 0.9],
        "difference": estimate(0.005, 0.02),
        "relative_gain": estimate(0.005, 0.02),
    }
    passed = {"at": 1.3, "scores": None, "gain_ratio": None}
    test = {"by_seed": [0.01], "p_value": 0.01, "p_holm": 0.02}
    training = {"steps": 20, "batch_size": 4, "sequence_length": 128}
    result: dict[str, Any] = {
        "study": "tiny <study>",
        "command": "zoo compare tiny.yaml",
        "date": "2030-01-01T00:00:00+00:00",
        "machine": {"processor": "A processor", "cores": 2, "memory_bytes": 8 * 2**30, "gpu": None},
        "versions": {"moe-zoo": "0.1.0", "torch": "2.13.0"},
        "platform": "Linux",
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "config": {"data": {"sources": ["a.txt"]}, "training": training},
        "seeds": [0],
        "tokens": 10_240,
        "not_ranked": [],
        "tasks": {"knowledge": ["facts_knowledge"], "comprehension": ["facts_boolq"]},
        "models": [model("sparse", 0.6, 0.905, True), model("dense", 0.4, 0.9, False)],
        "comparisons": [
            {
                "first": "sparse",
                "second": "dense",
                "matched_by": "active",
                "views": {
                    "tokens": view(10_240, knowledge, comprehension),
                    "loss": view(0.7, knowledge, comprehension),
                    "flops": passed,
                    "seconds": view(80.0, knowledge, comprehension),
                },
                "mcnemar": {"facts_knowledge": test, "facts_boolq": test},
                "at_chance": [],
            }
        ],
    }
    return result | {"sweeps": [], "headline": sentences(result)}


TASKS = {
    "knowledge": ["trivia"],
    "comprehension": ["boolq", "record_corrected", "shortest_path_of_a_graph", "wic"],
    "apart": ["trained_trivia"],
}
"""No model of ``large_report`` is above chance on wic."""

_SKILLS = ["knowledge", "comprehension"]
_TASK_NAMES = [task for tasks in TASKS.values() for task in tasks]

DENSE, MIXTRAL, DEEPSEEK = "dense-of-equal-active-parameters", "mixtral-style", "deepseek-style-with-shared-experts"


def large_report() -> dict[str, Any]:
    """Five models with long names, three seeds, five checkpoints, 64 experts, and tasks with long names."""
    draw = random.Random(0)
    result = small_report()
    result |= {"seeds": [0, 1, 2], "tasks": TASKS, "not_ranked": ["wic"]}
    result["command"] = "zoo compare large.yaml --data-root ../mirrors/hub --out runs/" + "a-long-name-" * 6
    experts, twins = {MIXTRAL: 8, DEEPSEEK: 64}, (DENSE, "dense-total", "dense-time")
    result["models"] = [_large(name, experts.get(name, 0), draw) for name in (*experts, *twins)]
    first = result["comparisons"][0]
    result["comparisons"] = []
    for sparse, dense, by in ((MIXTRAL, DENSE, "active"), (DEEPSEEK, DENSE, "active"), (MIXTRAL, "dense-total", None)):
        comparison = copy.deepcopy(first) | {"first": sparse, "second": dense, "matched_by": by, "at_chance": ["wic"]}
        for at_equal in comparison["views"].values():
            if at_equal["scores"]:
                at_equal["scores"] = {name: _contrast(draw) for name in _SKILLS + _TASK_NAMES}
        comparison["mcnemar"] = {name: first["mcnemar"]["facts_boolq"] for name in _TASK_NAMES}
        result["comparisons"].append(comparison)
    experts_of = {1: DENSE, 8: MIXTRAL, 16: MIXTRAL, 32: MIXTRAL, 64: DEEPSEEK}
    widths = dict(zip((64, 96, 128, 192, 256), ("dense-total", "dense-time", DENSE, DENSE, DENSE), strict=True))
    result["sweeps"] = [
        {
            "name": name,
            "dial": dial,
            "points": [{"value": v, "model": m, "loss": estimate(2, 0.1)} for v, m in of.items()],
        }
        for name, dial, of in (("moe", "experts", experts_of), ("dense", "width", widths))
    ]
    return result | {"headline": sentences(result)}


def _large(name: str, experts: int, draw: random.Random) -> dict[str, Any]:
    result = model(name, 0.3, 0.6, sparse=experts > 0) | {"total_parameters": draw.randint(1_100_000, 8_000_000)}
    task = result["scores"]["facts_boolq"]
    names = _SKILLS + _TASK_NAMES
    result["scores"] = {n: task | estimate(draw.uniform(0.3, 0.9), 0.08) | {"at_chance": n == "wic"} for n in names}
    load = [[draw.random() for _ in range(experts)] for _ in range(6 if experts else 0)]
    load = [[value / sum(layer) for value in layer] for layer in load]
    result |= {"expert_load": load, "task_load": {n: load for n in _TASK_NAMES} if experts else {}}
    steps, seeds = range(100, 2001, 100), (0, 1, 2)
    losses = {seed: [[s, 8 * s**-0.2 + draw.uniform(0, 0.1)] for s in steps] for seed in seeds}
    result["curves"] = [{"seed": seed, "train": losses[seed], "validation": losses[seed][::4]} for seed in seeds]
    result["checkpoints"] = [
        {"seed": seed, "step": step, "tokens": 4096 * step, "flops": 2.2e10 * step, "seconds": 0.2 * step, "loss": loss}
        | {
            "scores": {
                n: min(0.95, (0.2 if n == "trivia" else 0.5) + draw.uniform(1, 2) * step / 10_000) for n in names
            }
        }
        for seed in seeds
        for step, loss in losses[seed][3::4]
    ]
    return result


def _contrast(draw: random.Random) -> dict[str, Any]:
    value = draw.uniform(-0.1, 0.2)
    return {"values": [0.5 + value, 0.5], "difference": estimate(value, 0.06), "relative_gain": estimate(value, 0.1)}
