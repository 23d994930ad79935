"""Times of several ways to do the same thing, taken side by side.

Absolute times on a shared machine drift by a third within minutes: only ratios from the same round mean anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import cycle

import torch

FAR_BEHIND = 2.0
"""A peer that takes so many times as long as the fastest is timed once and left out of the rounds."""


def interleaved(
    ways: Mapping[str, Callable[[], object]], rounds: int, *, warmups: int = 1, repeat: int = 1
) -> dict[str, list[float]]:
    """Seconds that each way takes in each of ``rounds``; every round begins with another way.

    Args:
        ways: Name → function. Each is called ``warmups`` times before anything is timed.
        repeat: Calls that are timed together, for ways that take less than the clock can tell. Of several, as many go
            before without being timed: so short ones are told by what is in the caches, and a way that follows another
            with the same weights would find them there.
    """
    for way in ways.values():
        for _ in range(warmups):
            way()
    names = list(ways)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            way = ways[name]
            for _ in range(repeat if repeat > 1 else 0):
                way()
            wait()
            start = time.perf_counter()
            for _ in range(repeat):
                way()
            wait()
            times[name].append((time.perf_counter() - start) / repeat)
    return times


def reading(size: int, total: int, device: str | torch.device) -> Callable[[], object]:
    """Read ``size`` bytes as fast as the memory gives them: nothing that needs as many can take less.

    Args:
        total: Bytes that take turns in being read, so that no cache holds what it would not hold of these.
    """
    count = size // 4
    table = torch.ones(max(total // 4, count), device=device)
    starts = cycle(range(0, len(table) - count + 1, count))
    return lambda: table[(start := next(starts)) : start + count].sum()


def far_behind(seconds: Mapping[str, float]) -> dict[str, float]:
    """Of the seconds that each way took once, those of the ways that are certainly not the fastest."""
    best = min(seconds.values(), default=0.0)
    return {way: time for way, time in seconds.items() if time > FAR_BEHIND * best}


def left_out(seconds: Mapping[str, float], what: str) -> str:
    """A remark on ways that were not timed after they took so long for ``what``."""
    return ", ".join(f"{way} left out after {what} of {time:.3g} s" for way, time in seconds.items())


def wait() -> None:
    """Let the GPU end what it was given, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
