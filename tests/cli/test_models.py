"""``zoo list``, ``zoo card`` and ``zoo match``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zoo.accounting import count_parameters
from zoo.cli.main import main
from zoo.config import load_spec
from zoo.harness.match import match
from zoo.registry import all_names, configs_dir, find_spec


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def json_of(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    return json.loads(output(capsys, *argv, "--json"))


def test_list_shows_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "list").partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines[1:]] == all_names()
    [line] = [line for line in lines if line.startswith("mixtral-8x7b ")]
    assert line.split() == ["mixtral-8x7b", "mixtral", "mistralai/Mixtral-8x7B-v0.1", "46.7B", "12.9B"]


def test_list_as_json_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    models = {model["name"]: model for model in json_of(capsys, "list")["models"]}
    assert list(models) == all_names()
    assert models["mixtral-8x7b"]["total"] == 46_702_792_704
    assert models["mixtral-tiny"]["source"] is None


def test_card_shows_sizes_costs_and_layers(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "card", "deepseek-v2-lite", "--sequence-length", "1024")
    assert "15,706,484,224" in text
    assert "at 1,024 tokens" in text
    # The latent and the rotary key: (512 + 64) × 27 layers × 2 bytes.
    assert "30.4 KiB" in text
    assert "\n1 to 26, each " in text


def test_card_as_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    card = json_of(capsys, "card", "deepseek-v3")
    parameters = card["parameters"]
    outside = parameters["embedding"] + parameters["lm_head"] + parameters["final_norm"]
    assert len(parameters["layers"]) == 61
    for kind in ("total", "active"):
        assert parameters[kind] == outside + sum(layer[kind] for layer in parameters["layers"])
    (module,) = parameters["mtp"]
    assert card["weight_bytes"]["bf16"] == 2 * (parameters["total"] + module["total"]) + 4 * card["buffers"]
    assert card["buffers"] == 59 * 256
    # The projection of embedding and hidden state and three norms more than a layer has.
    assert module["total"] == parameters["layers"][-1]["total"] + 2 * 7168**2 + 3 * 7168
    assert card["cache_bytes_per_token"] == {"fp32": 61 * 576 * 4, "bf16": 61 * 576 * 2}
    # Training goes through the MTP module as well: a layer, the projection, and the head once more.
    flops, matrices = card["flops_per_token"], module["active"] - (5 * 7168 + 1536 + 512) + 129280 * 7168
    scores = 2 * 128 * (192 + 128) * (4096 + 1) / 2
    assert flops["training"] / 3 - flops["forward"] == pytest.approx(2 * matrices + scores)


def test_card_reads_a_file_and_a_checkpoint_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = configs_dir() / "models" / "mixtral-tiny.yaml"
    (tmp_path / "zoo.yaml").write_text(source.read_text())
    by_name = json_of(capsys, "card", "mixtral-tiny")
    assert json_of(capsys, "card", str(source)) == by_name
    assert json_of(capsys, "card", str(tmp_path)) == by_name


def test_card_refuses_a_length_that_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", "mixtral-tiny", "--sequence-length", "0"]) == 2
    assert "sequence_length = 0: give a positive number of tokens" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["active", "total", "flops"])
def test_match_writes_a_twin_that_other_commands_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, by: str
) -> None:
    twin = tmp_path / "twin.yaml"
    text = output(capsys, "match", "mixtral-tiny", "--by", by, "--out", str(twin))
    assert f"written to {twin}" in text
    assert load_spec(twin) == match(find_spec("mixtral-tiny"), by)  # type: ignore[arg-type]
    assert json_of(capsys, "card", str(twin))["name"] == f"mixtral-tiny-dense-{by}"


def test_match_as_json_compares_both_models(capsys: pytest.CaptureFixture[str]) -> None:
    result = json_of(capsys, "match", "mixtral-8x7b", "--by", "active", "--sequence-length", "512")
    assert result["spec"]["model"]["intermediate_size"] == 2 * 14336
    assert result["sequence_length"] == 512
    sparse = count_parameters(find_spec("mixtral-8x7b").model)
    assert result["quantities"]["total"]["sparse"] == sparse.total
    assert result["quantities"]["active"]["dense"] == pytest.approx(sparse.active, rel=0.01)


def test_match_refuses_a_dense_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", "llama-tiny", "--by", "active"]) == 2
    assert "llama-tiny: every layer is dense already" in capsys.readouterr().err
