"""Models of equal cost, found from a config: the dense twin of a sparse model, and sparse variants of a dense one.

Depth, width, mixer, vocabulary and positions stay as they are. What is solved for is the width of the FFN, or of one
expert; parameters and FLOPs are linear in it, so that the solution is exact up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from zoo.accounting import count_parameters, training_flops
from zoo.config import ModelConfig, ModelSpec, MoEConfig
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
"""Widths are rounded to this where the tolerance allows: matrix units want aligned rows."""


def measure(config: ModelConfig, by: Quantity, sequence_length: int) -> float:
    """The quantity that models are matched in; ``sequence_length`` in tokens matters to ``flops`` only."""
    if by == "flops":
        return training_flops(config, sequence_length)
    parameters = count_parameters(config)
    return float(parameters.active if by == "active" else parameters.total)


# ---------------------------------------------------------------------------------------------------------------
# Dense twins
# ---------------------------------------------------------------------------------------------------------------


def match(spec: ModelSpec, by: Quantity, sequence_length: int = 4096) -> ModelSpec:
    """Dense twin of ``spec`` as a named model.

    Args:
        spec: a sparse model.
        by: ``active`` parameters, ``total`` parameters, or training ``flops`` per token at ``sequence_length``.
        sequence_length: tokens of a training sequence.

    Raises:
        ValueError: what ``dense_config`` raises.
    """
    try:
        config = dense_config(spec.model, by, sequence_length)
    except ValueError as error:
        raise ValueError(f"{spec.name}: {error}") from None
    at = f" at {sequence_length} tokens" if by == "flops" else ""
    return derived(spec, f"dense-{by}", config, f"dense twin of {spec.name}, equal in {DESCRIPTIONS[by]}{at}")


def dense_config(config: ModelConfig, by: Quantity, sequence_length: int) -> ModelConfig:
    """``config`` without its moe block, with the FFN width that makes it equal in ``by`` within ``TOLERANCE``.

    Raises:
        ValueError: ``config`` is dense already, ``by`` is unknown, or no whole width comes within the tolerance.
    """
    if by not in get_args(Quantity):
        raise ValueError(f"by = {by!r}: use one of {', '.join(get_args(Quantity))}")
    if config.moe is None:
        raise ValueError("every layer is dense already; give a model with a moe block")
    return _solve(
        lambda width: with_ffn_width(config, width),
        lambda candidate: measure(candidate, by, sequence_length),
        measure(config, by, sequence_length),
        f"dense FFN width gives its {DESCRIPTIONS[by]}",
        "intermediate_size",
    )


def with_ffn_width(config: ModelConfig, width: int) -> ModelConfig:
    """``config`` with one dense FFN of ``width`` in every layer."""
    return replace(config, moe=None, intermediate_size=width)


# ---------------------------------------------------------------------------------------------------------------
# Sparse variants
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How a dense FFN becomes experts, in the terms of DeepSeekMoE (arXiv 2401.06066, section 3).

    Of ``granularity * experts - shared`` routed experts a token goes through ``granularity * active - shared``, and
    through all ``shared`` ones. ``experts`` and ``active`` alone are those of GShard and Mixtral.

    Attributes:
        experts: Experts before they are split; experts / active is total to active FFN.
        active: How many of them a token goes through.
        granularity: Fine experts that each is split into.
        shared: Fine experts that every token goes through.

    Raises:
        ValueError: no expert would be left out for a token, or none routed to.
    """

    experts: int
    active: int = 2
    granularity: int = 1
    shared: int = 0

    def __post_init__(self) -> None:
        if self.granularity < 1 or self.shared < 0 or self.active < 1:
            raise ValueError(f"{self}: give active >= 1, granularity >= 1 and shared >= 0")
        if self.experts <= self.active:
            raise ValueError(
                f"experts = {self.experts}: with active = {self.active} every expert is computed; give more experts"
            )
        if self.top_k < 1:
            raise ValueError(
                f"shared = {self.shared}: of granularity * active = {self.granularity * self.active} experts at least "
                "one must be routed to; give fewer shared experts"
            )

    @property
    def num_experts(self) -> int:
        """Routed experts."""
        return self.granularity * self.experts - self.shared

    @property
    def top_k(self) -> int:
        """Routed experts of one token."""
        return self.granularity * self.active - self.shared

    @property
    def label(self) -> str:
        """Short name such as e8k2g4s1."""
        return f"e{self.experts}k{self.active}g{self.granularity}s{self.shared}"


def sparsify(spec: ModelSpec, sparsity: Sparsity) -> ModelSpec:
    """The variant of the dense model ``spec`` that has ``sparsity`` and as many active parameters.

    Raises:
        ValueError: what ``sparse_config`` raises.
    """
    try:
        config = sparse_config(spec.model, sparsity)
    except ValueError as error:
        raise ValueError(f"{spec.name}: {error}") from None
    return derived(spec, sparsity.label, config, f"{spec.name} made sparse, equal in active parameters")


def sparse_config(config: ModelConfig, sparsity: Sparsity) -> ModelConfig:
    """``config`` with experts in every layer, of the width that keeps the active parameters within ``TOLERANCE``.

    The router is softmax; the weights of a token's experts are renormalised, but for one expert, whose weight would
    always be 1.

    Raises:
        ValueError: ``config`` is sparse already, or no whole width comes within the tolerance.
    """
    if config.moe is not None:
        raise ValueError("it has experts already; give a dense model")

    def sparse(width: int) -> ModelConfig:
        moe = MoEConfig(
            num_experts=sparsity.num_experts,
            top_k=sparsity.top_k,
            moe_intermediate_size=width,
            score_func="softmax",
            norm_topk_prob=sparsity.top_k > 1,
            num_shared_experts=sparsity.shared,
        )
        # No layer reads the dense width any more; layouts such as Mixtral's have one field for it and the experts'.
        return replace(config, moe=moe, intermediate_size=width)

    return _solve(
        sparse,
        lambda candidate: measure(candidate, "active", 1),
        measure(config, "active", 1),
        f"expert width gives {sparsity.label} its {DESCRIPTIONS['active']}",
        "moe_intermediate_size",
    )


def derived(spec: ModelSpec, suffix: str, config: ModelConfig, reference: str) -> ModelSpec:
    """A model made from ``spec``, of the first family that can hold it, or of none."""
    return ModelSpec(name=f"{spec.name}-{suffix}", family=expressible(config), model=config, reference=reference)


def _solve(
    build: Callable[[int], ModelConfig],
    cost: Callable[[ModelConfig], float],
    target: float,
    sought: str,
    field: str,
) -> ModelConfig:
    """The config whose ``cost``, linear in the width that ``build`` takes, is ``target`` within ``TOLERANCE``."""

    def difference(width: int) -> float:
        return cost(build(width)) / target - 1

    at_one, at_two = cost(build(1)), cost(build(2))
    exact = 1 + (target - at_one) / (at_two - at_one)
    aligned, nearest = (max(step, round(exact / step) * step) for step in (MULTIPLE, 1))
    width = aligned if abs(difference(aligned)) <= TOLERANCE else nearest
    if abs(difference(width)) > TOLERANCE:
        raise ValueError(
            f"no {sought} ({target:,.0f}) within {TOLERANCE:.0%}; "
            f"the nearest, {field} = {width}, differs by {difference(width):+.1%}"
        )
    return build(width)
