"""Runs on several processes that lose one, or are told to stop."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_strategy import FIT, arguments, run_fit

from zoo.parallel.supervise import REQUEUE
from zoo.training.checkpoint import CHECKPOINTS, list_checkpoints

MORE = ("--trainer.max_steps", "40", "--checkpoint.every_n_steps", "1", "--trainer.val_check_interval", "1000")
RESULTS = ("metrics.csv", "expert_load.jsonl", "final/model.safetensors")


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Ranks that ``process`` started; not the git commands that record the commit."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(pid) for pid in listed if b"LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]
    return []


def wait_until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{seconds} s without {what}"
        time.sleep(0.001)


class TwoRanks:
    """``zoo fit`` with two processes, started as a user does."""

    def __init__(self, argv: list[str], repository: Path, log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            self._first = subprocess.Popen([*FIT, *argv], cwd=repository, stdout=file, stderr=file, text=True)

    def __enter__(self) -> TwoRanks:
        wait_until(lambda: bool(ranks_of(self._first)), 100, "a second process")
        self.pids = [self._first.pid, *ranks_of(self._first)]
        return self

    def __exit__(self, *error: object) -> None:
        for pid in filter(alive, self.pids):
            os.kill(pid, signal.SIGKILL)
        self._first.wait()

    def end(self, rank: int, number: signal.Signals) -> tuple[int, str]:
        """(exit code of the process that was started, its output) after a signal to ``rank``; both end within 60 s."""
        os.kill(self.pids[rank], number)
        wait_until(lambda: self._first.poll() is not None, 60, "the end of the first process")
        wait_until(lambda: not alive(self.pids[1]), 60, "the end of the second process")
        return self._first.returncode, self._log.read_text()


@pytest.fixture
def reference(fit_config: Path, tmp_path: Path, repository: Path) -> Path:
    """A run that nothing disturbed."""
    run_fit(arguments(fit_config, tmp_path / "reference", "ep2", *MORE), repository)
    return tmp_path / "reference"


@pytest.mark.slow
def test_a_rank_killed_while_it_saves_ends_the_other_and_damages_no_checkpoint(
    fit_config: Path, tmp_path: Path, repository: Path, reference: Path
) -> None:
    run, draw = tmp_path / "run", random.SystemRandom()
    argv = arguments(fit_config, run, "ep2", *MORE)
    for save, rank in ((2, 0), (2, 1), (3, draw.randrange(2))):
        with TwoRanks(argv, repository, tmp_path / "log") as ranks:
            # Every step is saved: wait until some were, and the next is being written.
            before = latest_step(run)
            wait_until(lambda at=before + save: latest_step(run) >= at, 100, f"{save} checkpoints")
            wait_until(lambda: any((run / CHECKPOINTS).glob(".step-*.partial")), 20, "a checkpoint under way")
            time.sleep(draw.uniform(0, 0.03))
            code, output = ranks.end(rank, signal.SIGKILL)
        assert code != 0
        assert f"rank {rank} " in output
        assert not (run / "final").exists()
    run_fit(argv, repository)
    for name in RESULTS:
        assert (run / name).read_bytes() == (reference / name).read_bytes()
    assert [path.name for path in (run / CHECKPOINTS).iterdir()] == ["step-00000040.ckpt"]


def latest_step(run: Path) -> int:
    """Steps that the newest complete checkpoint has behind it."""
    found = list_checkpoints(run)
    return int(found[-1].stem.removeprefix("step-")) if found else 0


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGTERM), (0, signal.SIGUSR1)])
def test_a_run_told_to_stop_saves_its_step_and_goes_on(
    fit_config: Path, tmp_path: Path, repository: Path, reference: Path, rank: int, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    argv = [*arguments(fit_config, run, "ep2", *MORE), "--checkpoint.every_n_steps", "1000"]
    with TwoRanks(argv, repository, tmp_path / "log") as ranks:
        wait_until(lambda: (run / "metrics.csv").exists(), 100, "a step")
        code, output = ranks.end(rank, number)
    assert code == REQUEUE
    assert f"saved step {latest_step(run)}; the same command goes on" in output
    assert 0 < latest_step(run) < 40
    run_fit(argv, repository)
    for name in RESULTS:
        assert (run / name).read_bytes() == (reference / name).read_bytes()


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_rank(
    fit_config: Path, tmp_path: Path, repository: Path, reference: Path
) -> None:
    run = tmp_path / "run"
    elastic = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", *FIT[2:]]
    command = [sys.executable, "-m", "torch.distributed.run", *elastic, *arguments(fit_config, run, "ep2", *MORE)]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (tmp_path / "log").open("w") as log:
        torchrun = subprocess.Popen(command, cwd=repository, stdout=log, stderr=log, env=environment, text=True)
    try:
        wait_until(lambda: latest_step(run) >= 3, 100, "three checkpoints")
        survivor, victim = ranks_of(torchrun)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not alive(survivor), 60, "the end of the other rank")
        assert torchrun.wait(timeout=150) == 0, (tmp_path / "log").read_text()
    finally:
        torchrun.terminate()
        torchrun.wait()
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2
    for name in RESULTS:
        assert (run / name).read_bytes() == (reference / name).read_bytes()
