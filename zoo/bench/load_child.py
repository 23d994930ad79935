"""One load in a process of its own, ``python -m zoo.bench.load_child WAY DIRECTORY DTYPE DEVICE WARM_UP``, as JSON.

``seconds`` and ``bytes`` are those of loading DIRECTORY. Where a small checkpoint WARM_UP is given it is loaded before,
so that they are without imports and whatever else is done once. ``first_token`` is the time in seconds since the epoch
at which the first token was known: the caller knows when the process was started. ``bytes`` is the growth of the
resident set to its peak: pages of mapped files count as soon as they are touched, and what the allocator keeps counts
as well, which a count of tensors would not see.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROMPT = [[1, 2, 3, 4, 5, 6, 7, 8]]
LOGITS = 64
"""Of the last position's so many are reported, to compare ways."""


def loader(way: str, dtype: torch.dtype, device: str) -> Callable[[Path], Any]:
    """A function that loads a directory in one ``way``."""
    if way == "zoo":
        from zoo.weights import load

        return lambda directory: load(directory, dtype=dtype, device=device)
    if way == "transformers":
        from transformers import MixtralForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        model: Any = MixtralForCausalLM
        return lambda directory: model.from_pretrained(directory, dtype=dtype).to(device)
    return read


def read(directory: Path) -> list[torch.Tensor]:
    """The bytes of all shards, copied once into memory."""
    tensors = []
    for path in sorted(directory.glob("*.safetensors")):
        tensor = torch.empty(path.stat().st_size, dtype=torch.uint8)
        with path.open("rb", buffering=0) as file:
            view = tensor.numpy().data
            while view:
                view = view[file.readinto(view) :]
        tensors.append(tensor)
    return tensors


def resident(key: str) -> int:
    """Bytes of ``VmRSS``, which are resident now, or ``VmHWM``, their most since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> None:
    """Count the peak from here on, from what is really in use: the allocator gives back what imports left."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main(way: str, directory: str, dtype: str, device: str, warm_up: str = "") -> None:
    """Load, measure, and find the first token where a model was loaded."""
    load = loader(way, getattr(torch, dtype), device)
    if warm_up:
        load(Path(warm_up))
    forget_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    model = load(Path(directory))
    result: dict[str, Any] = {"seconds": time.perf_counter() - start, "bytes": resident("VmHWM") - before}
    if way != "read":
        with torch.inference_mode():
            logits = model(torch.tensor(PROMPT, device=device)).logits[0, -1].float()
            logits.argmax().item()
        result |= {"first_token": time.time(), "logits": logits[:LOGITS].tolist()}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
