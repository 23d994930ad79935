"""How much memory a computation needs at its peak."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.autograd import profiler


class Peak:
    """Within ``with Peak() as peak: …``, what is allocated is counted; ``peak.bytes`` is known after it.

    Most bytes that were held at any moment beyond what was there before. On the CPU every block that torch's allocator
    hands out and takes back is counted, with the temporary ones inside operations; scratch space that a library such as
    oneDNN allocates for itself is not seen. The number is exact and the same in every run, where the resident size of a
    process depends on what the allocator kept. Memory that was there before and is freed is not subtracted. On a GPU it
    is the peak that torch's caching allocator reports. Computing is slower meanwhile: time it elsewhere.

    Args:
        device: Whose memory is meant: ``cpu`` or a CUDA device.
    """

    bytes: int

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)

    def __enter__(self) -> Peak:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write of its starts and stops on standard error
            self._profile = profiler.profile(profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        self._profile.__exit__(kind, value, traceback)
        assert self._profile.kineto_results is not None
        events: list[Any] = [event for event in self._profile.kineto_results.events() if event.name() == "[memory]"]
        live = self.bytes = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            self.bytes = max(self.bytes, live)


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """``Peak`` of one call of ``function``; warm it up before."""
    with Peak(device) as peak:
        function()
    return peak.bytes
