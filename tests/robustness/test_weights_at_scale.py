"""Checkpoints that are much larger than the memory they may take, and ranks that read their own slices only."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zoo.config import ModelConfig
from zoo.families import get_family
from zoo.registry import find_spec
from zoo.weights.convert import open_published, parameter_shapes
from zoo.weights.ops import source_shapes
from zoo.weights.source import SINGLE_FILE

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
LARGEST_PAGE = 2 * MIB
"""What the kernel may map at once of a file in its cache."""


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory whose large files do not outlive the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_four_gigabytes_pass_through_the_memory_of_one_tensor(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/weights_at_scale.py", "--work", str(tmp_path), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    assert figures["bytes"] > 4e9 and figures["shards"] == 5 and figures["equal"]
    largest = figures["largest_bytes"]
    assert figures["import"]["peak_bytes"] < 1.3 * largest + 64 * MIB
    assert figures["export"]["peak_bytes"] < 1.3 * largest + 64 * MIB
    assert figures["read_as_fp32"]["peak_bytes"] < 1.3 * 2 * largest + 64 * MIB


# In a process of its own: what the memory of earlier tests left to the allocator is not counted.
QUANTISED = """
import sys
from pathlib import Path
sys.path.insert(0, "scripts")
from weights_at_scale import measured
from zoo.weights.convert import open_published

def read():
    with open_published(Path(sys.argv[1])) as (_, stream):
        for group in stream.groups():
            for name, tensor in group:
                assert str(tensor.dtype) == "torch.bfloat16", name
                del tensor  # it would still be held while the next one is made

with open_published(Path(sys.argv[1])):
    pass  # import all that is needed
print(measured(read)["peak_bytes"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_quantised_tensors_are_undone_in_the_memory_of_one(method: str, scratch: Path) -> None:
    largest = publish_fp8(scratch) if method == "fp8" else publish_mxfp4(scratch)
    run = subprocess.run([sys.executable, "-c", QUANTISED, str(scratch)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert largest > 180 * MIB
    assert int(run.stdout) < 1.3 * largest + 64 * MIB


def publish_fp8(directory: Path) -> int:
    """Qwen3-MoE with FP8 matrices, all zero; bytes of the largest tensor in bf16."""
    tiny = find_spec("qwen3-moe-tiny").model
    assert tiny.moe is not None
    moe = dataclasses.replace(tiny.moe, num_experts=32, moe_intermediate_size=1536)
    config = dataclasses.replace(tiny, num_layers=1, hidden_size=1024, moe=moe)
    tensors = {}
    for name, shape in published_shapes("qwen3_moe", config).items():
        if ".experts." in name:
            tensors[name] = torch.zeros(shape, dtype=torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones([-(-size // 128) for size in shape])
        else:
            tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    section = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    write(directory, "qwen3_moe", config, tensors, section)
    return largest_bytes(config)


def publish_mxfp4(directory: Path) -> int:
    """gpt-oss with MXFP4 experts, all zero; bytes of the largest tensor in bf16."""
    tiny = find_spec("gpt-oss-tiny").model
    assert tiny.moe is not None
    moe = dataclasses.replace(tiny.moe, num_experts=32, moe_intermediate_size=1536)
    config = dataclasses.replace(tiny, num_layers=1, hidden_size=1024, intermediate_size=1536, moe=moe)
    tensors = {}
    for name, shape in published_shapes("gpt_oss", config).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = shape
            tensors[f"{name}_blocks"] = torch.zeros(experts, rows, columns // 32, 16, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 127, dtype=torch.uint8)
        else:
            tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    write(directory, "gpt_oss", config, tensors, {"quant_method": "mxfp4"})
    return largest_bytes(config)


def published_shapes(family: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return source_shapes(get_family(family).weight_map(config), parameter_shapes(config))


def largest_bytes(config: ModelConfig) -> int:
    return max(2 * torch.Size(shape).numel() for shape in parameter_shapes(config).values())


def write(
    directory: Path, family: str, config: ModelConfig, tensors: dict[str, torch.Tensor], quantization: dict[str, object]
) -> None:
    save_file(tensors, directory / SINGLE_FILE)
    hf = get_family(family).to_hf(config) | ({"quantization_config": quantization} if quantization else {})
    (directory / "config.json").write_text(json.dumps(hf))


@pytest.mark.parametrize(("experts", "rows"), [(slice(2, 3), 0.5), (slice(4, 8), 1.0)], ids=["tensor", "expert"])
def test_a_rank_touches_no_more_of_a_file_than_its_slice(experts: slice, rows: float, scratch: Path) -> None:
    """Of experts of 12 MiB, those of an expert rank, or the rows of a tensor rank: the kernel counts the pages."""
    tiny = find_spec("mixtral-tiny").model
    assert tiny.moe is not None
    moe = dataclasses.replace(tiny.moe, num_experts=8, moe_intermediate_size=3072)
    config = dataclasses.replace(tiny, num_layers=1, hidden_size=1024, intermediate_size=3072, moe=moe)
    tensors = {n: torch.ones(s, dtype=torch.bfloat16) for n, s in published_shapes("mixtral", config).items()}
    write(scratch, "mixtral", config, tensors, {})
    name = "layers.0.ffn.experts.gate_up"
    shape = parameter_shapes(config)[name]
    box = (experts, slice(0, 2), slice(0, int(shape[2] * rows)), slice(0, shape[3]))
    with open_published(scratch) as (_, stream):
        assert sum(pages_in_memory(scratch)) == 0
        part = stream.read_region(name, box, shape)
        touched = sum(pages_in_memory(scratch))
    assert part.numel() == part.count_nonzero()
    runs = 2 * len(range(*experts.indices(shape[0])))  # gate and up of each expert lie apart
    assert part.nbytes <= touched <= part.nbytes + runs * LARGEST_PAGE
    assert touched < (scratch / SINGLE_FILE).stat().st_size / 2


def pages_in_memory(directory: Path) -> Iterator[int]:
    """Bytes of each mapping of a file of ``directory`` that this process has touched."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            inside = bool(rest) and rest[-1].startswith(str(directory))
        elif inside and first == "Rss:":
            yield int(rest[0]) * 1024
