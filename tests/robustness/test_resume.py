"""Runs that are killed, run out of disk, or meet another process."""

from __future__ import annotations

import contextlib
import csv
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.parallel.supervise import REQUEUE
from zoo.training.checkpoint import AtomicCheckpointIO, RandomState
from zoo.training.fit import fit
from zoo.training.run import RunDirectory

RESULTS = ("metrics.csv", "expert_load.jsonl", "final/model.safetensors")


def arguments(config: Path, run: Path, *more: str) -> list[str]:
    return ["--config", str(config), "--trainer.default_root_dir", str(run), "--trainer.max_steps", "60", *more]


def end_at_step(argv: list[str], run: Path, step: int, number: signal.Signals, repository: Path) -> int:
    """Start ``zoo fit`` in a process of its own, send it a signal as soon as it has logged ``step``: its exit code."""
    process = subprocess.Popen([sys.executable, "-m", "zoo.cli.main", "fit", *argv], cwd=repository)
    try:
        metrics = run / "metrics.csv"
        while process.poll() is None:
            # The step is the only integer that stands alone between commas.
            if metrics.exists() and f",{step}," in metrics.read_text():
                process.send_signal(number)
                break
            time.sleep(0.002)
        return process.wait(timeout=60)
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("accumulate", "signals"),
    [
        (2, [signal.SIGKILL, signal.SIGTERM]),
        pytest.param(1, [signal.SIGKILL, signal.SIGUSR1, signal.SIGKILL], marks=pytest.mark.slow),
    ],
    ids=["accumulated", "one_micro_batch"],
)
def test_a_run_that_is_killed_or_told_to_stop_goes_on_as_if_it_had_never_stopped(
    fit_config: Path, tmp_path: Path, repository: Path, accumulate: int, signals: list[signal.Signals]
) -> None:
    # Dropout and jitter, so that every step draws random numbers.
    random_numbers = ("--model.overrides.dropout", "0.1", "--model.overrides.moe.routing.jitter", "0.1")
    more = ("--trainer.accumulate_grad_batches", str(accumulate), *random_numbers)
    assert fit(arguments(fit_config, tmp_path / "whole", *more)) == 0

    run = tmp_path / "killed"
    argv = arguments(fit_config, run, *more)
    steps = sorted(random.SystemRandom().sample(range(3, 45), len(signals)))
    for step, number in zip(steps, signals, strict=True):
        code = end_at_step(argv, run, step, number, repository)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else REQUEUE), f"the run ended before step {step}"
        if number != signal.SIGKILL:
            # All steps that were taken are saved, though the next checkpoint was not due.
            assert rows(run)[-1] == RunDirectory(run).latest_step >= step
    assert not (run / "final").exists()
    assert fit(argv) == 0
    for name in RESULTS:
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), f"{name}, {signals} at {steps}"


def rows(run: Path) -> list[int]:
    """Steps that are logged."""
    with (run / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


@pytest.fixture
def stopped_run(fit_config: Path, tmp_path: Path) -> Path:
    """A run of 24 steps as a kill after step 15 would have left it."""
    assert fit(["--config", str(fit_config), "--checkpoint.keep", "9"]) == 0
    run = tmp_path / "run"
    shutil.move(run / "final", tmp_path / "reference")
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.stem > "step-00000015":
            checkpoint.unlink()
    return run


def test_a_run_killed_between_its_last_step_and_its_model_only_saves_the_model(
    fit_config: Path, tmp_path: Path
) -> None:
    argv = ["--config", str(fit_config), "--trainer.max_steps", "20"]
    assert fit(argv) == 0
    run = tmp_path / "run"
    before = {name: (run / name).read_bytes() for name in RESULTS}
    shutil.rmtree(run / "final")
    assert fit(argv) == 0
    assert {name: (run / name).read_bytes() for name in RESULTS} == before


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing past ``size`` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(stopped_run: Path, fit_config: Path, tmp_path: Path) -> None:
    newest = stopped_run / "checkpoints" / "step-00000015.ckpt"
    before = newest.read_bytes()
    argv = ["--config", str(fit_config), "--checkpoint.keep", "9"]
    with (
        file_size_limit(len(before) // 2),
        pytest.raises(OSError, match=r"step-00000020.ckpt: cannot write .* too large"),
    ):
        fit(argv)
    assert newest.read_bytes() == before
    assert max(path.name for path in newest.parent.iterdir()) == newest.name
    assert fit(argv) == 0
    final = (stopped_run / "final" / "model.safetensors").read_bytes()
    assert final == (tmp_path / "reference" / "model.safetensors").read_bytes()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(3)}, path)
    before = path.read_bytes()
    with file_size_limit(len(before)), pytest.raises(OSError, match="earlier checkpoints are intact"):
        AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(10_000)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_resuming_with_another_config_is_refused(stopped_run: Path, fit_config: Path) -> None:
    with pytest.raises(ValueError, match=r"model.optimizer.lr = 0.1: the run in .* was started with 0.003"):
        fit(["--config", str(fit_config), "--model.optimizer.lr", "0.1"])


def test_only_data_is_unpickled_on_resume(stopped_run: Path, fit_config: Path, tmp_path: Path) -> None:
    checkpoint = stopped_run / "checkpoints" / "step-00000015.ckpt"
    torch.save({**torch.load(checkpoint, weights_only=True), "extra": _Touch(tmp_path / "owned")}, checkpoint)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        fit(["--config", str(fit_config), "--checkpoint.keep", "9"])
    assert not (tmp_path / "owned").exists()


class _Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mknod, (str(self.path),))


def _own(run: Path, ready: Connection) -> None:
    directory = RunDirectory(run)
    ready.send(os.getpid())
    time.sleep(60)
    assert directory.path == run


def test_one_process_a_run_directory_and_a_dead_one_blocks_nobody(tmp_path: Path) -> None:
    receive, send = multiprocessing.Pipe(duplex=False)
    owner = multiprocessing.get_context("fork").Process(target=_own, args=(tmp_path / "run", send))
    owner.start()
    pid = receive.recv()
    with pytest.raises(ValueError, match=f"process {pid} is writing to this run directory"):
        RunDirectory(tmp_path / "run")
    owner.kill()
    owner.join()
    assert not RunDirectory(tmp_path / "run").finished


def test_random_numbers_continue_after_the_loaders_drew_theirs() -> None:
    state = RandomState()
    saved = state.state_dict()
    expected = torch.rand(3)
    torch.rand(7)
    resumed = RandomState()
    resumed.load_state_dict(saved)
    resumed.on_train_batch_start(None, None, None, 0)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), expected)
