"""Experts with biases and a clamped SwiGLU (arXiv 2508.10925, section 2.2), and the ways of computing them.

Shapes: N routed rows sorted by expert, E experts, D model, F FFN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.linear import linear
from zoo.moe.experts import Experts, as_autocast
from zoo.moe.ways import Way, choose, ways_of_rows

ALPHA = 1.702
"""x·sigmoid(1.702 x) is close to GELU (arXiv 1606.08415, section 2)."""


class ClampedExperts(Experts):
    """E networks down(clamped_swiglu(gate(x), up(x))), each of the three with a bias.

    Parameters: those of ``Experts``, ``gate_up_bias`` [E, 2, F] and ``down_bias`` [E, D].
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, limit: float) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size)
        self.limit = limit
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, 2, intermediate_size))
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size))

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """See ``Experts``."""
        return self.gate_up, self.down, self.gate_up_bias, self.down_bias

    def way(self, x: Tensor) -> Way:
        """See ``Experts``; the blocks have no biases."""
        return choose(x, self.down, ways_of_rows(x, self.down))

    def compute(self, rows: Tensor, counts: Tensor, *weights: Tensor) -> Tensor:
        """See ``Experts``."""
        gate_up, down, gate_up_bias, down_bias = weights
        way = WAYS[choose(rows, down, ways_of_rows(rows, down))]
        return way(rows, counts, gate_up, down, gate_up_bias, down_bias, self.limit)


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """g·sigmoid(α g)·(u + 1) with g at most ``limit`` and u within ± ``limit``."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(ALPHA * gate) * (up + 1)


def clamped_loop(
    rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor, down_bias: Tensor, limit: float
) -> Tensor:
    """The readable reference, and the tests' oracle: one expert after the other.

    Args:
        rows: [N, D], sorted by expert. counts: [E] int64. gate_up: [E, 2, F, D]. down: [E, D, F].
        gate_up_bias: [E, 2, F]. down_bias: [E, D]. limit: of the SwiGLU.

    Returns:
        [N, D].
    """
    out, start = [], 0
    for e, count in enumerate(counts.tolist()):
        x = rows[start : start + count]
        gate = F.linear(x, gate_up[e, 0], gate_up_bias[e, 0])
        up = F.linear(x, gate_up[e, 1], gate_up_bias[e, 1])
        out.append(F.linear(clamped_swiglu(gate, up, limit), down[e], down_bias[e]))
        start += count
    return torch.cat(out)


def clamped_split(
    rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor, down_bias: Tensor, limit: float
) -> Tensor:
    """As ``clamped_loop``; gate and up in one product, and no expert without rows is touched."""
    weights = (gate_up.flatten(1, 2), gate_up_bias.flatten(1, 2), down, down_bias)
    out = []
    for x, w1, b1, w2, b2 in zip(rows.split(counts.tolist()), *(w.unbind() for w in weights), strict=True):
        if len(x):
            gate, up = linear(x, w1, b1).chunk(2, dim=-1)
            out.append(linear(clamped_swiglu(gate, up, limit), w2, b2))
    return torch.cat(out) if out else rows


def clamped_grouped(
    rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor, down_bias: Tensor, limit: float
) -> Tensor:
    """As ``clamped_loop``; all experts in two grouped matrix products, without host traffic."""
    rows, gate_up, down, gate_up_bias, down_bias = as_autocast(rows, gate_up, down, gate_up_bias, down_bias)
    ends = counts.cumsum(0).to(torch.int32)
    expert = torch.searchsorted(ends, torch.arange(len(rows), device=rows.device), right=True)
    both = F.grouped_mm(rows, gate_up.flatten(1, 2).mT, offs=ends) + gate_up_bias.flatten(1, 2)[expert]
    gate, up = both.chunk(2, dim=-1)
    return F.grouped_mm(clamped_swiglu(gate, up, limit), down.mT, offs=ends) + down_bias[expert]


WAYS: dict[Way, Callable[..., Tensor]] = {"loop": clamped_loop, "split": clamped_split, "grouped": clamped_grouped}
"""As in ``zoo.moe.experts``."""
