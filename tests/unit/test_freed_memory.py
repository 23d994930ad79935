"""Memory that is freed and asked for again: whether the system has to hand out its pages anew."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

PAGES = (100 << 20) // resource.getpagesize()
CODE = """
import resource
import torch
from zoo.training.memory import freed_memory_kept


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(100 << 20, dtype=torch.uint8)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 3


def settled():
    return [faults() for _ in range(8)][-1]  # the heap grows by a few blocks first


def resident():
    return int(open("/proc/self/statm").read().split()[1])


outside, before = settled(), resident()
with freed_memory_kept() as kept:
    with freed_memory_kept():
        pass  # the end of this one changes nothing
    inside, during = settled(), resident()
print(kept, outside, inside, during - before, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries go on as they are")
def test_pages_are_asked_for_once_within_the_block_and_given_back_after_it() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    kept, *pages = result.stdout.split()
    outside, inside, during, after = map(int, pages)
    assert kept == "True"
    assert outside > 0.9 * PAGES and inside < 0.01 * PAGES
    assert during > 0.9 * PAGES and after < 0.1 * PAGES
