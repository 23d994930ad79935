"""A rank is killed at random moments of saving: the last checkpoint that stood still does, and saving goes on."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import TIMEOUT, WorkerPool
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, zeros

from zoo.parallel.checkpoint import Saver, load_alone, remove

PARTIAL, COMPLETE = ".*.partial", "step-*"
NAMES = [f"layers.{i}.weight" for i in range(8)]


def complete(directory: Path) -> list[Path]:
    """Checkpoints that stand, oldest first."""
    return sorted(directory.glob(COMPLETE))


def save_every_step(directory: Path, background: bool, last: int | None) -> None:
    """Go on after the newest checkpoint until ``last``; whatever is saved holds the number of its step everywhere.

    Only the newest checkpoint is kept, as by ``zoo fit``.
    """
    saver = Saver(timedelta(seconds=TIMEOUT), background=background)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights = {name: zeros(256, 512, device_mesh=mesh, placements=[Shard(0)]) for name in NAMES}
    stood = complete(directory)
    step = int(load_alone(stood[-1])["step"]) if stood else 0
    dist.barrier()
    while last is None or step < last:
        step += 1
        fill(weights, step)
        optimizer: dict[str, Any] = {"state": {}, "param_groups": []}
        checkpoint = {"state_dict": weights, "optimizer_states": [optimizer], "step": step}
        saver.save(directory / f"step-{step:08d}", checkpoint)
        fill(weights, -1)
        saver.wait()
        if dist.get_rank() == 0:
            for old in complete(directory)[:-1]:
                remove(old)


def fill(weights: dict[str, torch.Tensor], value: int) -> None:
    for weight in weights.values():
        weight.fill_(value)


def assert_loads(path: Path) -> None:
    found = load_alone(path)
    assert path.name == f"step-{found['step']:08d}"
    assert found["state_dict"].keys() == set(NAMES)
    for name, weight in found["state_dict"].items():
        assert (weight == found["step"]).all(), f"{path}: {name}"


@pytest.fixture
def pair() -> Iterator[WorkerPool]:
    """Two ranks of their own."""
    pool = WorkerPool(2)
    yield pool
    pool.close()


def wait_until(holds: Callable[[], bool]) -> float:
    """The time when it held, in seconds of the monotonic clock."""
    deadline = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.0005)
    return time.monotonic()


def kill_while_saving(pair: WorkerPool, directory: Path, background: bool, draw: random.Random) -> bool:
    """Kill a rank at a moment drawn from a save, and tell whether it was at work on a checkpoint."""

    def partial() -> bool:
        return any(directory.glob(PARTIAL))

    with ThreadPoolExecutor(1) as thread:
        ranks = thread.submit(pair.run, save_every_step, directory, background, None)
        before = complete(directory)
        wait_until(lambda: complete(directory) > before)
        # How long a save takes now, from one that is left alone; then somewhere in one of the next.
        begin = wait_until(partial)
        span = wait_until(lambda: not partial()) - begin
        wait_until(partial)
        time.sleep(draw.uniform(0, span))
        os.kill(pair.pids[draw.randrange(2)], signal.SIGKILL)
        hit = partial()
        with pytest.raises(AssertionError, match="the process died"):
            ranks.result()
    return hit


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_the_last_checkpoint_loads_wherever_a_rank_was_killed(
    pair: WorkerPool, tmp_path: Path, background: bool, kills: int
) -> None:
    draw, hits = random.Random(kills), 0
    for _ in range(kills):
        hits += kill_while_saving(pair, tmp_path, background, draw)
        stood = complete(tmp_path)
        assert stood
        for path in stood:
            assert_loads(path)
    assert hits >= kills // 2, f"{hits} of {kills} kills hit a save"
    end = int(re.sub(r"\D", "", complete(tmp_path)[-1].name)) + 2
    pair.run(save_every_step, tmp_path, background, end)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{end:08d}"]
    assert_loads(tmp_path / f"step-{end:08d}")
