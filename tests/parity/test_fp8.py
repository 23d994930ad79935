"""Weights in FP8 with a scale a block, as DeepSeek-V3 is published, against a loop over the blocks and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import CASES, relative_difference, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import zoo
from zoo.weights import export_checkpoint, import_checkpoint
from zoo.weights.fp8 import Fp8Source
from zoo.weights.verify import verify

LARGEST = 448.0
"""Of float8_e4m3fn."""


SIZES: dict[str, tuple[str, dict[str, Any], list[int], torch.dtype]] = {
    # transformers divides matrices into equal blocks: theirs must be whole blocks, or one.
    "whole": ("deepseek-v3", {"hidden_size": 256, "intermediate_size": 384}, [128, 128], torch.float32),
    "ragged": ("deepseek-v3", {"hidden_size": 192, "intermediate_size": 320}, [128, 128], torch.float32),
    "small": ("qwen3-moe", {}, [16, 32], torch.bfloat16),
}
"""Name → case, its sizes, block, and dtype of the scales (bf16 in the files that Qwen publishes)."""

WEIGHT = "model.layers.1.mlp.experts.2.gate_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"


def quantised(matrix: Tensor, block: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(FP8 values, scales, what they stand for in fp32), block by block."""
    height, width = block
    values, meant = torch.empty_like(matrix, dtype=torch.float8_e4m3fn), torch.empty_like(matrix)
    scales = torch.empty(-(-matrix.shape[0] // height), -(-matrix.shape[1] // width), dtype=dtype)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            box = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = matrix[box].abs().max() / LARGEST
            scale = scales[i, j].float()
            values[box] = (matrix[box] / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            meant[box] = values[box].float() * scale
    return values, scales, meant


@pytest.fixture(scope="module", params=SIZES)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(request.param, tmp_path_factory.mktemp(request.param))


def write(name: str, directory: Path) -> Path:
    """A random model, ``fp8`` as it is published; ``bf16`` and ``fp32`` as its loop says that it is meant."""
    case, sizes, block, dtype = SIZES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CASES[case] | sizes)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(directory / "bf16")
    tensors, meant = load_file(directory / "bf16" / "model.safetensors"), {}
    for key, tensor in list(tensors.items()):
        meant[key] = tensor.float()
        if tensor.dim() == 2 and ".layers." in key and not key.endswith("mlp.gate.weight"):
            tensors[key], tensors[f"{key}_scale_inv"], meant[key] = quantised(tensor.float(), block, dtype)
    hf = json.loads((directory / "bf16" / "config.json").read_text())
    config = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": block}
    for kind, content, state in (
        ("bf16", hf, {key: tensor.bfloat16() for key, tensor in meant.items()}),
        ("fp32", hf, meant),
        ("fp8", hf | {"quantization_config": config}, tensors),
    ):
        (directory / kind).mkdir(exist_ok=True)
        save_file(state, directory / kind / "model.safetensors", metadata={"format": "pt"})
        (directory / kind / "config.json").write_text(json.dumps(content))
    return directory


def assert_same_state(ours: Path, theirs: Path, dtype: torch.dtype) -> None:
    state, expected = (zoo.load(path, dtype=dtype).state_dict() for path in (ours, theirs))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_import_is_the_import_of_the_dequantised_file(published: Path, tmp_path: Path) -> None:
    for kind in ("fp8", "bf16"):
        import_checkpoint(published / kind, tmp_path / kind)
    ours, theirs = (tmp_path / kind / "model.safetensors" for kind in ("fp8", "bf16"))
    assert ours.read_bytes() == theirs.read_bytes()
    export_checkpoint(tmp_path / "fp8", tmp_path / "hf")
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert_same_state(tmp_path / "hf", published / "bf16", torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "fp32"), (torch.float64, "fp32"), (torch.bfloat16, "bf16")]
)
def test_values_are_rounded_once_to_the_dtype_asked_for(published: Path, dtype: torch.dtype, kind: str) -> None:
    assert_same_state(published / "fp8", published / kind, dtype)


