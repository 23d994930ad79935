"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of mallopt(3)."""
NEVER = -1
MMAPS, LARGEST_MMAP_THRESHOLD = 1 << 16, 32 << 20
"""Defaults of glibc: how many blocks it maps at once, and from what size at the most it comes to map each."""


_blocks = 0
"""Those that the process is in."""


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Have the process keep what is freed within the block; yields whether it does. Blocks may be in one another.

    A training step frees gradients and activations, and the next asks for as much; so it is with one batch of texts to
    score after the other. The C library gives large blocks back to the system by default, which fills every page with
    zeros when it is touched again: a sixth of the step of a model with 64 experts, and of scoring long texts with a
    dense one. The process then keeps what it needs at its most; the peak grows by a hundredth. At the end all is given
    back, which costs more than it saves around a few small batches. With other C libraries than glibc all stays as it
    is. Memory of a GPU has torch's own cache.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, malloc_trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: on Windows
        yield False
        return
    global _blocks
    _blocks += 1
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, NEVER)
    try:
        yield True
    finally:
        _blocks -= 1
        if not _blocks:
            # What glibc's own adjustment comes to after a few large blocks; it does not take up again.
            mallopt(MMAP_MAX, MMAPS)
            mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
            mallopt(TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)
            malloc_trim(0)
