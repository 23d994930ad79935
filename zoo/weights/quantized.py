"""Published checkpoints in whichever form their weights are stored, read as if they were stored plainly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.families import family_of
from zoo.families.base import quantization
from zoo.weights.fp8 import Fp8Source, block_size, dequantised_entries
from zoo.weights.mxfp4 import Mxfp4Source, unpacked_entries
from zoo.weights.source import Entry, TensorSource, without_prefix

if TYPE_CHECKING:
    import torch


def published_source(directory: Path, hf: Mapping[str, Any], dtype: torch.dtype | None = None) -> TensorSource:
    """The tensors of ``directory``, which has the config.json ``hf``.

    Args:
        directory: in a published layout.
        hf: its config.json, of a quantisation that its family is published in.
        dtype: that FP8 is dequantised to; by default bf16, and fp32 where it is one that no checkpoint is read in.
            MXFP4 is exact in bf16, which it becomes.

    Raises:
        ValueError: as ``TensorSource``, or what is quantised and its scales do not fit.
    """
    import torch

    match quantization(hf):
        case "mxfp4":
            return Mxfp4Source(directory)
        case "fp8":
            kept = dtype in (torch.float32, torch.float16, torch.bfloat16)
            wanted = torch.bfloat16 if dtype is None else dtype if kept else torch.float32
            return Fp8Source(directory, block_size(hf, str(directory / "config.json")), wanted)
        case _:
            return TensorSource(directory, _prefix(hf))


def unquantised_entries(
    directory: Path, hf: Mapping[str, Any], entries: Mapping[str, Entry]
) -> tuple[dict[str, Entry], list[tuple[Path, str]]]:
    """What ``published_source`` has in place of ``entries``, and (file, problem) of what does not fit.

    Raises:
        ValueError: it cannot be told.
    """
    match quantization(hf):
        case "mxfp4":
            return unpacked_entries(entries)[2], []
        case "fp8":
            _, rest, problems = dequantised_entries(entries, block_size(hf, str(directory / "config.json")), "BF16")
            return rest, problems
        case _:
            return without_prefix(entries, _prefix(hf), directory), []


def _prefix(hf: Mapping[str, Any]) -> str:
    """Of the tensors' names, in a larger model that has other parts as well."""
    larger = family_of(hf).larger(hf)
    return larger.prefix if larger else ""
