"""Intervals, paired differences and tests for scores measured item by item.

Every interval is a percentile bootstrap (Efron and Tibshirani, 1993, chapter 13) over the evaluation items. Models are
scored on the same items and are resampled together, so that what makes an item easy for both does not widen the
interval of their difference. The intervals therefore speak about other items of the same kind. They do not speak about
other training runs: that takes several seeds.

Shapes: N items of one task, M models, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

Array = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A value with the bounds of its interval."""

    value: float
    low: float
    high: float

    def excludes(self, point: float) -> bool:
        """Whether ``point`` lies outside the interval."""
        return not self.low <= point <= self.high


@dataclass(frozen=True)
class Bootstrap:
    """Mean scores of M models, and the same means in R resamples of the items."""

    means: Array
    """[M]"""
    replicates: Array
    """[R, M]"""

    def score(self, model: int) -> Estimate:
        """Mean score of one model."""
        return _estimate(self.means[model], self.replicates[:, model])

    def difference(self, model: int, reference: int) -> Estimate:
        """Mean score of ``model`` minus that of ``reference``, paired by item."""
        return _estimate(
            self.means[model] - self.means[reference], self.replicates[:, model] - self.replicates[:, reference]
        )

    def relative_gain(self, model: int, reference: int) -> Estimate | None:
        """(score - reference score) / reference score; ``None`` where the reference may score zero."""
        if self.means[reference] <= 0 or (self.replicates[:, reference] <= 0).any():
            return None
        return _estimate(*self._relative_gains(model, reference))

    def _relative_gains(self, model: int, reference: int) -> tuple[float, Array]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (
                float(self.means[model] / self.means[reference] - 1),
                self.replicates[:, model] / self.replicates[:, reference] - 1,
            )


def bootstrap(tasks: Sequence[Array], resamples: int = RESAMPLES, seed: int = 0) -> Bootstrap:
    """Resample the items of each task with replacement.

    Args:
        tasks: one array [N, M] for each task: the score of every model on every item. Tasks count equally, whatever
            their number of items (as in SuperGLUE's average).
        resamples: R.
        seed: of the resampling; equal seeds give equal intervals.

    Raises:
        ValueError: there is no task, a task has no items, or tasks disagree about the number of models.
    """
    if not tasks or any(task.ndim != 2 or not len(task) for task in tasks):
        raise ValueError(f"tasks of shape {[task.shape for task in tasks]}: give at least one, each with an item")
    if len({task.shape[1] for task in tasks}) > 1:
        raise ValueError(f"tasks of shape {[task.shape for task in tasks]}: score the same models on every task")
    generator = np.random.default_rng(seed)
    means = np.mean([task.mean(axis=0) for task in tasks], axis=0)
    replicates = np.mean([_resampled_means(task, resamples, generator) for task in tasks], axis=0)
    return Bootstrap(means, replicates)


def _resampled_means(task: Array, resamples: int, generator: np.random.Generator) -> Array:
    """[R, M]. How often each item is drawn is multinomial, which saves the [R, N] table of drawn indices."""
    items = len(task)
    counts = generator.multinomial(items, np.full(items, 1 / items), size=resamples)
    return counts @ task / items


def _estimate(value: float, replicates: Array) -> Estimate:
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


def gain_ratio(knowledge: Bootstrap, comprehension: Bootstrap, model: int, reference: int) -> Estimate | None:
    """Relative gain on knowledge divided by relative gain on comprehension.

    The two sets of items are independent, so their resamples, drawn with different seeds, are combined as they come.
    Returns ``None`` where the ratio
    says nothing: a gain on comprehension whose interval holds zero makes its interval unbounded.
    """
    above = knowledge.relative_gain(model, reference)
    below = comprehension.relative_gain(model, reference)
    if above is None or below is None or not below.excludes(0.0):
        return None
    gains_above, gains_below = (b._relative_gains(model, reference)[1] for b in (knowledge, comprehension))
    return _estimate(above.value / below.value, gains_above / gains_below)


def chance_p_value(correct: int, items: int, chance: float) -> float:
    """Probability of ``correct`` or more right answers to ``items`` by guessing: the exact one-sided binomial test.

    Where items differ in their guess rate, ``chance`` is the mean rate. The test is then conservative for
    counts above the mean (Hoeffding, 1956, theorem 5).

    Raises:
        ValueError: ``chance`` is not a probability, or ``correct`` is not between 0 and ``items``.
    """
    if not 0 <= chance <= 1:
        raise ValueError(f"chance = {chance}: give a probability")
    if not 0 <= correct <= items:
        raise ValueError(f"correct = {correct}: it must lie between 0 and the {items} items")
    return float(binom.sf(correct - 1, items, chance))


def align(scores: Sequence[Mapping[str, float]]) -> Array:
    """Table [N, M] of M models' scores by item key, rows in the order of sorted keys.

    Raises:
        ValueError: the models were not scored on the same items.
    """
    keys = set(scores[0])
    for number, other in enumerate(scores[1:], start=1):
        if set(other) != keys:
            raise ValueError(
                f"model {number} was scored on other items than model 0 ({len(keys ^ set(other))} differ): "
                "evaluate both on the same data"
            )
    return np.array([[model[key] for model in scores] for key in sorted(keys)], dtype=np.float64)
