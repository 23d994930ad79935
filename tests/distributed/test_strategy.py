"""``zoo fit`` on several processes, as a user starts it."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from zoo.config import ModelConfig
from zoo.parallel.checkpoint import load_alone, remove
from zoo.parallel.mesh import MeshSizes
from zoo.parallel.plan import load_plan
from zoo.parallel.strategy import choose_sizes
from zoo.training.checkpoint import list_checkpoints
from zoo.training.fit import FitCLI, fit

FIT = [sys.executable, "-m", "zoo.cli.main", "fit"]

LAYOUTS = {
    "fsdp1": ("fsdp", "1", "--parallel.recompute", "block"),
    "ddp2": ("ddp", "2"),
    "fsdp2": ("fsdp", "2"),
    "ep2": ("ep", "2"),
    "tp2": ("tp_ep_fsdp", "2"),
    "fsdp2_ep2": ("ep_fsdp", "4", "--parallel.expert", "2"),
    "tp2_fsdp2_ep4": ("tp_ep_fsdp", "4", "--parallel.recompute", "block"),
}


def arguments(config: Path, run: Path, layout: str | None = None, *more: str) -> list[str]:
    """Arguments of ``zoo fit``; without a layout for one process."""
    argv = ["--config", str(config), "--trainer.default_root_dir", str(run), *more]
    if layout is None:
        return argv
    plan, devices, *rest = LAYOUTS[layout]
    return [*argv, "--trainer.strategy", plan, "--trainer.devices", devices, *rest]


def run_fit(argv: list[str], repository: Path, fails: bool = False) -> str:
    """Standard error of ``zoo fit`` in processes of its own, which find the tests' callbacks."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "ZOO_TRACEBACK": ""}
    done = subprocess.run(
        [*FIT, *argv], cwd=repository, capture_output=True, text=True, timeout=200, check=False, env=environment
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr


def rows(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def assert_same_run(run: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Every logged value and every final weight."""
    ours, theirs = rows(run), rows(expected)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        # A perplexity of 100 is off by 100 times as much as its logarithm.
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance, nan_ok=True)
    weights, others = (load_file(path / "final" / "model.safetensors") for path in (run, expected))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_in_any_layout_is_that_of_one_process(
    fit_config: Path, tmp_path: Path, repository: Path, layout: str
) -> None:
    more = ("--trainer.max_steps", "10", "--trainer.accumulate_grad_batches", "2")
    assert fit(arguments(fit_config, tmp_path / "alone", None, *more)) == 0
    run_fit(arguments(fit_config, tmp_path / layout, layout, *more), repository)
    assert_same_run(tmp_path / layout, tmp_path / "alone")
    for name in ("expert_load.jsonl", "final/zoo.yaml"):
        assert (tmp_path / layout / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.slow
def test_gradients_may_be_summed_after_every_micro_batch(fit_config: Path, tmp_path: Path, repository: Path) -> None:
    more = ("--trainer.max_steps", "6", "--trainer.accumulate_grad_batches", "2")
    assert fit(arguments(fit_config, tmp_path / "alone", None, *more)) == 0
    more += ("--parallel.reduce_every_micro_batch", "true")
    run_fit(arguments(fit_config, tmp_path / "spread", "fsdp2_ep2", *more), repository)
    assert_same_run(tmp_path / "spread", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "layout"), [("bf16-true", "fsdp2"), ("bf16-mixed", "ep2")])
def test_half_precision_is_that_of_one_process_within_its_rounding(
    fit_config: Path, tmp_path: Path, repository: Path, precision: str, layout: str
) -> None:
    more = ("--trainer.max_steps", "10", "--trainer.precision", precision)
    assert fit(arguments(fit_config, tmp_path / "alone", None, *more)) == 0
    run_fit(arguments(fit_config, tmp_path / layout, layout, *more), repository)
    ours, theirs = rows(tmp_path / layout), rows(tmp_path / "alone")
    for name in ("train/loss", "train/grad_norm"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in theirs], rel=2**-8)


def go_on(run: Path, step: int) -> None:
    """Leave of a finished run what a kill after ``step`` would have left."""
    shutil.rmtree(run / "final")
    for checkpoint in list_checkpoints(run):
        if checkpoint.stem > f"step-{step:08d}":
            remove(checkpoint)


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_any_layout(fit_config: Path, tmp_path: Path, repository: Path) -> None:
    run, reference = tmp_path / "run", tmp_path / "reference"
    more = ("--trainer.max_steps", "14", "--checkpoint.every_n_steps", "3", "--checkpoint.keep", "9")
    run_fit(arguments(fit_config, run, "fsdp2_ep2", *more), repository)
    shutil.copytree(run, reference)
    go_on(run, 3)
    run_fit(arguments(fit_config, run, "fsdp2_ep2", *more), repository)
    for name in ("metrics.csv", "expert_load.jsonl", "final/model.safetensors"):
        assert (run / name).read_bytes() == (reference / name).read_bytes()
    # Each goes on from what the one before it saved: four processes, two, one under the strategy, one without, two.
    for layout, step in (("tp2", 3), ("fsdp1", 6), (None, 9), ("ep2", 12)):
        go_on(run, step)
        run_fit(arguments(fit_config, run, layout, *more), repository)
        assert_same_run(run, reference)


def poisoned(directory: Path, steps: list[int], rank: int) -> tuple[str, ...]:
    """Arguments of ``zoo fit`` that have a gradient of one rank broken in some steps (``poison.py``)."""
    path = directory / f"poison-{rank}.yaml"
    callback = {"class_path": "poison.Poison", "init_args": {"steps": steps, "rank": rank}}
    path.write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    return ("--config", str(path), "--trainer.max_steps", "8", "--checkpoint.every_n_steps", "4")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp2", "tp2"])
def test_all_ranks_skip_a_step_in_which_one_has_a_gradient_that_is_not_finite(
    fit_config: Path, tmp_path: Path, repository: Path, layout: str
) -> None:
    """Both layouts hold copies of the parameter: without the others' agreement they would come apart."""
    run, alone = tmp_path / layout, tmp_path / "alone"
    assert fit(arguments(fit_config, alone, None, *poisoned(tmp_path, [3, 4, 6], 0))) == 0
    more = poisoned(tmp_path, [3, 4, 6], 1)
    shown = run_fit(arguments(fit_config, run, layout, *more), repository)
    assert shown.count("is skipped: training gradient norm is not finite") == 3
    assert [row["train/skipped_steps"] for row in rows(run) if "train/skipped_steps" in row] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert_same_run(run, alone)
    held = [torch.load(run / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    weights = load_file(run / "final" / "model.safetensors")
    copies = [name for name, part in held[0].items() if part.shape == weights[name.removeprefix("model.")].shape]
    assert "model.layers.1.ffn.router.weight" in copies
    assert all(torch.equal(part[name], weights[name.removeprefix("model.")]) for part in held for name in copies)
    # What was counted is in the checkpoint.
    before = (run / "metrics.csv").read_bytes()
    go_on(run, 4)
    run_fit(arguments(fit_config, run, layout, *more), repository)
    assert (run / "metrics.csv").read_bytes() == before


@pytest.mark.slow
def test_a_run_of_skipped_steps_ends_all_ranks(fit_config: Path, tmp_path: Path, repository: Path) -> None:
    more = (*poisoned(tmp_path, [3, 4], 1), "--model.max_skipped_steps", "1")
    shown = run_fit(arguments(fit_config, tmp_path / "run", "fsdp2", *more), repository, fails=True)
    assert "training gradient norm = nan at step 4, after 1 skipped steps in a row" in shown


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in the layout of several processes, written by one."""
    directory = tmp_path / "step-00000001.ckpt"
    writer = dcp.FileSystemWriter(directory)
    dcp.save({"model.weight": torch.ones(3), "optimizer.weight.step": torch.tensor(1.0)}, storage_writer=writer)
    torch.save({"optimizer_states": [{"param_groups": [{"lr": 0.1, "params": ["weight"]}]}]}, directory / "meta.pt")
    return directory


def test_one_process_reads_a_sharded_checkpoint(sharded: Path) -> None:
    loaded = load_alone(sharded)
    assert torch.equal(loaded["state_dict"]["weight"], torch.ones(3))
    assert loaded["optimizer_states"] == [{"state": {0: {"step": 1.0}}, "param_groups": [{"lr": 0.1, "params": [0]}]}]


class _Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mknod, (str(self.path),))


def test_an_index_that_runs_code_or_leaves_the_checkpoint_is_refused(sharded: Path, tmp_path: Path) -> None:
    index = sharded / ".metadata"
    data = index.read_bytes()
    index.write_bytes(data.replace(b"__0_0.distcp", b"../../passwd"))
    with pytest.raises(ValueError, match=r"names '\.\./\.\./passwd'"):
        load_alone(sharded)
    index.write_bytes(pickle.dumps(_Touch(tmp_path / "owned")))
    with pytest.raises(ValueError, match="mknod"):
        load_alone(sharded)
    assert not (tmp_path / "owned").exists()


def config_of(fit_config: Path) -> ModelConfig:
    return FitCLI(["--config", str(fit_config)]).model.spec.model


@pytest.mark.parametrize(
    ("plan", "world", "sizes"),
    [
        ("ddp", 4, MeshSizes(data_replicate=4)),
        ("fsdp", 4, MeshSizes(data_shard=4)),
        ("ep", 4, MeshSizes(data_replicate=4, expert=4)),
        ("ep_fsdp", 16, MeshSizes(data_shard=16, expert=8)),
        ("ep_fsdp", 12, MeshSizes(data_shard=12, expert=4)),
        ("tp_ep_fsdp", 4, MeshSizes(data_shard=2, tensor=2, expert=4)),
        ("tp_ep_fsdp", 1, MeshSizes()),
    ],
)
def test_sizes_that_are_not_given_fit_the_world(fit_config: Path, plan: str, world: int, sizes: MeshSizes) -> None:
    assert choose_sizes(load_plan(plan), config_of(fit_config), world) == sizes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trainer.strategy", "deepspeed"], "trainer.strategy = deepspeed: give auto, ddp, ep"),
        (["--trainer.strategy", "ep", "--parallel.tensor", "2"], "tensor = 2: this plan splits nothing"),
        (["--trainer.strategy", "fsdp", "--parallel.expert", "2"], "expert = 2: this plan spreads no experts"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    fit_config: Path, repository: Path, more: list[str], message: str
) -> None:
    argv = [*FIT, "--config", str(fit_config), *more]
    environment = {**os.environ, "ZOO_TRACEBACK": ""}
    done = subprocess.run(argv, cwd=repository, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 2
    assert message in done.stderr.strip().splitlines()[-1]
