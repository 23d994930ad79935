"""The dense twin of a sparse model, found from its config: same depth, width, mixer, vocabulary and positions.

Every layer of the twin has one dense SwiGLU FFN, whose width is solved for. Parameters and FLOPs are linear in that
width, so that the solution is exact up to rounding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from zoo.accounting import count_parameters, training_flops
from zoo.config import ModelConfig, ModelSpec
from zoo.families import expressible

Quantity = Literal["active", "total", "flops"]

DESCRIPTIONS: dict[Quantity, str] = {
    "active": "active parameters",
    "total": "total parameters",
    "flops": "training FLOPs per token",
}
TOLERANCE = 0.01
"""Largest relative difference in the matched quantity."""

MULTIPLE = 8
"""FFN widths are rounded to this where the tolerance allows: matrix units want aligned rows."""


def measure(config: ModelConfig, by: Quantity, sequence_length: int) -> float:
    """The quantity that twins are matched in; ``sequence_length`` in tokens matters to ``flops`` only."""
    if by == "flops":
        return training_flops(config, sequence_length)
    parameters = count_parameters(config)
    return float(parameters.active if by == "active" else parameters.total)


def match(spec: ModelSpec, by: Quantity, sequence_length: int = 4096) -> ModelSpec:
    """Dense twin of ``spec`` as a named model, of a family that can export it.

    Args:
        spec: a sparse model.
        by: ``active`` parameters, ``total`` parameters, or training ``flops`` per token at ``sequence_length``.
        sequence_length: tokens of a training sequence.

    Raises:
        ValueError: what ``dense_config`` raises, or no family of the zoo can express the twin.
    """
    try:
        config = dense_config(spec.model, by, sequence_length)
        family = expressible(config)
    except ValueError as error:
        raise ValueError(f"{spec.name}: {error}") from None
    at = f" at {sequence_length} tokens" if by == "flops" else ""
    return ModelSpec(
        name=f"{spec.name}-dense-{by}",
        family=family,
        model=config,
        reference=f"dense twin of {spec.name}, equal in {DESCRIPTIONS[by]}{at}",
    )


def dense_config(config: ModelConfig, by: Quantity, sequence_length: int) -> ModelConfig:
    """``config`` without its moe block, with the FFN width that makes it equal in ``by`` within ``TOLERANCE``.

    Raises:
        ValueError: ``config`` is dense already, ``by`` is unknown, or no whole width comes within the tolerance.
    """
    if by not in get_args(Quantity):
        raise ValueError(f"by = {by!r}: use one of {', '.join(get_args(Quantity))}")
    if config.moe is None:
        raise ValueError("every layer is dense already; give a model with a moe block")
    target = measure(config, by, sequence_length)

    def dense(width: int) -> ModelConfig:
        return replace(config, moe=None, intermediate_size=width)

    def difference(width: int) -> float:
        return measure(dense(width), by, sequence_length) / target - 1

    at_one, at_two = (measure(dense(width), by, sequence_length) for width in (1, 2))
    exact = 1 + (target - at_one) / (at_two - at_one)
    aligned, nearest = (max(step, round(exact / step) * step) for step in (MULTIPLE, 1))
    width = aligned if abs(difference(aligned)) <= TOLERANCE else nearest
    if abs(difference(width)) > TOLERANCE:
        raise ValueError(
            f"no dense FFN width gives its {DESCRIPTIONS[by]} ({target:,.0f}) within {TOLERANCE:.0%}; "
            f"the nearest, intermediate_size = {width}, differs by {difference(width):+.1%}"
        )
    return dense(width)
