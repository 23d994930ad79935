"""A rank that neither goes on nor dies: the others end in a bounded time, and say which one it is."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_strategy import arguments
from test_survival import TwoRanks, wait_until

ENDLESS = ("--trainer.max_steps", "1000000", "--trainer.val_check_interval", "1000000")

SLEEPER = '''\
import time
from pathlib import Path
from lightning.pytorch import Callback

class Sleeper(Callback):
    """Never comes back from the third step of one rank."""

    def __init__(self, rank: int, mark: str) -> None:
        self.rank, self.mark = rank, mark

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_rank == self.rank and batch_idx == 2:
            Path(self.mark).touch()
            while True:
                time.sleep(1)
'''


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_sleeps_is_named_at_the_timeout(
    fit_config: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Its heart beats: only the collectives that it does not begin give it away."""
    mark = tmp_path / "asleep"
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    callbacks = f"[{{class_path: sleeper.Sleeper, init_args: {{rank: {rank}, mark: {mark}}}}}]"
    argv = [*arguments(fit_config, tmp_path / "run", "ep2", *ENDLESS), "--trainer.callbacks", callbacks]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{repository}")
    with TwoRanks([*argv, "--parallel.timeout", "4"], repository, tmp_path / "log") as ranks:
        wait_until(mark.exists, 100, "a rank asleep")
        slept = time.monotonic()
        code, output = ranks.end(rank, signal.SIGCONT)
        seconds = time.monotonic() - slept
    assert code == 1
    assert f"rank {rank} (process {ranks.pids[rank]} on " in output
    assert f"hangs in on_train_batch_start ({tmp_path}/sleeper.py, line 15)" in output
    assert f"rank {1 - rank} (process {ranks.pids[1 - rank]} on" not in output
    assert seconds < 4 + 15


@pytest.mark.slow
def test_a_stopped_rank_is_named(fit_config: Path, tmp_path: Path, repository: Path) -> None:
    """Its heart does not beat, and nothing but a kill ends it."""
    run = tmp_path / "run"
    with TwoRanks([*arguments(fit_config, run, "ep2", *ENDLESS)], repository, tmp_path / "log") as ranks:
        wait_until(lambda: (run / "metrics.csv").exists(), 100, "a step")
        code, output = ranks.end(1, signal.SIGSTOP)
    assert code == 1
    assert f"rank 1 (process {ranks.pids[1]} on " in output
    assert "no sign of life for 15 s" in output


EXIT = """
import os, time
import torch.distributed as dist
from zoo.parallel import supervise

supervise.BEAT_SECONDS = 0  # it is always in the store
store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
supervise.Watch(0, 1, 600, supervise.end_process).start()
time.sleep(0.2)
"""


def test_a_watch_that_beats_does_not_abort_a_process_at_its_exit(repository: Path) -> None:
    done = subprocess.run([sys.executable, "-c", EXIT], cwd=repository, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
