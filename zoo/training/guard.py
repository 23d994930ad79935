"""Which optimizer steps are not taken: those that are not finite, and loss spikes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


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


class StepGuard:
    """Decides of every optimizer step whether it is taken, and remembers what that depends on.

    Args:
        max_not_finite: Steps in a row that may be skipped because they are not finite.
        spikes: What else is skipped, if anything.

    Raises:
        ValueError: a negative number.
    """

    def __init__(self, max_not_finite: int, spikes: SpikeConfig | None) -> None:
        if max_not_finite < 0:
            raise ValueError(f"model.max_skipped_steps = {max_not_finite}: give 0 or more")
        self.max_not_finite = max_not_finite
        self.spikes = spikes
        self.skipped = SkippedSteps()

    @property
    def skipped_last(self) -> bool:
        """Whether the last step was skipped."""
        return self.skipped.in_a_row > 0 or self.skipped.spikes_in_a_row > 0

    def not_finite(self, step: int, name: str, where: str) -> str:
        """Count a step in which the value ``name`` is not finite, because of ``where``.

        Args:
            step: Counted from 1.

        Returns:
            A line that says so.

        Raises:
            ValueError: there were too many in a row.
        """
        before = self.skipped.in_a_row
        if before == self.max_not_finite:
            raise ValueError(
                f"training {name} = nan at step {step}, after {before} skipped steps in a row, {where}: the run is "
                "stopped before the update; lower model.optimizer.lr, lengthen model.schedule.warmup_steps, or set "
                "trainer.gradient_clip_val"
            )
        self.skipped.total += 1
        self.skipped.in_a_row += 1
        self.skipped.spikes_in_a_row = 0
        return f"step {step} is skipped: training {name} is not finite, {where}"

    def finite(self, step: int, values: Tensor, agree: Callable[[bool], bool]) -> str | None:
        """Count a step with finite ``values``, loss and gradient norm.

        Args:
            step: Counted from 1.
            agree: Whether any rank holds it for a spike; rounding may differ where ranks add in another order.

        Returns:
            A line if it is a spike, and to be skipped.
        """
        state = self.skipped
        state.in_a_row = 0
        if self.spikes is None:
            return None
        numbers = values.tolist()
        spike = self._spike(self.spikes, numbers)
        if agree(spike is not None):
            state.total += 1
            state.spikes += 1
            state.spikes_in_a_row += 1
            return f"step {step} is skipped: {spike or 'a spike on another rank'}"
        # After so many spikes this is the level from now on.
        kept = [] if state.spikes_in_a_row >= self.spikes.max_in_a_row else state.recent[1 - self.spikes.window :]
        state.recent = [*kept, numbers]
        state.spikes_in_a_row = 0
        return None

    def _spike(self, config: SpikeConfig, values: list[float]) -> str | None:
        """What of ``values`` lies far above the last steps, if anything does."""
        before = self.skipped.recent
        if len(before) < config.window or self.skipped.spikes_in_a_row >= config.max_in_a_row:
            return None
        for name, value, usual in zip(("loss", "gradient norm"), values, zip(*before, strict=True), strict=True):
            limit = robust_limit(usual, config.threshold)
            if value > limit:
                return f"{name} {value:.4g} is above {limit:.4g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self.skipped)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped = SkippedSteps(**state)


def robust_limit(values: tuple[float, ...], threshold: float) -> float:
    """Median of ``values`` plus ``threshold`` robust standard deviations."""
    middle = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return middle + threshold * max(deviation, 0.01 * abs(middle))
