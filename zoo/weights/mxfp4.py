"""Checkpoints whose experts are in MXFP4 (OCP Microscaling Formats 1.0), read as if they were in bf16.

In place of a tensor NAME [E, C, R] the file has ``NAME_blocks`` [E, R, G, 16] uint8, two values a byte, the lower half
first, and ``NAME_scales`` [E, R, G] uint8, a power of two for every 32 values. The weight maps need not know: a source
of this kind has NAME itself. All values are exact in bf16.

Shapes: E experts, C columns of the input, R rows of the output, G = C / 32 groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.weights.ops import Region
from zoo.weights.source import Entry, TensorSource

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32
"""Values that share a scale."""

GROUPS = 16_384
"""So many are unpacked at once: what is needed besides the result is small."""

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What three bits of exponent and mantissa stand for; the fourth, highest bit is the sign (section 5.3.3)."""

SCALE_BIAS = 127
"""A scale byte s stands for 2^(s - 127) (section 5.4.1)."""


class Mxfp4Source(TensorSource):
    """A ``TensorSource`` with a bf16 tensor NAME in place of each pair ``NAME_blocks``, ``NAME_scales``.

    Raises:
        ValueError: as ``TensorSource``, or one of a pair without the other, of shapes or dtypes that do not fit.
    """

    mapped = False

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._blocks, self._scales, self.entries = unpacked_entries(self.entries)

    def read(self, name: str) -> Tensor:
        """See ``TensorSource``; one expert is unpacked at a time."""
        if name not in self._blocks:
            return super().read(name)
        import torch

        shape = self.entries[name].shape
        whole = torch.empty(shape, dtype=torch.bfloat16)
        for expert in range(shape[0]):
            box = (slice(expert, expert + 1), slice(0, shape[1]), slice(0, shape[2]))
            whole[expert] = self.read_region(name, box)[0]
        return whole

    def read_region(self, name: str, region: Region) -> Tensor:
        """See ``TensorSource``; groups are read whole."""
        if name not in self._blocks:
            return super().read_region(name, region)
        experts, columns, rows = region
        groups = slice(columns.start // GROUP, -(-columns.stop // GROUP))
        pairs = slice(0, GROUP // 2)
        blocks = self._packed(f"{name}_blocks", self._blocks[name], (experts, rows, groups, pairs))
        scales = self._packed(f"{name}_scales", self._scales[name], (experts, rows, groups))
        first = groups.start * GROUP
        return unpack(blocks, scales)[..., columns.start - first : columns.stop - first].mT.contiguous()

    def _packed(self, name: str, entry: Entry, region: Region) -> Tensor:
        tensor: Tensor = self._file(entry.path).get_slice(name)[region]
        return tensor


def unpacked_entries(
    entries: Mapping[str, Entry],
) -> tuple[dict[str, Entry], dict[str, Entry], dict[str, Entry]]:
    """(blocks, scales, all tensors with a bf16 one in place of each pair); see ``Mxfp4Source`` for the errors."""
    rest = dict(entries)
    packed = [name.removesuffix("_blocks") for name in entries if name.endswith("_blocks")]
    for name in packed:
        blocks, scales = entries[f"{name}_blocks"], entries.get(f"{name}_scales")
        if scales is None:
            raise ValueError(f"{blocks.path}: {name}_blocks is there without {name}_scales; download it again")
        fits = blocks.shape == (*scales.shape, GROUP // 2) and len(scales.shape) == 3
        if not fits or {blocks.dtype, scales.dtype} != {"U8"}:
            raise ValueError(
                f"{blocks.path}: {name}_blocks {list(blocks.shape)} {blocks.dtype} and {name}_scales "
                f"{list(scales.shape)} {scales.dtype} are not MXFP4: give uint8 [E, R, G, 16] and [E, R, G]"
            )
    all_blocks = {name: rest.pop(f"{name}_blocks") for name in packed}
    all_scales = {name: rest.pop(f"{name}_scales") for name in packed}
    for name, entry in all_scales.items():
        experts, rows, groups = entry.shape
        rest[name] = Entry(entry.path, (experts, groups * GROUP, rows), "BF16")
    return all_blocks, all_scales, rest


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks [..., G, 16] uint8, scales [..., G] uint8 → values [..., 32·G] bf16."""
    import torch

    table = torch.tensor((*VALUES, *(-v for v in VALUES)), dtype=torch.bfloat16)
    packed = blocks.reshape(-1, GROUP // 2)
    powers = torch.ldexp(torch.ones(len(packed), 1, 1), scales.reshape(-1, 1, 1).int() - SCALE_BIAS).to(torch.bfloat16)
    values = torch.empty((*packed.shape, 2), dtype=torch.bfloat16)
    chunks = zip(values.split(GROUPS), packed.split(GROUPS), powers.split(GROUPS), strict=True)
    for part, pairs, power in chunks:
        part[..., 0] = table[(pairs & 0xF).int()]
        part[..., 1] = table[(pairs >> 4).int()]
        part *= power
    return values.view(*blocks.shape[:-2], -1)
