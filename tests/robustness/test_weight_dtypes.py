"""Another dtype on the way in and out: piece by piece, and nothing else than rounding."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo.cli.main import main
from zoo.model import Decoder, build
from zoo.registry import find_spec
from zoo.weights import export_checkpoint, import_checkpoint, load, save_model

FAMILIES = ["deepseek-v3-tiny", "gpt-oss-tiny", "dbrx-tiny", "jamba-tiny", "llama4-tiny", "qwen3-moe-tiny"]
"""With a buffer, and every kind of operation that a weight map has."""


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.weights.stream.PIECE_BYTES", 3000)


def saved(name: str, directory: Path) -> Decoder:
    """A random model of two kinds of layers at most, and its zoo checkpoint."""
    spec = find_spec(name)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, vocab_size=50))
    model = build(spec.model, seed=3)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            torch.nn.init.normal_(buffer)
    save_model(model, spec, directory)
    return model


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_rounds_once_and_keeps_buffers(name: str, tmp_path: Path) -> None:
    zoo, hf, again = (tmp_path / part for part in ("zoo", "hf", "again"))
    original = saved(name, zoo).state_dict()
    assert main(["export", str(zoo), str(hf), "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads((hf / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert main(["import", str(hf), str(again), "--dtype", "float32", "--json"]) == 0
    buffers = {key for key, _ in load(zoo).named_buffers()}
    found = load_file(again / "model.safetensors")
    assert found.keys() == original.keys()
    for key, tensor in original.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], tensor if key in buffers else tensor.bfloat16().float()), key
    loaded = load(hf, dtype=torch.float64).state_dict()
    assert all(torch.equal(loaded[key].float(), tensor) for key, tensor in found.items())


@pytest.mark.parametrize("name", ["llama-tiny", "mixtral-tiny"])
def test_a_number_that_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    zoo, hf, out = (tmp_path / part for part in ("zoo", "hf", "out"))
    model, spec = saved(name, zoo), find_spec(name)
    with torch.no_grad():
        model.layers[1].mixer_norm.weight[3] = 70_000.0
    save_model(model, dataclasses.replace(spec, model=model.config), zoo)
    with pytest.raises(ValueError, match=r"input_layernorm.weight' holds 70000, which float16 cannot express"):
        export_checkpoint(zoo, hf, dtype=torch.float16)
    export_checkpoint(zoo, hf)
    with pytest.raises(ValueError, match=r"'layers.1.mixer_norm.weight' holds 70000, which float16 cannot express"):
        import_checkpoint(hf, out, dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "zoo"]
