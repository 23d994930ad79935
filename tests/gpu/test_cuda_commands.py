"""The commands on a GPU: training, resuming, several layouts' code in one process, evaluation, generation."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo.training.fit import fit

pytestmark = pytest.mark.gpu

ON_GPU = ("--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed")


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def run_of(config: Path, directory: Path, *more: str) -> Path:
    assert fit(["--config", str(config), "--trainer.default_root_dir", str(directory), *more]) == 0
    return directory


def test_training_in_fp32_follows_the_cpu(fit_config: Path, tmp_path: Path) -> None:
    cpu = run_of(fit_config, tmp_path / "cpu")
    gpu = run_of(fit_config, tmp_path / "gpu", "--trainer.accelerator", "gpu")
    for ours, exact in zip(losses(gpu), losses(cpu), strict=True):
        assert ours == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_training_in_half_precision_learns_as_much(fit_config: Path, tmp_path: Path, precision: str) -> None:
    cpu = run_of(fit_config, tmp_path / "cpu")
    gpu = run_of(fit_config, tmp_path / "gpu", "--trainer.accelerator", "gpu", "--trainer.precision", precision)
    start, exact, ours = losses(cpu)[0], losses(cpu)[-1], losses(gpu)[-1]
    assert start - ours > 0.9 * (start - exact)


def test_a_resumed_run_ends_where_an_unbroken_one_does(fit_config: Path, tmp_path: Path) -> None:
    whole = run_of(fit_config, tmp_path / "whole", *ON_GPU)
    run_of(fit_config, tmp_path / "parts", *ON_GPU, "--checkpoint.keep", "9")
    parts = tmp_path / "parts"
    shutil.rmtree(parts / "final")
    for checkpoint in (parts / "checkpoints").iterdir():
        if checkpoint.stem > "step-00000015":
            checkpoint.unlink()
    run_of(fit_config, parts, *ON_GPU, "--checkpoint.keep", "9")
    ours, exact = (load_file(run / "final" / "model.safetensors") for run in (parts, whole))
    for name, tensor in exact.items():
        # Sums over a batch are taken by atomic additions in places, in no fixed order.
        assert (ours[name] - tensor).norm() <= 0.02 * tensor.norm().clamp(min=1e-3), name


def test_sharded_training_over_nccl_equals_one_process(fit_config: Path, tmp_path: Path) -> None:
    """A world of one: every collective is NCCL's, and every result must be the same."""
    alone = run_of(fit_config, tmp_path / "alone", "--trainer.accelerator", "gpu")
    spread = run_of(fit_config, tmp_path / "spread", "--trainer.accelerator", "gpu", "--trainer.strategy", "ep_fsdp")
    for ours, exact in zip(losses(spread), losses(alone), strict=True):
        assert ours == pytest.approx(exact, rel=1e-4)


def zoo(*argv: str) -> str:
    command = [sys.executable, "-m", "zoo.cli.main", *argv]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["facts-mixtral", "facts-deepseek-moe"])
def test_generation_equals_the_cpus(name: str) -> None:
    prompt = ("--prompt", "The capital of", "--max-new-tokens", "24")
    assert zoo("generate", name, *prompt, "--device", "cuda") == zoo("generate", name, *prompt, "--device", "cpu")


def test_log_likelihoods_equal_the_cpus(tmp_path: Path) -> None:
    """As ``zoo eval`` computes them, in fp32."""
    from lm_eval.api.instance import Instance

    from zoo.harness.lm import ZooLM

    pairs = [("The capital of France is", f" {name}") for name in ("Paris", "London", "a big town", "x")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    scores = {}
    for device in ("cpu", "cuda"):
        model = ZooLM("facts-mixtral", device=device, batch_size=2)
        scores[device] = model.loglikelihood(requests)
    for ours, exact in zip(scores["cuda"], scores["cpu"], strict=True):
        assert ours[0] == pytest.approx(exact[0], abs=1e-3)
        assert ours[1] == exact[1]


def test_a_study_runs_on_the_gpu(tmp_path: Path) -> None:
    zoo("compare", "parrots", "--smoke", "--out", str(tmp_path / "study"))
    report = json.loads((tmp_path / "study" / "report.json").read_text(encoding="utf-8"))
    assert torch.cuda.get_device_name() in json.dumps(report)
