"""Import and export of a checkpoint that is much larger than the memory they may take."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.config import ModelConfig
from zoo.families import get_family
from zoo.registry import find_spec
from zoo.weights.convert import parameter_shapes
from zoo.weights.ops import source_shapes
from zoo.weights.source import INDEX_FILE

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 5
MIB = 2**20

CONVERT = """
import sys, threading, time
from zoo.registry import find_spec
from zoo.weights.convert import export_checkpoint, import_checkpoint, open_published, parameter_shapes
from pathlib import Path

def held():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def peak_of(call):
    before, highest, done = held(), [0], threading.Event()
    def watch():
        while not done.wait(0.002):
            highest[0] = max(highest[0], held() - before)
    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return highest[0]

source, zoo, published = map(Path, sys.argv[1:])
shapes = parameter_shapes(find_spec(source).model)  # import all that is needed
print(peak_of(lambda: import_checkpoint(source, zoo)))
print(peak_of(lambda: export_checkpoint(zoo, published)))
name = "layers.3.ffn.experts.gate_up"
with open_published(source) as (spec, stream):
    box = (slice(2, 3), slice(0, 2), slice(0, 16), slice(0, shapes[name][3]))
    print(peak_of(lambda: stream.read_region(name, box, shapes[name])))
"""


def large(layers: int) -> ModelConfig:
    """Mixtral with 403 MB of experts a layer in bf16, two thirds of them in one tensor."""
    config = find_spec("mixtral-tiny").model
    assert config.moe is not None and config.attention is not None
    moe = dataclasses.replace(config.moe, moe_intermediate_size=4096)
    attention = dataclasses.replace(config.attention, head_dim=64)
    return dataclasses.replace(
        config, num_layers=layers, hidden_size=2048, intermediate_size=4096, moe=moe, attention=attention
    )


def mark(name: str) -> bytes:
    """The first bytes of a tensor, different for each; the others are holes in the file, and zero."""
    return name.encode()[:64].ljust(64, b".")


def publish(config: ModelConfig, directory: Path) -> dict[str, tuple[int, ...]]:
    """A published checkpoint of ``config`` in five sparse files; name → shape."""
    family = get_family("mixtral")
    shapes = source_shapes(family.weight_map(config), parameter_shapes(config))
    names = sorted(shapes)
    weight_map = {}
    directory.mkdir()
    for i in range(SHARDS):
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        part, header, end = names[i::SHARDS], {}, 0
        for name in part:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
        raw = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            for name in part:
                out.seek(8 + len(raw) + header[name]["data_offsets"][0])
                out.write(mark(name))
            out.truncate(8 + len(raw) + end)
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(family.to_hf(config)))
    return shapes


def marks(directory: Path) -> dict[str, bytes]:
    """Name → first bytes of every tensor of a directory."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, info in header.items():
                file.seek(8 + length + info["data_offsets"][0])
                found[name] = file.read(64)
    return found


@pytest.mark.slow
def test_four_gigabytes_pass_through_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """Anonymous memory: pages of the files that are read are the system's to take back."""
    layers = 10
    source, zoo, published = (tmp_path / name for name in ("source", "zoo", "published"))
    shapes = publish(large(layers), source)
    size = sum(os.path.getsize(path) for path in source.glob("*.safetensors"))
    assert size > 4e9 and len(list(source.glob("*.safetensors"))) == SHARDS
    free = shutil.disk_usage(tmp_path).free
    assert free > 3 * size, f"{free / 1e9:.0f} GB of disk are free, and the test writes {2 * size / 1e9:.0f}"
    try:
        run = subprocess.run(
            [sys.executable, "-c", CONVERT, str(source), str(zoo), str(published)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert run.returncode == 0, run.stderr
        largest = 2 * max(math.prod(shape) for shape in parameter_shapes(large(layers)).values())
        importing, exporting, region = map(int, run.stdout.split())
        print(f"largest tensor {largest / MIB:.0f} MiB; peak MiB: import {importing / MIB:.0f}, ", end="")
        print(f"export {exporting / MIB:.0f}, region {region / MIB:.0f}")
        assert importing < 1.3 * largest + 64 * MIB
        assert exporting < 1.3 * largest + 64 * MIB
        assert region < 64 * MIB
        assert marks(published) == marks(source) == {name: mark(name) for name in shapes}
    finally:
        for directory in (source, zoo, published):
            shutil.rmtree(directory, ignore_errors=True)
