"""Weights of losses that change over a training, as pure functions of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A weight that goes from one value to another between two optimizer steps.

    Attributes:
        start: Its value up to ``from_step``.
        end: Its value from ``to_step`` on.
        from_step: Optimizer step, counted from 0, at which it begins to move.
        to_step: Step at which it has arrived; equal to ``from_step`` it jumps there.
        shape: A straight line, or half a cosine, which is flat at both ends.

    Raises:
        ValueError: a negative value or step, steps in the wrong order, or a weight that is 0 throughout.
    """

    start: float
    end: float
    from_step: int = 0
    to_step: int
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        for field in ("start", "end", "from_step"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} = {getattr(self, field)}: give 0 or more")
        if self.to_step < self.from_step:
            raise ValueError(f"to_step = {self.to_step}: give a step not before from_step = {self.from_step}")
        if self.start == self.end == 0:
            raise ValueError("start = end = 0: the weight is 0 throughout; give 0 in place of the ramp")

    def at(self, step: int) -> float:
        """The weight in optimizer step ``step``, counted from 0."""
        if step >= self.to_step:
            return self.end
        done = max(step - self.from_step, 0) / (self.to_step - self.from_step) if self.to_step > self.from_step else 0.0
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


Weight = float | Ramp
"""Of a loss: one number for the whole training, or a ramp. Only the number 0 is false."""


def weight_at(weight: Weight, step: int) -> float:
    """The weight in optimizer step ``step``, counted from 0."""
    return weight.at(step) if isinstance(weight, Ramp) else weight


def check_weight(name: str, weight: Weight) -> None:
    """Raise ``ValueError`` where the weight of key ``name`` of the model is a negative number."""
    if not isinstance(weight, Ramp) and weight < 0:
        raise ValueError(f"model.{name} = {weight}: give 0 or more")
