"""Rotary positions: frequencies under each context extension, and the rotation in both layouts.

Shapes: B batch, S sequence, H heads, d rotated size of a head.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import Llama3Scaling, RopeConfig, YarnScaling


def inverse_frequencies(rope: RopeConfig, size: int) -> tuple[Tensor, float]:
    """Angular frequency of each rotated pair, and the factor on cos and sin.

    Returns:
        ([size / 2] fp32 in radians a position, scale of cos and sin; 1 except under YaRN).
    """
    frequencies = 1.0 / rope.theta ** (torch.arange(0, size, 2, device="cpu").float() / size)
    if rope.linear:
        return frequencies / rope.linear.factor, 1.0
    if rope.llama3:
        return _llama3(frequencies, rope.llama3), 1.0
    if rope.yarn:
        return _yarn(frequencies, rope.theta, size, rope.yarn), rope.yarn.attention_factor
    return frequencies, 1.0


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Interpolate wavelengths longer than context/low_freq_factor, keep those shorter than context/high_freq_factor."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelengths
    ramp = scaling.high_freq_factor - scaling.low_freq_factor
    # Without a ramp a frequency is either kept or divided.
    kept = (
        ((turns - scaling.low_freq_factor) / ramp).clamp(0, 1) if ramp else (turns >= scaling.low_freq_factor).float()
    )
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn(frequencies: Tensor, theta: float, size: int, scaling: YarnScaling) -> Tensor:
    """NTK-by-parts (arXiv 2309.00071, section 3.2): keep fast frequencies, interpolate slow ones, a ramp between."""

    def pair_turning(rotations: float) -> float:
        """Index of the pair that makes ``rotations`` turns over the original context."""
        return size * math.log(scaling.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    # A ramp of width zero would divide by zero; the published code widens it by a thousandth of a pair.
    width = (high - low) or 0.001
    interpolated = ((torch.arange(size // 2, device="cpu").float() - low) / width).clamp(0, 1)
    return frequencies * (interpolated / scaling.factor + (1 - interpolated))


class Rotary:
    """cos and sin for given positions, from a table of those so far. fp32 whatever dtype the model is cast to."""

    def __init__(self, rope: RopeConfig, size: int) -> None:
        self.frequencies, self.scale = inverse_frequencies(rope, size)
        self.layout = rope.layout
        self._table = torch.empty(0, 2 * size, device="cpu")

    def __call__(self, positions: Tensor, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin as ``rotate`` takes them: of each element of a head, the sine of a pair's first negative.

        Args:
            positions: [B, S] int64.
            end: what no position reaches; given, so that no GPU is asked for the largest.
            dtype: of what is rotated.

        Returns:
            cos, sin [B, S, 1, d], fp32 or ``dtype`` if that is wider.
        """
        if end > len(self._table) or positions.device != self._table.device:
            self._table = self._tabulate(max(end, 2 * len(self._table)), positions.device)
        exact = torch.promote_types(dtype, torch.float32)
        cos, sin = F.embedding(positions, self._table).unsqueeze(2).to(exact).chunk(2, dim=-1)
        return cos, sin

    @torch.inference_mode(False)  # training may go on with a table that was made for generation
    @torch.no_grad()
    def _tabulate(self, end: int, device: torch.device) -> Tensor:
        """[end, 2 d]: cos and sin of the positions before ``end``."""
        angles = torch.arange(end, device=device).float()[:, None] * self.frequencies.to(device)
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        join = torch.cat if self.layout == "split" else _interleave
        return torch.cat((join((cos, cos), -1), join((-sin, sin), -1)), dim=-1)


def rotary_of_last(rotary: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, 1, d] → those of the last ``count`` tokens."""
    cos, sin = rotary
    return rotary if count == cos.shape[1] else (cos[:, -count:], sin[:, -count:])


class NoRotary:
    """Takes the place of ``Rotary`` in a model without rotary positions: cos and sin of no pair."""

    def __call__(self, positions: Tensor, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [B, S] → twice [B, S, 1, 0]."""
        nothing = torch.empty(*positions.shape, 1, 0, dtype=dtype, device=positions.device)
        return nothing, nothing


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: Literal["split", "interleaved"]) -> Tensor:
    """Rotate each pair of x [B, S, H, d] by its angle (arXiv 2104.09864, equation 34); cos, sin as from ``Rotary``.

    In the dtype of cos and sin, and rounded to that of x once, at the end.
    """
    partner = x.roll(x.shape[-1] // 2, -1) if layout == "split" else x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, partner, sin).to(x.dtype)


def _interleave(halves: tuple[Tensor, Tensor], dim: int) -> Tensor:
    """Elements of both in turn along the last dimension."""
    return torch.stack(halves, dim).flatten(-2)
