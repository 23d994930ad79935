"""A command in a process of its own ends by itself, when it is told to, and with the process that started it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

import pytest

from zoo.harness.child import run_command

STUDY = """
import sys
from threading import Event
from zoo.harness.child import run_command
run_command(["compare", sys.argv[1]], 1, Event())
"""


def alive(marker: str) -> list[str]:
    """Processes whose command line ends with ``marker``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        except OSError:
            continue
        if command[-1] == marker.encode() and b"zoo.harness.child" in command:
            found.append(process.name)
    return found


def test_a_command_that_ends_gives_its_code_time_and_memory(capfd: pytest.CaptureFixture[str]) -> None:
    ended = run_command(["card", "nonsense"], 1, Event(), "first")
    assert ended is not None and ended.code == 2 and ended.wall_seconds > 0 and ended.peak_memory > 2**20
    assert "first: zoo: error: 'nonsense'" in capfd.readouterr().err


def test_a_command_that_is_stopped_gives_nothing() -> None:
    stop = Event()
    stop.set()
    assert run_command(["card", "mixtral-8x7b"], 1, stop) is None


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_command_dies_with_its_parent_killed(tmp_path: Path) -> None:
    """It reads a pipe that nobody writes into, and would for ever."""
    pipe = tmp_path / "study.yaml"
    os.mkfifo(pipe)
    parent = subprocess.Popen([sys.executable, "-c", STUDY, str(pipe)])
    writing_end = opened_for_writing(pipe, seconds=60)
    assert alive(str(pipe))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while alive(str(pipe)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(str(pipe))
    os.close(writing_end)


def opened_for_writing(pipe: Path, seconds: float) -> int:
    """Wait until somebody reads ``pipe``."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
