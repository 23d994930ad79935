"""Memory and time of importing and exporting a large checkpoint.

    OMP_NUM_THREADS=1 python scripts/weights_at_scale.py

A random checkpoint in the style of Mixtral, in bf16 and in shards, is written once, imported, exported again, and read
as fp32 without being written. Peaks are those of anonymous memory, above what the process had before: pages of mapped
files are the system's to take back. That the export has the bytes of the original is checked. Needs disk for three
times its size.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import json
import math
import platform
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from zoo.config import ModelConfig
from zoo.families import get_family
from zoo.registry import find_spec
from zoo.weights import export_checkpoint, import_checkpoint
from zoo.weights.convert import open_published, parameter_shapes
from zoo.weights.ops import source_shapes
from zoo.weights.source import INDEX_FILE, TensorSource

MIB = 2**20
CHUNK = 16 * MIB
WITHOUT_TOP_BIT = 0xBFFF
"""Of the exponent: what is left is a finite number, below 2."""


def config_of(size: float) -> ModelConfig:
    """Mixtral with 403 MB of experts a layer in bf16, two thirds of them in one tensor, of ``size`` bytes or more."""
    tiny = find_spec("mixtral-tiny").model
    assert tiny.moe is not None and tiny.attention is not None
    moe = dataclasses.replace(tiny.moe, moe_intermediate_size=4096)
    attention = dataclasses.replace(tiny.attention, head_dim=64)
    wide = dataclasses.replace(tiny, hidden_size=2048, intermediate_size=4096, moe=moe, attention=attention)

    def with_layers(layers: int) -> ModelConfig:
        return dataclasses.replace(wide, num_layers=layers)

    outside = _bytes(with_layers(1)) - (layer := _bytes(with_layers(2)) - _bytes(with_layers(1)))
    return with_layers(max(1, math.ceil((size - outside) / layer)))


def _bytes(config: ModelConfig) -> int:
    return sum(2 * math.prod(shape) for shape in parameter_shapes(config).values())


def publish(config: ModelConfig, directory: Path, shards: int) -> None:
    """Random weights of ``config`` in its published layout, in so many files, through 32 MiB of memory."""
    family = get_family("mixtral")
    shapes = source_shapes(family.weight_map(config), parameter_shapes(config))
    names, weight_map = sorted(shapes), {}
    generator = torch.Generator().manual_seed(0)
    directory.mkdir()
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part, header, end = names[i::shards], {}, 0
        for name in part:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
        raw = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            for start in range(0, end, CHUNK):
                numbers = torch.randint(2**16, (min(CHUNK, end - start) // 2,), generator=generator, dtype=torch.int32)
                out.write((numbers & WITHOUT_TOP_BIT).to(torch.uint16).numpy().data)
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(family.to_hf(config)))


def anonymous() -> int:
    """Bytes of this process that are no pages of files."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def measured(call: Callable[[], object]) -> dict[str, float]:
    """Peak of anonymous memory above the present, wall time and processor time of ``call``."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work left to the allocator is given back, and does not count
    before, highest, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, processor = time.perf_counter(), time.process_time()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return {
        "peak_bytes": highest[0],
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
    }


def read_as_fp32(source: Path) -> None:
    """Every tensor of a published directory, converted, and let go."""
    with open_published(source, torch.float32) as (_, stream):
        for group in stream.groups():
            for _, tensor in group:
                assert tensor.dtype == torch.float32
                del tensor  # it would still be held while the next one is made


def equal(first: Path, second: Path) -> bool:
    """Whether two directories hold the same tensors, bit for bit."""
    with TensorSource(first) as one, TensorSource(second) as other:
        if one.entries.keys() != other.entries.keys():
            return False
        for name, entry in one.entries.items():
            with safe_open(other.entries[name].path, framework="pt") as file:
                if not torch.equal(one.read(name).view(torch.int16), file.get_tensor(name).view(torch.int16)):
                    return False
            assert entry.dtype == "BF16"
    return True


def run(work: Path, size: float, shards: int) -> dict[str, Any]:
    """All figures, of a checkpoint that is made in ``work``."""
    config = config_of(size)
    source, zoo, published = (work / name for name in ("source", "zoo", "published"))
    publish(config, source, shards)
    largest = max(2 * math.prod(shape) for shape in parameter_shapes(config).values())
    figures = {
        "bytes": sum(path.stat().st_size for path in source.glob("*.safetensors")),
        "shards": len(list(source.glob("*.safetensors"))),
        "largest_bytes": largest,
        "import": measured(lambda: import_checkpoint(source, zoo)),
        "export": measured(lambda: export_checkpoint(zoo, published)),
        "read_as_fp32": measured(lambda: read_as_fp32(source)),
    }
    return figures | {"equal": equal(source, published)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="example: --gigabytes 1"
    )
    parser.add_argument("--gigabytes", type=float, default=4.0, metavar="N", help="size of the checkpoint (default 4)")
    parser.add_argument("--shards", type=int, default=5, metavar="N", help="files that it is in (default 5)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to write (default: the system's place)")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON: bytes, seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        figures = run(Path(work), args.gigabytes * 1e9, args.shards)
    if args.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(f"{figures['bytes'] / 1e9:.2f} GB in {figures['shards']} shards, largest tensor ", end="")
    print(f"{figures['largest_bytes'] / MIB:.0f} MiB; exported again bit for bit: {figures['equal']}")
    for way in ("import", "export", "read_as_fp32"):
        found = figures[way]
        print(f"{way:<13} {found['peak_bytes'] / MIB:6.0f} MiB {found['seconds']:7.1f} s ", end="")
        print(f"{found['processor_seconds']:7.1f} s of a processor")


if __name__ == "__main__":
    sys.exit(main())
