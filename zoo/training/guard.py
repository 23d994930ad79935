"""Which optimizer steps are not taken: those that are not finite, and loss spikes."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """Skip steps whose loss or gradient norm lies far above those of the last steps that were taken.

    Far is more than ``threshold`` robust standard deviations (1.4826 times the median distance from the median, and at
    least 1% of it) above their median. Nothing is skipped before ``window`` steps were taken.

    Attributes:
        threshold: In robust standard deviations.
        window: Steps that median and deviation are taken over.
        max_in_a_row: Spikes in a row that are skipped. The next one is no spike but the new state of affairs: it is
            taken, and a new window begins.

    Raises:
        ValueError: a number that makes no sense.
    """

    threshold: float = 6.0
    window: int = 100
    max_in_a_row: int = 5

    def __post_init__(self) -> None:
        if self.threshold <= 0:
            raise ValueError(f"spikes.threshold = {self.threshold}: give a positive number")
        if self.window < 3:
            raise ValueError(f"spikes.window = {self.window}: give 3 steps or more")
        if self.max_in_a_row < 1:
            raise ValueError(f"spikes.max_in_a_row = {self.max_in_a_row}: give 1 or more")


@dataclass
class SkippedSteps:
    """Steps that moved nothing."""

    total: int = 0
    in_a_row: int = 0
    """Of those whose loss or gradient norm was not finite, up to the last step; 0 if that was not one."""
    spikes: int = 0
    """Of ``total``, those that were finite."""
    spikes_in_a_row: int = 0
    recent: list[list[float]] = field(default_factory=list)
    """[loss, gradient norm] of the last steps taken, as many as spikes are measured by."""

    @property
    def last(self) -> bool:
        """Whether the last step was skipped."""
        return self.in_a_row > 0 or self.spikes_in_a_row > 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self)

    def spike(self, config: SpikeConfig, values: list[float]) -> str | None:
        """What of ``values``, [loss, gradient norm], lies far above the last steps, if anything does."""
        if len(self.recent) < config.window or self.spikes_in_a_row >= config.max_in_a_row:
            return None
        for name, value, before in zip(("loss", "gradient norm"), values, zip(*self.recent, strict=True), strict=True):
            limit = robust_limit(before, config.threshold)
            if value > limit:
                return f"{name} {value:.4g} is above {limit:.4g}"
        return None

    def count_taken(self, config: SpikeConfig | None, values: list[float]) -> None:
        """Count a step that is taken, with its [loss, gradient norm]."""
        if config is not None:
            # After so many spikes this is the level from now on.
            kept = [] if self.spikes_in_a_row >= config.max_in_a_row else self.recent[1 - config.window :]
            self.recent = [*kept, values]
        self.in_a_row = self.spikes_in_a_row = 0

    def count_spike(self) -> None:
        """Count a finite step that is skipped."""
        self.total += 1
        self.spikes += 1
        self.in_a_row = 0
        self.spikes_in_a_row += 1

    def count_not_finite(self) -> None:
        """Count a step that is skipped because it is not finite."""
        self.total += 1
        self.in_a_row += 1
        self.spikes_in_a_row = 0


def robust_limit(values: tuple[float, ...], threshold: float) -> float:
    """Median of ``values`` plus ``threshold`` robust standard deviations."""
    middle = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
    limit = middle + threshold * max(deviation, 0.01 * abs(middle))
    assert math.isfinite(limit)
    return limit
