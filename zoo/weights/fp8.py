"""Checkpoints whose matrices are in FP8 with a scale a block (arXiv 2412.19437, section 3.3), read dequantised.

In place of a matrix NAME [R, C] the file has NAME [R, C] float8_e4m3fn and ``NAME_scale_inv`` [⌈R / h⌉, ⌈C / w⌉] for
blocks of h × w elements, 128 × 128 as published; the edge may cut off the last ones. An element is its FP8 value
times the scale of its block, taken in fp32 and rounded once to the dtype asked for. The weight maps need not know.

Shapes: R rows, C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.weights.ops import Region, Shape
from zoo.weights.source import Entry, TensorSource
from zoo.weights.target import SAFETENSORS_DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FP8 = "F8_E4M3"
SUFFIX = "_scale_inv"
SCALE_DTYPES = frozenset(("F32", "BF16"))


class Fp8Source(TensorSource):
    """A ``TensorSource`` with a tensor NAME in ``dtype`` in place of each pair NAME, ``NAME_scale_inv``.

    Raises:
        ValueError: as ``TensorSource``, or one of a pair without the other, of shapes or dtypes that do not fit.
    """

    mapped = False

    def __init__(self, directory: Path, block: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(directory)
        self._block, self._dtype = block, dtype
        name = SAFETENSORS_DTYPES[str(dtype).removeprefix("torch.")]
        self._scales, self.entries, problems = dequantised_entries(self.entries, block, name)
        for path, problem in problems:
            raise ValueError(f"{path}: {problem}")

    def read(self, name: str) -> Tensor:
        """See ``TensorSource``; a row of blocks is dequantised at a time."""
        if name not in self._scales:
            return super().read(name)
        return self.read_region(name, tuple(slice(0, size) for size in self.entries[name].shape))

    def read_region(self, name: str, region: Region) -> Tensor:
        """See ``TensorSource``; of the scales, those of the blocks that the box touches are read."""
        if name not in self._scales:
            return super().read_region(name, region)
        import torch

        (rows, columns), (height, width) = region, self._block
        top, left = rows.start // height, columns.start // width
        touched = (slice(top, -(-rows.stop // height)), slice(left, -(-columns.stop // width)))
        scales = self._file(self._scales[name].path).get_slice(f"{name}{SUFFIX}")[touched].float()
        of_column = torch.arange(columns.start, columns.stop) // width - left
        box = torch.empty((rows.stop - rows.start, columns.stop - columns.start), dtype=self._dtype)
        for number, of_block in enumerate(scales):
            start = max(rows.start, (top + number) * height)
            stop = min(rows.stop, (top + number + 1) * height)
            values = super().read_region(name, (slice(start, stop), columns)).float()
            box[start - rows.start : stop - rows.start] = values.mul_(of_block[of_column])
        return box


def block_size(hf: Mapping[str, Any], where: str) -> tuple[int, int]:
    """(rows, columns) of the blocks that share a scale, by the ``quantization_config`` of a published config.json.

    Raises:
        ValueError: the weights are quantised in another way than by blocks in float8_e4m3fn.
    """
    section = hf["quantization_config"]
    kind, block = section.get("fmt", "e4m3"), section.get("weight_block_size")
    if kind != "e4m3":
        raise ValueError(f"{where}: quantization_config.fmt = {kind!r} is not supported; give weights in e4m3 or bf16")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(
            f"{where}: quantization_config.weight_block_size = {block!r} is not supported; give two positive sizes, "
            "such as [128, 128], or the bf16 weights"
        )
    return block[0], block[1]


def dequantised_entries(
    entries: Mapping[str, Entry], block: tuple[int, int], dtype: str
) -> tuple[dict[str, Entry], dict[str, Entry], list[tuple[Path, str]]]:
    """Pair matrices with their scales.

    Args:
        entries: all tensors of a checkpoint.
        block: rows and columns that share a scale.
        dtype: that safetensors name, of a matrix once it is dequantised.

    Returns:
        The scales by the name of their matrix, all tensors with a dequantised one in place of each pair, and
        (file, problem) of what does not fit.
    """
    scales = {name.removesuffix(SUFFIX): entry for name, entry in entries.items() if name.endswith(SUFFIX)}
    rest = {name: entry for name, entry in entries.items() if not name.endswith(SUFFIX)}
    problems = []
    for name, scale in scales.items():
        if name not in rest:
            problems.append((scale.path, f"tensor '{name}{SUFFIX}' is there without {name!r}; download it again"))
        elif rest[name].dtype != FP8:
            problems.append((scale.path, f"tensor '{name}{SUFFIX}' scales {name!r}, which is {rest[name].dtype}"))
    for name, entry in rest.items():
        if entry.dtype != FP8:
            continue
        rest[name] = Entry(entry.path, entry.shape, dtype)
        problem = _misfit(name, entry.shape, scales.get(name), block)
        if problem:
            problems.append((scales.get(name, entry).path, problem))
    return scales, rest, problems


def _misfit(name: str, shape: Shape, scale: Entry | None, block: tuple[int, int]) -> str | None:
    """What is wrong with the ``scale`` of an FP8 tensor."""
    if scale is None:
        return f"tensor {name!r} is in FP8, but '{name}{SUFFIX}' is missing; download it again"
    if len(shape) != 2:
        return f"tensor {name!r} {list(shape)} is in FP8 and no matrix; only matrices are read in blocks"
    needed = [-(-size // step) for size, step in zip(shape, block, strict=True)]
    if list(scale.shape) != needed:
        return (
            f"tensor '{name}{SUFFIX}' has shape {list(scale.shape)}, but {list(shape)} in blocks of {list(block)} "
            f"needs {needed}"
        )
    if scale.dtype not in SCALE_DTYPES:
        return f"tensor '{name}{SUFFIX}' has dtype {scale.dtype}; only scales in bf16 and fp32 are read"
    return None
