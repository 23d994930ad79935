"""Weights kept along the way of a training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from zoo.harness.snapshots import Snapshots, seconds_file, snapshot_directory
from zoo.training.fit import fit
from zoo.weights import load


def seconds(run: Path, step: int) -> float:
    return float(json.loads(seconds_file(run, step).read_text(encoding="utf-8"))["seconds"])


def test_snapshots_are_the_weights_of_their_steps_also_in_a_run_that_was_stopped(
    fit_config: Path, tmp_path: Path
) -> None:
    values = yaml.safe_load(fit_config.read_text(encoding="utf-8"))
    callback = {"class_path": "zoo.harness.snapshots.Snapshots", "init_args": {"steps": [6, 12, 24]}}
    values["trainer"]["callbacks"] = [callback]
    values["checkpoint"] = {"every_n_steps": 6, "keep": 4}
    fit_config.write_text(yaml.safe_dump(values), encoding="utf-8")
    run = tmp_path / "run"
    assert fit(["--config", str(fit_config)]) == 0

    kept = load(snapshot_directory(run, 6)).state_dict()
    state = torch.load(run / "checkpoints" / "step-00000006.ckpt", weights_only=True)["state_dict"]
    assert {f"model.{name}" for name in kept} <= set(state)
    assert all(torch.equal(tensor, state[f"model.{name}"]) for name, tensor in kept.items())
    assert 0 < seconds(run, 6) < seconds(run, 12) < seconds(run, 24)
    assert not snapshot_directory(run, 24).exists(), "those are in final"

    # As if it had been killed after step 6: what follows is made again, what was kept stays.
    times = {path: path.stat().st_mtime_ns for path in (seconds_file(run, 6), *snapshot_directory(run, 6).iterdir())}
    weights = [run / "final" / "model.safetensors", snapshot_directory(run, 12) / "model.safetensors"]
    before = [path.read_bytes() for path in weights]
    for path in (run / "final", snapshot_directory(run, 12)):
        shutil.rmtree(path)
    for step in (12, 18, 24):
        (run / "checkpoints" / f"step-{step:08d}.ckpt").unlink()
    assert fit(["--config", str(fit_config)]) == 0
    assert [path.read_bytes() for path in weights] == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert seconds(run, 6) < seconds(run, 12) < seconds(run, 24), "the clock goes on where it was"


@pytest.mark.parametrize("steps", [[], [0, 5]])
def test_steps_are_from_one_on(steps: list[int]) -> None:
    with pytest.raises(ValueError, match="give optimizer steps from 1 on"):
        Snapshots(steps)
