"""What is to be measured of a run, as one process hands it to another."""

from __future__ import annotations

from dataclasses import dataclass

EVALUATION_BATCH = 64
"""Requests in one forward. Fixed, so that batching cannot make models differ."""


@dataclass(frozen=True)
class Point:
    """One checkpoint of a run."""

    weights: str
    """Directory of its checkpoint."""
    samples: str
    """Directory for lm-eval's files."""
    file: str
    """Where what is measured goes, as JSON."""
    last: bool
    """Whether training ended here: then it is also measured which experts fire for which task."""


@dataclass(frozen=True)
class Measurement:
    """What is measured of one run."""

    name: str
    tokenizer: str
    points: tuple[Point, ...]
    tasks: tuple[str, ...]
    data_root: str | None
    limit: int | None
    seed: int
    data: str
    """Token data with the validation split."""
    sequence_length: int
    batch_size: int
    """Sequences of validation in one forward."""
