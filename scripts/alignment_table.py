#!/usr/bin/env python
"""How many times as long a forward pass takes when weights begin between two cache lines, as in most published files.

    python scripts/alignment_table.py --threads 1

The model is that of `zoo bench load`, of about a gigabyte; each of its parameters begins so many bytes after a line. A
file of safetensors promises eight; ours begin on lines (`zoo/weights/target.py`). Medians of rounds in turn.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from torch import Tensor

from zoo.bench.load import sized
from zoo.bench.timing import interleaved
from zoo.model import Decoder, build

LINE = 64
"""Bytes."""
TOKENS = (1, 8, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'':9}" + "".join(f"{tokens:>5} token{'s' * (tokens > 1):1}" for tokens in TOKENS))
    for dtype in (torch.float32, torch.bfloat16):
        spec = sized(10**9, dtype.itemsize)
        models = {begin: begun_at(build(spec.model, seed=0, dtype=dtype).eval(), begin) for begin in (0, 8)}
        ratios = [ratio(models, tokens, args.rounds) for tokens in TOKENS]
        print(f"{str(dtype).removeprefix('torch.'):9}" + "".join(f"{one:12.3f}" for one in ratios))


def begun_at(model: Decoder, begin: int) -> Decoder:
    """``model`` with parameters that begin ``begin`` bytes after a cache line."""
    for parameter in model.parameters():
        room = torch.empty(parameter.nbytes + 2 * LINE, dtype=torch.uint8)
        start = (begin - room.data_ptr()) % LINE
        moved = room[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = moved.copy_(parameter.data)
    return model


@torch.inference_mode()
def ratio(models: dict[int, Decoder], tokens: int, rounds: int) -> float:
    """Time of the model whose parameters begin 8 bytes after a line over that of the one where they begin on it."""
    ids: Tensor = torch.arange(tokens)[None]
    seconds = interleaved({begin: partial(model, ids) for begin, model in models.items()}, rounds)
    return statistics.median(after / on for on, after in zip(seconds[0], seconds[8], strict=True))


if __name__ == "__main__":
    main()
