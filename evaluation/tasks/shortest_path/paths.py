"""Scores of shortest paths, for lm-eval's ``process_results``. Runs wherever lm-eval does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """``acc`` is 1 for a shortest path, 0 for anything else."""
    return {"acc": float(is_shortest_path(doc, results[0].split()))}


def is_shortest_path(doc: Mapping[str, Any], path: Sequence[str]) -> bool:
    """Whether ``path`` leads from the source to the target along edges, and no path has fewer of them."""
    edges = {frozenset(edge) for edge in doc["edges"]}
    return (
        len(path) == doc["distance"] + 1
        and path[0] == doc["source"]
        and path[-1] == doc["target"]
        and all(frozenset(step) in edges for step in pairwise(path))
    )
