"""What every benchmark takes and gives."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

OURS = "zoo"
LIMIT = "limit"


@dataclass(frozen=True)
class Options:
    """How to measure."""

    rounds: int = 7
    """Interleaved rounds, of which medians are taken."""
    threads: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    cases: tuple[str, ...] = ()
    """Parts of names: only cases with one of them are measured; all if empty."""
    checkpoint_bytes: int = 10**9
    """About so large is the checkpoint that is loaded."""
    cache: Path = Path.home() / ".cache" / "moe-zoo" / "bench"
    """Where that checkpoint is kept from one run to the next."""
    data_root: Path | None = None
    """Mirror of the data sets whose tasks are scored; None reads the hub."""

    def wants(self, case: str) -> bool:
        """Whether ``case`` is to be measured: every subject asks before it makes anything for a case."""
        return not self.cases or any(part in case for part in self.cases)


@dataclass(frozen=True)
class Row:
    """One case: times of ours, of peers and of the limit, from the same rounds."""

    bench: str
    """Subject, such as ``layer``."""
    case: str
    """What was computed, such as ``fine, forward + backward, T 2048``."""
    seconds: Mapping[str, Sequence[float]]
    """Way → its time in each round; ``OURS``, maybe ``LIMIT``, all others are peers or variants of them."""
    bytes: Mapping[str, int] = field(default_factory=dict)
    """Way → peak memory beyond what was there before, where that was measured."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Further figures of the case, as JSON takes them; the text ``remark`` is shown in tables."""

    @property
    def best_peer(self) -> str | None:
        """The fastest peer by its median."""
        peers = [way for way in self.seconds if way not in (OURS, LIMIT)]
        return min(peers, key=self.median, default=None)

    def median(self, way: str) -> float:
        """Median time of ``way`` in seconds."""
        return statistics.median(self.seconds[way])

    def ratio(self, way: str) -> float:
        """Median over the rounds of the time of ``way`` over ours: above 1 we are faster."""
        return statistics.median(self._ratios(way))

    def quartiles(self, way: str) -> tuple[float, float]:
        """Lower and upper quartile of what ``ratio`` is the median of."""
        ratios = self._ratios(way)
        if len(ratios) == 1:
            return ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    def _ratios(self, way: str) -> list[float]:
        return [theirs / ours for theirs, ours in zip(self.seconds[way], self.seconds[OURS], strict=True)]

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory of ours over that of the fastest peer; None where one of them was not measured."""
        peer = self.best_peer
        if peer is None or OURS not in self.bytes or not self.bytes.get(peer):
            return None
        return self.bytes[OURS] / self.bytes[peer]