@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    """Without a GPU it dequantises to the dtype asked for; what was not quantised it leaves in bf16."""
    source, ids = write("whole", tmp_path) / "fp8", tokens(2, 100)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).float().eval()
    assert relative_difference(zoo.load(source)(ids).logits, theirs(ids).logits) < 1e-5


@settings(max_examples=30)
@given(st.data())
def test_a_box_is_a_box_of_the_whole(published: Path, data: st.DataObject) -> None:
    block = json.loads((published / "fp8" / "config.json").read_text())["quantization_config"]["weight_block_size"]
    whole = load_file(published / "fp32" / "model.safetensors")[WEIGHT]
    starts = [data.draw(st.integers(0, n - 1)) for n in whole.shape]
    region = tuple(slice(a, data.draw(st.integers(a + 1, n))) for a, n in zip(starts, whole.shape, strict=True))
    with Fp8Source(published / "fp8", (block[0], block[1]), torch.float32) as source:
        assert source.entries[WEIGHT].shape == whole.shape
        assert torch.equal(source.read_region(WEIGHT, region), whole[region])


def test_scales_may_be_in_another_shard(published: Path, tmp_path: Path) -> None:
    tensors = load_file(published / "fp8" / "model.safetensors")
    files = {name: f"model-0000{1 + name.endswith('_scale_inv')}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (tmp_path / "config.json").write_bytes((published / "fp8" / "config.json").read_bytes())
    assert verify(tmp_path).findings == []
    assert_same_state(tmp_path, published / "fp32", torch.float32)


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scale": (without(SCALE), f"tensor '{WEIGHT}' is in FP8, but '{SCALE}' is missing; download it again"),
    "no matrix": (without(WEIGHT), f"tensor '{SCALE}' is there without '{WEIGHT}'; download it again"),
    "shape": (
        changed(SCALE, lambda scale: scale[:, :1]),
        f"tensor '{SCALE}' has shape [2, 1], but [24, 48] in blocks of [16, 32] needs [2, 2]",
    ),
    "dimensions": (
        changed(SCALE, torch.flatten),
        f"tensor '{SCALE}' has shape [4], but [24, 48] in blocks of [16, 32] needs [2, 2]",
    ),
    "dtype": (
        changed(SCALE, lambda scale: scale.to(torch.uint8)),
        f"tensor '{SCALE}' has dtype U8; only scales in bf16 and fp32 are read",
    ),
    "not FP8": (
        changed(WEIGHT, lambda weight: weight.to(torch.bfloat16)),
        f"tensor '{SCALE}' scales '{WEIGHT}', which is BF16",
    ),
    "no blocks": (
        changed(WEIGHT, torch.flatten),
        f"tensor '{WEIGHT}' [1152] is in FP8 and no matrix; only matrices are read in blocks",
    ),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("small", tmp_path_factory.mktemp("small")) / "fp8"


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_does_not_fit_is_named(small: Path, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGED[damage]
    copy(small, tmp_path, change)
    with pytest.raises(ValueError) as caught:
        zoo.load(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'model.safetensors'}: {message}"
    assert f"model.safetensors: {message}" in map(str, verify(tmp_path).findings)


def test_verify_finds_every_scale_that_does_not_fit(small: Path, tmp_path: Path) -> None:
    assert verify(small).findings == []
    other = SCALE.replace("experts.2", "experts.3")

    def damage(tensors: dict[str, Tensor]) -> None:
        DAMAGED["shape"][0](tensors)
        without(other)(tensors)

    copy(small, tmp_path, damage)
    assert len(verify(tmp_path).findings) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_block_size": None}, "weight_block_size = None is not supported; give two positive sizes"),
        ({"weight_block_size": [128, 0]}, r"weight_block_size = \[128, 0\] is not supported; give two positive sizes"),
        ({"fmt": "e5m2"}, "fmt = 'e5m2' is not supported"),
        ({"quant_method": "compressed-tensors"}, "quantization_config = .*compressed-tensors.* is not supported"),
    ],
)
def test_other_quantisations_are_refused_by_name(
    small: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copy(small, tmp_path, lambda tensors: None)
    hf = json.loads((small / "config.json").read_text())
    hf["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=message) as caught:
        zoo.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(verify(tmp_path).findings) == 1


def copy(source: Path, directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """``source`` with its tensors changed."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
