"""How much memory a computation needs at its peak."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.autograd import profiler


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes that ``function`` holds at any moment beyond what was there before it, in one call.

    On the CPU every block that torch's allocator hands out and takes back is counted, with the temporary ones inside
    operations; scratch space that a library such as oneDNN allocates for itself is not seen. The number is exact
    and the same in every run, where the resident size of a process depends on what the allocator kept. Memory that was
    there before and is freed is not subtracted. On a GPU it is the peak that torch's caching allocator reports.

    Args:
        function: Called once, and slower than usual: warm it up before, and time it elsewhere.
        device: Whose memory is meant: ``cpu`` or a CUDA device.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write of its starts and stops on standard error
    with profiler.profile(profile_memory=True) as profile:
        function()
    assert profile.kineto_results is not None
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
