"""Experts without a gate, and the ways of computing them.

Shapes: N routed rows sorted by expert, E experts, D model, F FFN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.linear import linear
from zoo.moe.experts import StackedExperts, as_autocast
from zoo.moe.ways import Way, choose, ways_of_rows


class ReLUExperts(StackedExperts):
    """E networks down(max(0, up(x))) (arXiv 2006.16668, section 2.2).

    Parameters: ``up`` [E, F, D] and ``down`` [E, D, F].
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """See ``StackedExperts``."""
        return self.up, self.down

    def compute(self, rows: Tensor, counts: Tensor, *weights: Tensor) -> Tensor:
        """See ``StackedExperts``."""
        up, down = weights
        way = WAYS[choose(rows, down, ways_of_rows(rows, down))]
        return way(rows, counts, up, down)


def relu_loop(rows: Tensor, counts: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The readable reference, and the tests' oracle: one expert after the other.

    Args:
        rows: [N, D], sorted by expert. counts: [E] int64. up: [E, F, D]. down: [E, D, F].

    Returns:
        [N, D].
    """
    out, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        x = rows[start : start + count]
        out.append(F.linear(F.relu(F.linear(x, up[expert])), down[expert]))
        start += count
    return torch.cat(out)


def relu_split(rows: Tensor, counts: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As ``relu_loop``; no expert without rows is touched.

    ``unbind`` and not indexing: the backward of indexing writes a whole [E, …] gradient for every expert.
    """
    parts = zip(rows.split(counts.tolist()), up.unbind(), down.unbind(), strict=True)
    out = [linear(F.relu(linear(x, w1)), w2) for x, w1, w2 in parts if len(x)]
    return torch.cat(out) if out else rows


def relu_grouped(rows: Tensor, counts: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As ``relu_loop``; all experts in two grouped matrix products, without host traffic."""
    rows, up, down = as_autocast(rows, up, down)
    ends = counts.cumsum(0).to(torch.int32)
    return F.grouped_mm(F.relu(F.grouped_mm(rows, up.mT, offs=ends)), down.mT, offs=ends)


WAYS: dict[Way, Callable[..., Tensor]] = {"loop": relu_loop, "split": relu_split, "grouped": relu_grouped}
"""As in ``zoo.moe.experts``."""
