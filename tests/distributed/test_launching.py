"""The commands of docs/parallel.md for several machines, run as they are written but for sizes and the config.

Machines are groups of local processes. What SLURM does for a script is done by stand-ins of its commands: ``sbatch``
below, ``srun`` and ``scontrol`` as executables on PATH.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_strategy import assert_same_run
from test_survival import latest_step, wait_until

from zoo.parallel.supervise import REQUEUE
from zoo.training.fit import fit

STEPS = 60

SRUN = f"""\
#!{sys.executable}
import os, signal, subprocess, sys
nodes, tasks = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
argv = sys.argv[1:]
kill_on_bad_exit = True  # as sites may have configured it
while argv[0].startswith("--"):
    name, _, value = argv.pop(0).partition("=")
    assert name == "--kill-on-bad-exit", name
    kill_on_bad_exit = value != "0"
running = []
signal.signal(signal.SIGTERM, lambda number, frame: [task.send_signal(number) for task in running])
for rank in range(nodes * tasks):
    task = {{"SLURM_PROCID": rank, "SLURM_LOCALID": rank % tasks, "SLURM_NODEID": rank // tasks, "SLURM_STEP_ID": 0}}
    environment = os.environ | {{key: str(value) for key, value in task.items()}}
    running.append(subprocess.Popen(argv, env=environment, start_new_session=True))
codes = []
while running:
    pid, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    codes.append(128 - code if code < 0 else code)
    running = [task for task in running if task.pid != pid]
    if codes[-1] and kill_on_bad_exit:
        for task in running:
            task.kill()
sys.exit(max(codes))
"""
SCONTROL = '#!/bin/sh\necho "$@" >> "$SCONTROL_LOG"\n'
ZOO = f'#!/bin/sh\nexec {sys.executable} -m zoo.cli.main "$@"\n'


def example(repository: Path, first_word: str) -> str:
    """The shell program of docs/parallel.md whose text has ``first_word``."""
    text = (repository / "docs" / "parallel.md").read_text(encoding="utf-8")
    (program,) = [block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if first_word in block]
    return program


def substituted(program: str, **replacements: str) -> str:
    """``program`` with other sizes; each of them must be there."""
    for old, new in replacements.items():
        assert old in program
        program = program.replace(old, new)
    return program


@pytest.fixture
def config(fit_config: Path) -> Path:
    text = fit_config.read_text(encoding="utf-8").replace("max_steps: 24", f"max_steps: {STEPS}")
    fit_config.write_text(text.replace("val_check_interval: 12", "val_check_interval: 30"), encoding="utf-8")
    return fit_config


@pytest.fixture
def alone(config: Path, tmp_path: Path) -> Path:
    """The run of one process."""
    assert fit(["--config", str(config), "--trainer.default_root_dir", str(tmp_path / "alone")]) == 0
    return tmp_path / "alone"


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A directory with stand-ins of SLURM's commands, and ``zoo`` of this checkout."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("zoo", ZOO)):
        (directory / name).write_text(text, encoding="utf-8")
        (directory / name).chmod(stat.S_IRWXU)
    return directory


def sbatch(script: Path, job: int, restarts: int, commands: Path, repository: Path) -> subprocess.Popen[str]:
    """Start ``script`` as SLURM does on the first node of a job, with what it exports for the #SBATCH options."""
    (line,) = re.findall(r"^#SBATCH (.*)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    options = dict(option.removeprefix("--").partition("=")[::2] for option in shlex.split(line))
    assert "requeue" in options and options["signal"] == "TERM@120"
    nodes, tasks = int(options["nodes"]), int(options["ntasks-per-node"])
    names = ",".join(["localhost", *(f"node{number}" for number in range(2, nodes + 1))])
    exported = {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NAME": script.name,
        "SLURM_RESTART_COUNT": restarts,
        "SLURM_NNODES": nodes,
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_NTASKS_PER_NODE": tasks,
        "SLURM_NTASKS": nodes * tasks,
        "SLURM_NODELIST": names,
        "SLURM_JOB_NODELIST": names,
        "SCONTROL_LOG": commands / "scontrol.log",
        "PATH": f"{commands}:{os.environ['PATH']}",
    }
    environment = os.environ | {key: str(value) for key, value in exported.items()}
    log = script.with_suffix(".log").open("a")
    return subprocess.Popen(
        ["bash", str(script)],
        cwd=repository,
        env=environment,
        stdout=log,
        stderr=log,
        text=True,
        start_new_session=True,
    )


def child(process: subprocess.Popen[str]) -> int:
    """The one process that ``process`` runs."""
    (pid,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(pid)


@pytest.mark.slow
def test_a_slurm_job_is_requeued_before_its_time_ends_and_goes_on(
    config: Path, tmp_path: Path, repository: Path, commands: Path, alone: Path
) -> None:
    """Two nodes of two tasks, so that experts span nodes; SLURM signals all tasks 120 s before the end."""
    program = substituted(
        example(repository, "#SBATCH"),
        **{"--ntasks-per-node=8": "--ntasks-per-node=2", "configs/train/mixtral-tiny.yaml": str(config)},
    )
    script, run = tmp_path / "job.sh", tmp_path / "run"
    script.write_text(program, encoding="utf-8")
    job = random.SystemRandom().randrange(10_000, 99_999)

    first = sbatch(script, job, 0, commands, repository)
    wait_until(lambda: (run / "metrics.csv").exists() or first.poll() is not None, 150, "a step")
    assert first.poll() is None, script.with_suffix(".log").read_text()
    os.kill(child(first), signal.SIGTERM)
    assert first.wait(timeout=100) == REQUEUE, script.with_suffix(".log").read_text()
    assert (commands / "scontrol.log").read_text() == f"requeue {job}\n"
    assert 0 < latest_step(run) < STEPS and not (run / "final").exists()

    second = sbatch(script, job, 1, commands, repository)
    assert second.wait(timeout=200) == 0, script.with_suffix(".log").read_text()
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2
    assert_same_run(run, alone)


@pytest.mark.slow
def test_torchrun_on_two_machines(config: Path, tmp_path: Path, repository: Path, alone: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = substituted(
        example(repository, "torchrun"),
        **{
            "--nproc-per-node 8": "--nproc-per-node 1",
            "--trainer.devices=8": "--trainer.devices=1",
            "RENDEZVOUS:29500": f"localhost:{port}",
            "configs/train/mixtral-tiny.yaml": str(config),
        },
    )
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    machines = []
    for number in range(2):
        log = (tmp_path / f"machine{number}.log").open("w")
        command = ["bash", "-e", "-c", program]
        machines.append(subprocess.Popen(command, cwd=repository, env=environment, stdout=log, stderr=log))
    try:
        codes = [machine.wait(timeout=250) for machine in machines]
        assert codes == [0, 0], (tmp_path / "machine0.log").read_text() + (tmp_path / "machine1.log").read_text()
    finally:
        for machine in machines:
            machine.kill()
    assert_same_run(tmp_path / "run", alone)
