"""The programs in docs/parallel.md run as they are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def run_program(number: int, repository: Path, directory: Path) -> list[float]:
    """The losses that a program of the page prints."""
    text = (repository / "docs" / "parallel.md").read_text(encoding="utf-8")
    program = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number]
    (directory / "example.py").write_text(program, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "example.py"]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=directory, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"step \d: loss ([\d.]+)", done.stdout)]


@pytest.mark.slow
def test_the_example_trains_and_exports(repository: Path, tmp_path: Path) -> None:
    losses = run_program(0, repository, tmp_path)
    assert len(losses) == 3 and losses[2] < losses[0]
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]


@pytest.mark.slow
def test_the_pipeline_trains(repository: Path, tmp_path: Path) -> None:
    losses = run_program(1, repository, tmp_path)
    assert len(losses) == 3 and losses[2] < losses[0]
