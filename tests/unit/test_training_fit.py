"""``zoo fit`` from its arguments to its run directory."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from zoo.cli import fit as command
from zoo.cli.main import main
from zoo.config import load_spec
from zoo.training.fit import FitCLI, fit
from zoo.training.logs import build_loggers
from zoo.training.ramp import Ramp
from zoo.weights import load


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(run: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(run) if row[name]]


def test_training_learns_and_leaves_a_checkpoint_and_its_records(fit_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fit(["--config", str(fit_config), "--trainer.max_steps", "60"]) == 0

    losses = column(run, "train/lm_loss")
    assert len(losses) == 60
    assert sum(losses[-5:]) / 5 < losses[0] - 1
    assert column(run, "val/perplexity")[-1] < 60
    for name in ("train/loss", "train/load_balance_loss", "train/z_loss", "train/grad_norm", "train/lr"):
        assert len(column(run, name)) == 60
    assert all(1 <= value <= 8 for value in column(run, "router/layer_1/max_over_mean"))
    assert all(0 <= value <= 1 for value in column(run, "router/layer_1/entropy"))

    loads = [json.loads(line) for line in (run / "expert_load.jsonl").read_text().splitlines()]
    assert [line["step"] for line in loads] == list(range(1, 61))
    assert all(sum(line["layers"]["1"]) == pytest.approx(1) for line in loads)
    assert list((run / "tensorboard").glob("events.*"))

    record = json.loads((run / "run.json").read_text())
    assert record["seed"] == 0
    assert record["starts"][0]["versions"]["torch"] == torch.__version__
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 60

    assert (run / "final" / "tokenizer.model").exists()
    assert load(run / "final").config == load_spec(run / "final" / "zoo.yaml").model
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_a_finished_run_is_left_as_it_is_and_can_be_trained_on_from(
    fit_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(fit_config)]
    assert fit(config) == 0
    weights = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert fit(config) == 0
    assert "is finished" in capsys.readouterr().out
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == weights

    values = yaml.safe_load(fit_config.read_text())
    values["model"] |= {"name": str(tmp_path / "run" / "final"), "overrides": None}
    values["trainer"] |= {"default_root_dir": str(tmp_path / "further"), "max_steps": 5}
    fit_config.write_text(yaml.safe_dump(values))
    assert fit(config) == 0
    assert column(tmp_path / "further", "train/lm_loss")[0] < column(tmp_path / "run", "train/lm_loss")[0] - 0.5
    with pytest.raises(ValueError, match="remove the overrides"):
        fit([*config, "--model.overrides.num_layers", "3", "--trainer.default_root_dir", str(tmp_path / "other")])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains_with_exact_selection_bias(fit_config: Path, tmp_path: Path, precision: str) -> None:
    assert fit(["--config", str(fit_config), "--trainer.precision", precision]) == 0
    losses = column(tmp_path / "run", "train/lm_loss")
    assert losses[-1] < losses[0]
    assert any(v != torch.tensor(v).bfloat16().item() for v in column(tmp_path / "run", "val/loss")), "summed in bf16"
    bias = load(tmp_path / "run" / "final").layers[1].ffn.router.bias
    steps = bias / 0.001
    assert bias.dtype == torch.float32
    assert bias.abs().max() > 0
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_what_is_not_finite_stops_the_run_and_names_the_step(fit_config: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training (loss|gradient norm) = (nan|inf) at step \d+") as caught:
        fit(["--config", str(fit_config), "--model.optimizer.lr", "1e30"])
    step = int(re.search(r"at step (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == list(range(1, step))
    assert not (tmp_path / "run" / "final").exists()


def test_the_seed_is_that_of_the_weights(fit_config: Path) -> None:
    def embedding(seed: int) -> torch.Tensor:
        module = FitCLI(["--config", str(fit_config), "--seed_everything", str(seed)]).model
        module.configure_model()
        assert module.model is not None
        return module.model.embed_tokens.weight

    assert torch.equal(embedding(5), embedding(5))
    assert not torch.equal(embedding(5), embedding(6))


def test_overrides_of_the_command_line_join_those_of_the_config(fit_config: Path) -> None:
    overrides = [
        "--model.overrides.moe.top_k",
        "2",
        "--model.overrides.moe.num_groups=2",
        "--model.overrides.num_layers=3",
    ]
    config = FitCLI(["--config", str(fit_config), *overrides]).model.spec.model
    assert config.moe is not None
    assert (config.num_layers, config.hidden_size) == (3, 32)
    assert (config.moe.top_k, config.moe.num_groups, config.moe.num_experts) == (2, 2, 8)


def test_one_device_recomputes_activations_too(fit_config: Path) -> None:
    assert FitCLI(["--config", str(fit_config), "--parallel.recompute", "experts"]).model.recompute == "experts"


def test_a_weight_may_be_a_ramp(fit_config: Path) -> None:
    cli = FitCLI(["--config", str(fit_config), "--model.z_loss_coef", "{start: 0.01, end: 0, to_step: 20}"])
    assert cli.model.objective.z_loss_coef == Ramp(start=0.01, end=0.0, to_step=20)
    assert cli.model.objective.load_balance_coef == 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.z_loss_coef", "{start: 1, end: 0, from_step: 9, to_step: 3}"],
            "to_step = 3: give a step not before",
        ),
        (["--model.lr", "3"], "unknown key 'model.lr'; did you mean 'model.optimizer.lr'?"),
        (["--trainer.max_step", "3"], "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
        (["--modle", "3"], "unknown key 'modle'; did you mean 'model'?"),
        (["--data.batch_size", "many"], "data.batch_size"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--model.name", "mixtral-tin"], "did you mean 'mixtral-tiny'?"),
        (["--model.overrides.moe.top_k", "9"], "moe.top_k = 9: it must be between 1 and num_experts = 8"),
        (["--model.overrides.vocab_size", "200"], "vocab_size = 200: the data's tokenizer has 300 ids"),
        (["--data.data_dir", "nowhere"], "nowhere"),
        (["--trainer.max_steps", "-1"], "trainer.max_steps = -1"),
        (["--model.schedule.warmup_steps", "30"], "the run has only 24 optimizer steps"),
        (["--checkpoint.every_n_steps", "0"], "checkpoint.every_n_steps = 0"),
        (["--trainer.gradient_clip_algorithm", "value"], "trainer.gradient_clip_algorithm = value"),
    ],
)
def test_a_mistake_is_one_line(
    fit_config: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(fit_config), *arguments]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("zoo: error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {name: mixtral-tiny}", "unknown key 'modle'; did you mean 'model'?"),
        ("model: {optimizer: {lrr: 3}}", "unknown key 'model.optimizer.lrr'; did you mean 'model.optimizer.lr'?"),
        ("trainer: {max_step: 3}", "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
    ],
)
def test_an_unknown_key_in_a_config_names_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(["--config", str(tmp_path / "bad.yaml")])


def test_the_short_help_names_only_keys_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        fit(["--help"])
    everything = capsys.readouterr().out
    named = set(re.findall(r"--([a-z_]+\.[a-z_.]+|seed_everything|print_config|config)", command.HELP))
    assert len(named) > 20
    for key in named:
        assert f"--{re.sub(r'overrides.*', 'overrides', key)}" in everything


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("configs/train/*.yaml")), ids=lambda p: p.stem)
def test_the_configs_of_the_repository_are_complete(path: Path, token_data: Path, tmp_path: Path) -> None:
    run = ["--data.data_dir", str(token_data), "--trainer.default_root_dir", str(tmp_path / "run")]
    cli = FitCLI(["--config", str(path), *run])
    assert cli.model.spec.name == path.stem
    assert cli.trainer.max_steps > 0


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_on_standard_error_only_where_it_is_wanted(
    fit_config: Path,
    tmp_path: Path,
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TTY_INTERACTIVE", "1" if terminal else "0")
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    assert fit(["--config", str(fit_config)]) == 0
    shown = capsys.readouterr().err
    assert "24/24" in shown
    assert re.search(r"tokens/s  0:00:00 left", shown)
    assert ("\x1b[" in shown) == terminal
    hidden = ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(tmp_path / "hidden")]
    assert fit(["--config", str(fit_config), *hidden]) == 0
    assert capsys.readouterr().err == ""


def test_metrics_after_the_checkpoint_and_a_line_cut_short_are_replaced(tmp_path: Path) -> None:
    first = build_loggers(tmp_path, 0)[0]
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": 1.0 * step}, step)
        first.save()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4")
    second = build_loggers(tmp_path, 2)[0]
    second.log_metrics({"train/loss": 30.0, "val/loss": 7.0}, 3)
    second.save()
    assert [(row["step"], row["train/loss"], row["val/loss"]) for row in rows(tmp_path)] == [
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "30.0", "7.0"),
    ]
