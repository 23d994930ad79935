"""MXFP4 experts, as gpt-oss is published, against transformers' own reading of the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_cases import CASES, relative_difference, tokens
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import zoo
from zoo.weights import export_checkpoint, import_checkpoint
from zoo.weights.mxfp4 import Mxfp4Source, unpack

QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in the layout of openai/gpt-oss-20b."""
    directory = tmp_path_factory.mktemp("mxfp4")
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    config = AutoConfig.for_model(**CASES["gpt-oss"] | sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 126, (experts, rows, columns // 32), dtype=torch.uint8)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    hf = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(hf | {"quantization_config": QUANTIZATION}))
    return directory


@torch.no_grad()
def test_logits_are_those_of_transformers(published: Path, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        published, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).float()
    ids = tokens(2, 100)
    expected = theirs(ids).logits
    assert relative_difference(zoo.load(published)(ids).logits, expected) < 1e-5
    import_checkpoint(published, tmp_path / "zoo")
    export_checkpoint(tmp_path / "zoo", tmp_path / "hf")
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert relative_difference(exported(ids).logits, expected) < 1e-5


def test_every_value_is_that_of_transformers() -> None:
    """All 256 bytes under scales from the smallest normal number of bf16 to the largest."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 252, -1, -1)
    scales = torch.arange(2, 254, dtype=torch.uint8).view(1, -1, 1).expand(-1, -1, 16)
    expected = convert_moe_packed_tensors(blocks.contiguous(), scales.contiguous())
    assert torch.equal(unpack(blocks, scales).mT, expected)


@given(st.data())
def test_a_box_is_a_box_of_the_whole(published: Path, data: st.DataObject) -> None:
    with Mxfp4Source(published) as source:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        whole = source.read(name)
        assert whole.shape == source.entries[name].shape
        starts = [data.draw(st.integers(0, n - 1)) for n in whole.shape]
        region = tuple(slice(a, data.draw(st.integers(a + 1, n))) for a, n in zip(starts, whole.shape, strict=True))
        assert torch.equal(source.read_region(name, region), whole[region])


@pytest.mark.parametrize("broken", ["missing", "shape"])
def test_half_a_tensor_is_refused(published: Path, tmp_path: Path, broken: str) -> None:
    tensors = load_file(published / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    scales = tensors.pop(name)
    if broken == "shape":
        tensors[name] = scales[:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((published / "config.json").read_bytes())
    with pytest.raises(ValueError, match="down_proj_blocks") as caught:
        zoo.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_quantisation_is_refused(published: Path, tmp_path: Path) -> None:
    hf = json.loads((published / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ValueError, match=r"quantization_config = .*awq.* is not supported"):
        zoo.load(tmp_path)
