"""Two models compared at an equal loss, number of tokens, training compute or time, read off from their checkpoints.

The score of every item is interpolated linearly between the two checkpoints around the matched point, for each seed on
its own. What comes out are tables of scores like those of a finished training, so that the bootstrap over items and
seeds carries through. Nothing is extrapolated.

Shapes: S seeds, N items of a task, C checkpoints in the order of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from zoo.harness.statistics import Array, Estimate, bootstrap, gain_ratio

Axis = Literal["tokens", "loss", "flops", "seconds"]

AXES: dict[Axis, str] = {"tokens": "tokens", "loss": "perplexity", "flops": "training FLOPs", "seconds": "time"}
"""What is held equal, in words. Perplexity is exp of the validation loss."""


@dataclass(frozen=True)
class Points:
    """The checkpoints of one model."""

    axes: Mapping[Axis, Array]
    """[S, C] for each axis that is known."""
    scores: Mapping[str, Array]
    """[S, N, C] by task."""

    def progress(self, axis: Axis) -> Array:
        """[S, C] on an axis that grows in training: losses negated."""
        return -self.axes[axis] if axis == "loss" else self.axes[axis]


def matched_point(first: Points, second: Points, axis: Axis) -> float:
    """The furthest point on ``axis`` that both models reach with every seed: the loss is then the higher one."""
    reached = min(float(points.progress(axis).max(axis=1).min()) for points in (first, second))
    return -reached if axis == "loss" else reached


def read_off(points: Points, axis: Axis, at: float) -> dict[str, Array] | None:
    """Scores [S, N] by task where a model first reaches ``at``; ``None`` where it had passed it before being measured.

    Raises:
        ValueError: the model never reaches ``at``.
    """
    target = -at if axis == "loss" else at
    weights = []
    for progress in points.progress(axis):
        if progress.max() < target:
            raise ValueError(f"{axis} = {at}: not reached by any checkpoint")
        after = int(np.argmax(progress >= target))
        weight = np.zeros(len(progress))
        if progress[after] == target:
            weight[after] = 1
        elif after == 0:
            return None
        else:
            weight[after] = (target - progress[after - 1]) / (progress[after] - progress[after - 1])
            weight[after - 1] = 1 - weight[after]
        weights.append(weight)
    return {task: np.einsum("snc,sc->sn", scores, np.array(weights)) for task, scores in points.scores.items()}


def contrast(first: Points, second: Points, axis: Axis, skills: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """``first`` minus ``second`` at the furthest point of ``axis`` that both reach, for each skill and task.

    Args:
        skills: names of the tasks of knowledge and of comprehension.

    Returns:
        ``at`` the matched point; ``scores`` by skill and task and ``gain_ratio``, both ``None`` where one of the models
        had passed that point before its first checkpoint.
    """
    at = matched_point(first, second, axis)
    tables = [read_off(points, axis, at) for points in (first, second)]
    if tables[0] is None or tables[1] is None:
        return {"at": at, "scores": None, "gain_ratio": None}
    pairs = {task: np.stack([tables[0][task], tables[1][task]], axis=2) for task in tables[0]}
    by_name = {
        skill: bootstrap([pairs[task] for task in tasks], seed=seed)
        for seed, (skill, tasks) in enumerate(skills.items())
    }
    ratio = gain_ratio(by_name["knowledge"], by_name["comprehension"], 0, 1)
    by_name |= {task: bootstrap([pair]) for task, pair in pairs.items()}
    scores = {
        name: {
            "values": boot.means.tolist(),
            "difference": asdict(boot.difference(0, 1)),
            "relative_gain": plain(boot.relative_gain(0, 1)),
        }
        for name, boot in by_name.items()
    }
    return {"at": at, "scores": scores, "gain_ratio": plain(ratio)}


def plain(estimate: Estimate | None) -> dict[str, float] | None:
    """As JSON has it."""
    return None if estimate is None else asdict(estimate)
