"""The order in which train rows are trained on and asked about. Runs wherever lm-eval does."""

from __future__ import annotations

from datasets import Dataset


def shuffled(docs: Dataset) -> Dataset:
    """``docs`` in one random order, so that the first of them are a sample of all: neighbours often share a passage."""
    return docs.shuffle(seed=0)
