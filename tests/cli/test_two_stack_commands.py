"""The commands that take encoder-decoders, and how the others refuse them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoo.cli.main import main
from zoo.encoder_decoder import build_encoder_decoder
from zoo.encoder_decoder_config import EncoderDecoderSpec
from zoo.registry import find_any_spec
from zoo.weights import load, load_encoder_decoder, save_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = find_any_spec("switch-tiny")
    assert isinstance(spec, EncoderDecoderSpec)
    directory = tmp_path_factory.mktemp("checkpoint") / "switch"
    save_model(build_encoder_decoder(spec.model), spec, directory)
    return directory


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def test_card_shows_both_stacks(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "card", "switch-base-8")
    assert "619,339,008" in text and "222,977,280" in text
    assert "\nencoder 11 " in text and "\ndecoder 0 " in text
    assert "\ndecoder 0 to 11, each " in output(capsys, "card", "t5-base")
    assert "| decoder 0 to 23, each |" in output(capsys, "card", "flan-t5-xl", "--markdown")


def test_card_as_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    card = json.loads(output(capsys, "card", "switch-base-8", "--json", "--sequence-length", "100"))
    parameters = card["parameters"]
    outside = parameters["embedding"] + parameters["lm_head"]
    outside += 2 * (parameters["final_norm"] + parameters["position_bias"])
    for kind in ("total", "active"):
        layers = sum(layer[kind] for stack in ("encoder", "decoder") for layer in parameters[stack])
        assert parameters[kind] == outside + layers
    assert card["weight_bytes"]["bf16"] == 2 * parameters["total"]
    assert card["cache_bytes_per_token"]["bf16"] == 12 * 2 * 768 * 2
    assert card["forward_flops"]["source_and_target_length"] == 100


def test_a_checkpoint_is_verified_exported_and_imported(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    output(capsys, "verify", str(checkpoint))
    output(capsys, "export", str(checkpoint), str(tmp_path / "hf"))
    output(capsys, "verify", str(tmp_path / "hf"))
    output(capsys, "import", str(tmp_path / "hf"), str(tmp_path / "again"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert load_encoder_decoder(tmp_path / "hf").config == find_any_spec("switch-tiny").model


def test_a_missing_tensor_is_found(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = (checkpoint / "zoo.yaml").read_text(encoding="utf-8")
    (other / "zoo.yaml").write_text(config.replace("num_decoder_layers: 4", "num_decoder_layers: 5"), encoding="utf-8")
    (other / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    assert main(["verify", str(other)]) == 1
    assert "needs tensor 'decoder.layers.4.cross_attention.k_proj.weight'" in capsys.readouterr().out


COMMANDS = [
    ["fit", "--config", "configs/train/mixtral-tiny.yaml", "--model.name"],
    ["generate", "--prompt", "Hello"],
    ["plan", "--gpus", "8"],
    ["match", "--by", "active"],
    ["diff", "mixtral-8x7b"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_other_commands_say_what_is_missing(
    capsys: pytest.CaptureFixture[str], repository: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(repository)
    assert main([*command, "switch-base-8"]) == 2
    error = capsys.readouterr().err
    assert "switch-base-8: this is an encoder-decoder" in error and "corrupted spans" in error
    assert error.count("\n") == 1


def test_a_drawing_and_the_other_loader_are_refused(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, repository: Path, tmp_path: Path
) -> None:
    assert main(["card", "t5-small", "--svg", str(tmp_path / "block.svg")]) == 2
    assert "only blocks of decoders are drawn" in capsys.readouterr().err
    for source in ("t5-small", checkpoint):
        with pytest.raises(ValueError, match="this is an encoder-decoder"):
            load(source)
    with pytest.raises(ValueError, match="this is a decoder; use load"):
        load_encoder_decoder(repository / "checkpoints" / "facts-mixtral")


def test_a_near_name_is_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", "switch-base-9"]) == 2
    assert "did you mean 'switch-base-8'?" in capsys.readouterr().err
