"""Intervals of scores measured item by item, for models trained with several seeds and scored on the same items.

Scores vary for two reasons that cross each other: the items that happen to be asked, and the runs that happen to be
trained. With y[s, i] the score of seed s on item i = mean + a[s] + b[i] + e[s, i], the mean over S seeds and N items
has the variance σa²/S + σb²/N + σe²/(SN) (two-way random effects: Searle, Casella and McCulloch, 1992, chapter 4).
Resampling both with replacement misses it twice: it counts σe² three times (Owen, 2007, the pigeonhole bootstrap), and
the few seeds that are affordable give a variance on S - 1 degrees of freedom, which a percentile interval takes for
known. Therefore

* items are resampled with replacement (percentile bootstrap, Efron and Tibshirani, 1993, chapter 13). With several
  seeds their deviations are scaled to the covariance σb²/N, for the spread of the seeds' means already holds σe²;
* seeds are resampled by multipliers (Wu, 1986) with the tails of Student's t on S - 1 degrees of freedom: of any linear
  contrast of models this part alone gives the t interval of the seeds' means.

Models share the draws of both, so that what makes an item or a seed easy for all does not widen their difference. With
one seed only items are drawn: the intervals then speak about these trained models, not about other runs of the kind.
``tests/unit/test_statistics_coverage.py`` has the coverage that this reaches.

Shapes: S seeds, N items of one task, M models, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

Array = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 10_000

_CELLS = 2_000_000
"""Counts held at a time."""


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
    """Mean scores of M models, and the same means in R resamples."""

    means: Array
    """[M]"""
    replicates: Array
    """[R, M]"""

    def score(self, model: int) -> Estimate:
        """Mean score of one model; its bounds stay between 0 and 1, as every score does."""
        estimate = _estimate(self.means[model], self.replicates[:, model])
        return Estimate(estimate.value, max(0.0, estimate.low), min(1.0, estimate.high))

    def difference(self, model: int, reference: int) -> Estimate:
        """Mean score of ``model`` minus that of ``reference``, paired by item and seed."""
        return _estimate(
            self.means[model] - self.means[reference], self.replicates[:, model] - self.replicates[:, reference]
        )

    def relative_gain(self, model: int, reference: int) -> Estimate | None:
        """(score - reference score) / reference score; ``None`` where the reference may score zero."""
        return quotient(
            float(self.means[model] - self.means[reference]),
            self.replicates[:, model] - self.replicates[:, reference],
            float(self.means[reference]),
            self.replicates[:, reference],
        )


def bootstrap(tasks: Sequence[Array], resamples: int = RESAMPLES, seed: int = 0) -> Bootstrap:
    """Resample the items of each task, and the seeds.

    Args:
        tasks: one array [S, N, M] for each task: the score, from 0 to 1, of every model on every item. Tasks count
            equally, whatever their number of items (as in SuperGLUE's average).
        resamples: R.
        seed: of the resampling of items; equal seeds give equal intervals. The draws over training seeds are the same
            for every ``seed``: a training seed that is good for one set of tasks is the same one for another.

    Raises:
        ValueError: there is no task, a task has no items, or tasks disagree about the number of seeds or models.
    """
    shapes = [task.shape for task in tasks]
    if not tasks or any(len(shape) != 3 or 0 in shape for shape in shapes):
        raise ValueError(f"tasks of shape {shapes}: give at least one, each with a seed, an item and a model")
    if len({(shape[0], shape[2]) for shape in shapes}) > 1:
        raise ValueError(f"tasks of shape {shapes}: score the same seeds and the same models on every task")
    generator = np.random.default_rng(seed)
    means = np.mean([task.mean(axis=(0, 1)) for task in tasks], axis=0)
    replicates = np.mean([_over_items(task, resamples, generator) for task in tasks], axis=0)
    if shapes[0][0] > 1:
        replicates = replicates + _over_seeds(np.mean([task.mean(axis=1) for task in tasks], axis=0), resamples)
    return Bootstrap(means, replicates)


def _over_items(task: Array, resamples: int, generator: np.random.Generator) -> Array:
    """[R, M] means over resampled items.

    Items with equal scores are drawn together: how often each such group is drawn is multinomial. Of right and wrong
    answers there are few groups, however many items.
    """
    seeds, items, models = task.shape
    groups, sizes = np.unique(task.mean(axis=0).round(12), axis=0, return_counts=True)
    replicates = np.empty((resamples, models))
    for start in range(0, resamples, step := max(1, _CELLS // len(groups))):
        counts = generator.multinomial(items, sizes / items, size=min(step, resamples - start))
        replicates[start : start + step] = counts @ groups / items
    if seeds == 1:
        return replicates
    mean = task.mean(axis=(0, 1))
    return mean + (replicates - mean) @ _item_scale(task)


def _item_scale(task: Array) -> Array:
    """[M, M] that takes deviations of item means with covariance σb² + σe²/S to such with covariance σb²."""
    seeds, items, models = task.shape
    if items == 1:
        return np.zeros((models, models))
    by_item, by_seed = task.mean(axis=0), task.mean(axis=1)
    residual = (task - by_item - by_seed[:, None] + by_item.mean(axis=0)).reshape(-1, models)
    total = np.cov(by_item, rowvar=False).reshape(models, models)
    of_items = total - residual.T @ residual / ((seeds - 1) * (items - 1) * seeds)
    return _power(total, -0.5) @ _power(of_items, 0.5)


def _power(matrix: Array, exponent: float) -> Array:
    """Power of a symmetric matrix within the span of its positive eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    positive = values > 1e-12 * max(float(np.abs(values).max()), 1e-12)
    powers = np.where(positive, np.where(positive, values, 1.0) ** exponent, 0.0)
    return (vectors * powers) @ vectors.T


def _over_seeds(means: Array, resamples: int) -> Array:
    """[R, M] deviations whose linear contrasts are t-distributed with the standard error of ``means`` [S, M]."""
    seeds = len(means)
    generator = np.random.default_rng([seeds, resamples])
    multipliers = generator.standard_normal((resamples, seeds))
    tails = np.sqrt((seeds - 1) / generator.chisquare(seeds - 1, size=(resamples, 1)))
    return tails * (multipliers @ (means - means.mean(axis=0))) / np.sqrt(seeds * (seeds - 1))


def _estimate(value: float, replicates: Array) -> Estimate:
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


def quotient(numerator: float, numerators: Array, denominator: float, denominators: Array) -> Estimate | None:
    """A ratio and its interval; ``None`` where the denominator cannot be told from zero.

    It is the bootstrap's form of Fieller's set (1954): the ratios ρ for which numerator - ρ · denominator cannot be
    told from zero. Replicates whose denominator has the other sign have no place on the line: they count against both
    bounds. Once there are more of them than an interval leaves out, the set is unbounded: there is nothing to report.

    Args:
        numerators: replicates [R] of the numerator.
        denominators: [R], of the same resamples.
    """
    same_sign = denominators * np.sign(denominator) > 0
    ratios = numerators / np.where(same_sign, denominators, 1.0)
    with np.errstate(invalid="ignore"):  # halfway between an infinity and a number is no number: unbounded too
        low = np.quantile(np.where(same_sign, ratios, -np.inf), (1 - LEVEL) / 2)
        high = np.quantile(np.where(same_sign, ratios, np.inf), (1 + LEVEL) / 2)
    if not np.isfinite([low, high]).all():
        return None
    return Estimate(numerator / denominator, float(low), float(high))


def gain_ratio(knowledge: Bootstrap, comprehension: Bootstrap, model: int, reference: int) -> Estimate | None:
    """Relative gain on knowledge divided by relative gain on comprehension.

    Their items are independent, so the resamples of items, drawn with different seeds, are combined as they come; those
    of training seeds are the same for both. ``None`` where a reference may score zero, and where the gain on
    comprehension cannot be told from zero: the interval of the ratio is then unbounded.
    """
    skills = (knowledge, comprehension)
    if any(skill.relative_gain(model, reference) is None for skill in skills):
        return None
    (above, replicates_above), (below, replicates_below) = (_gains(skill, model, reference) for skill in skills)
    return quotient(above, replicates_above, below, replicates_below)


def _gains(skill: Bootstrap, model: int, reference: int) -> tuple[float, Array]:
    """Relative gain and its replicates; one whose reference is not positive counts as no gain."""
    references = skill.replicates[:, reference]
    positive = references > 0
    gains = np.where(positive, skill.replicates[:, model] / np.where(positive, references, 1.0) - 1, 0.0)
    return float(skill.means[model] / skill.means[reference] - 1), gains


def seed_interval(values: Sequence[float]) -> Estimate:
    """Mean over training seeds with its 95% interval (Student's t); of one seed, of no width."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return Estimate(mean, mean, mean)
    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Estimate(mean, mean - half, mean + half)


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
