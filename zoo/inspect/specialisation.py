"""What experts are for: tests on counts that say which findings are more than chance.

Shapes: L MoE layers, V token types, E experts, W windows, D sets of data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, hypergeom

from zoo.harness.significance import SIGNIFICANCE, holm_array
from zoo.harness.statistics import Array

Counts = NDArray[np.int64]

MINIMUM = 10
"""Occurrences that a token type must have to be tested. Chosen before the routing is seen, so it favours no expert."""

PERMUTATIONS = 1999
"""Of windows among the sets of data: p-values down to 1 in 2000, which Holm's correction for 90 layers leaves room."""


@dataclass(frozen=True)
class Specialist:
    """A token type that goes to an expert more often than chance."""

    layer: int
    expert: int
    type: int
    """Index of the token type, expert of its layer and layer, as in the counts."""
    count: int
    """Occurrences that go to the expert."""
    occurrences: int
    pmi: float
    """log2 of the share of its occurrences over that of all tokens: pointwise mutual information, in bits."""
    residual: float
    """Standard deviations above what chance gives."""
    p_holm: float


def specialists(counts: Counts, occurrences: Counts, totals: Counts, tokens: int) -> list[Specialist]:
    """The pairs of token type and expert that are together more often than chance, strongest residual first.

    If which tokens go to an expert had nothing to do with what they are, then of the occurrences of a type the number
    that goes there were hypergeometric, whatever K is and however the other experts are loaded: Fisher's exact test,
    one-sided. Its p-values are corrected by Holm for all layers, types and experts.

    Args:
        counts: [L, V, E] occurrences of each type that go to each expert.
        occurrences: [V], ``MINIMUM`` or more each.
        totals: [L, E] tokens that go to each expert.
        tokens: all there are.
    """
    seen, share = np.broadcast_to(occurrences[:, None], counts.shape), totals[:, None, :] / tokens
    goes = np.broadcast_to(totals[:, None, :], counts.shape)
    expected = seen * share
    # What is not above chance has a p-value about a half or more, which no correction lowers; exact ones take time.
    above = counts > expected
    p_values = np.ones(counts.shape)
    p_values[above] = hypergeom.sf(counts[above] - 1, tokens, goes[above], seen[above])
    adjusted = holm_array(p_values)
    spread = np.sqrt(expected * (1 - share) * (tokens - seen) / max(1, tokens - 1))
    found = [
        Specialist(
            layer=int(layer),
            expert=int(expert),
            type=int(kind),
            count=int(counts[layer, kind, expert]),
            occurrences=int(occurrences[kind]),
            pmi=float(np.log2(counts[layer, kind, expert] / expected[layer, kind, expert])),
            residual=float((counts - expected)[layer, kind, expert] / spread[layer, kind, expert]),
            p_holm=float(adjusted[layer, kind, expert]),
        )
        for layer, kind, expert in np.argwhere(adjusted <= SIGNIFICANCE)
    ]
    return sorted(found, key=lambda s: -s.residual)


@dataclass(frozen=True)
class PairTests:
    """How often two experts of one layer are chosen together, against what their loads explain."""

    expected: Array
    """[L, E, E] tokens."""
    p_holm: Array
    """[L, E, E], corrected over all pairs and layers; 1 on the diagonal."""


def pair_tests(pairs: Counts, expected: Array, tokens: int) -> PairTests:
    """Whether pairs of experts are chosen together more or less often than ``expected``: exact binomial tests.

    Args:
        pairs: [L, E, E] tokens that go to both experts.
        expected: [L, E, E], of ``expected_co_activations``.
        tokens: all there are.
    """
    share = np.clip(expected / tokens, 0, 1)
    p_values = np.minimum(1, 2 * np.minimum(binom.cdf(pairs, tokens, share), binom.sf(pairs - 1, tokens, share)))
    upper = np.triu_indices(pairs.shape[-1], k=1)
    adjusted = np.ones_like(p_values)
    adjusted[:, *upper] = holm_array(p_values[:, *upper])
    adjusted = np.minimum(adjusted, adjusted.transpose(0, 2, 1))
    return PairTests(expected, adjusted)


@dataclass(frozen=True)
class DomainTests:
    """How much an assignment's expert says about which set of data it comes from, by layer."""

    information: Array
    """[L] bits, the mutual information of set and expert in the counts."""
    by_chance: Array
    """[L] bits, its mean where windows are dealt out to the sets at random: counts always share some."""
    p_holm: Array
    """[L], of the permutation test, corrected over layers."""


def domain_tests(windows: Counts, labels: Counts, seed: int) -> DomainTests:
    """Whether sets of data use other experts than each other: a permutation test that moves whole windows.

    Tokens of one window are alike for many reasons, so it is windows and not tokens that count as independent.

    Args:
        windows: [W, L, E] assignments.
        labels: [W], the set of data, from 0 on, that each window is of.
        seed: of the permutations.
    """
    sets = np.eye(labels.max() + 1)[labels]
    generator = np.random.default_rng(seed)
    flat = windows.reshape(len(windows), -1).astype(np.float64)

    def information(rows: Array) -> Array:
        return mutual_information((rows.T @ flat).reshape(rows.shape[1], *windows.shape[1:]).transpose(1, 0, 2))

    found = information(sets)
    permuted = np.array([information(sets[generator.permutation(len(sets))]) for _ in range(PERMUTATIONS)])
    p_values = (1 + (permuted >= found - 1e-12).sum(axis=0)) / (1 + PERMUTATIONS)
    return DomainTests(found, permuted.mean(axis=0), holm_array(p_values))


def mutual_information(table: Array) -> Array:
    """table [..., D, E] of counts → [...], the mutual information of row and column in bits."""
    joint = table / table.sum(axis=(-2, -1), keepdims=True)
    product = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(joint > 0, joint * np.log2(joint / product), 0.0)
    result: Array = terms.sum(axis=(-2, -1)).clip(min=0)
    return result
