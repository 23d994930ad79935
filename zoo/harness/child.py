"""A command in a process of its own, which does not outlive the process that started it, however that ends.

The starting process holds one end of a pipe and never writes into it. The system closes that end with the process, also
on ``kill -9``, and then sends SIGIO, which ends whoever does not handle it, to the child and all that it started. No
code of the child takes part: one that is busy in a library, or importing it, ends as soon.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import IO, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.01, 0.2
"""Between looks at a command, at first and at most: the pause doubles."""

_STANDARD_ERROR = 2


@dataclass(frozen=True)
class Ended:
    """What a command took that ended by itself."""

    code: int
    wall_seconds: float
    peak_memory: int
    """Largest resident memory, bytes; 0 where the system has no /proc."""


def run_command(
    arguments: Sequence[str], threads: int, stop: Event, name: str | None = None, module: str = "zoo.cli.main"
) -> Ended | None:
    """Run ``main(arguments)`` of ``module``, by default the ``zoo`` command, to its end.

    Args:
        threads: of its computations.
        stop: once set, the command is ended.
        name: printed before each line of its output, all of which goes to this process's standard error.

    Returns:
        ``None`` where it was stopped.
    """
    began, peak = time.monotonic(), 0
    pause, longest = _POLL_SECONDS
    process = subprocess.Popen(
        [sys.executable, "-m", "zoo.harness.child", module, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.PIPE,  # the pipe that tells of this process's end
        # Standard output is the study's own, which may be one JSON document.
        stdout=subprocess.PIPE if name else _STANDARD_ERROR,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    if process.stdout is not None:
        Thread(target=_forward, args=(process.stdout, name), daemon=True).start()
    try:
        while process.poll() is None and not stop.is_set():
            peak = max(peak, _peak_memory(process.pid))
            time.sleep(pause)
            pause = min(2 * pause, longest)
    finally:
        process.terminate()
        code = process.wait()
        assert process.stdin is not None
        process.stdin.close()
    return None if stop.is_set() else Ended(code, time.monotonic() - began, peak)


def side_by_side(do: Callable[[T], None], runs: Sequence[T], jobs: int, stop: Event) -> None:
    """``do`` every run in turn, ``jobs`` of them at a time; ``stop`` is set where one fails."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(do, run) for run in runs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()  # the others end now, and go on when the study does
            raise


def _forward(lines: IO[str], name: str) -> None:
    for line in lines:
        if line.strip():
            print(f"{name}: {line.rstrip()}\n", end="", file=sys.stderr, flush=True)


def _peak_memory(pid: int) -> int:
    """Largest resident memory of a running process so far, in bytes; 0 where the system has no /proc.

    Not getrusage's, which on Linux counts what the parent held when it started the process.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _end_with_parent() -> None:
    """Have this process group ended when the other end of standard input is closed."""
    fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([0], [], [], 0)[0]:  # it was closed before
        sys.exit(1)


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
