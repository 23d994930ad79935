"""The routed experts as stacked parameters, and the ways of computing them.

Shapes: T tokens, N routed rows sorted by expert, E experts, D model, F FFN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.layers.ffn import Activation, gelu_tanh
from zoo.layers.linear import linear, uses_onednn
from zoo.moe.blocked import blocked_applies, mix_blocked, mix_few, mix_one, one_applies
from zoo.moe.router import RouterOutput
from zoo.moe.ways import Way, choose, grouped_applies, product_dtype, ways_of_rows

FEW_WEIGHTS = 1 << 17
"""Numbers of an expert's gate and up, at most, with which few tokens are best in grouped products beside oneDNN."""


class StackedExperts(nn.Module, ABC):
    """E networks of one kind, whose parameters are stacked along their first dimension."""

    def forward(self, x: Tensor, of: Tensor | RouterOutput) -> Tensor:
        """What experts make of rows or, where ``mixes(x)``, of tokens.

        Args:
            x: rows [N, D] sorted by expert; or tokens [T, D].
            of: counts [E] int64, rows of each expert in turn; or the routing of the tokens.

        Returns:
            [N, D]; or [T, D], each token's sum over its experts of weight · row.
        """
        assert isinstance(of, Tensor), "these experts take rows only"
        return self.compute(x, of, *self.weights)

    def forward_again(self, forward: Callable[..., Tensor], x: Tensor, of: Tensor | RouterOutput) -> Tensor:
        """``forward(x, of)``, which is this module's own or stands for it, keeping no activations of the experts.

        What the backward pass needs of them it computes again.
        """
        out: Tensor = checkpoint(forward, x, of, use_reentrant=False)
        return out

    def mixes(self, x: Tensor) -> bool:
        """Whether tokens x [T, D] are best given to ``forward`` as they are, not sorted into rows."""
        return False

    @property
    @abstractmethod
    def weights(self) -> tuple[nn.Parameter, ...]:
        """The parameters as ``compute`` takes them."""

    @abstractmethod
    def compute(self, rows: Tensor, counts: Tensor, *weights: Tensor) -> Tensor:
        """``forward`` of rows with ``weights`` in place of the parameters: those of some experts, perhaps."""


class Experts(StackedExperts):
    """E SwiGLU networks. Parameters: ``gate_up`` [E, 2, F, D] (gate, then up) and ``down`` [E, D, F]."""

    activation: Activation = staticmethod(F.silu)

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2, intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x: Tensor, of: Tensor | RouterOutput) -> Tensor:
        """See ``StackedExperts``."""
        if not isinstance(of, RouterOutput):
            return super().forward(x, of)
        return OF_TOKENS[self.way(x)](x, of, self.gate_up, self.down, self.activation)

    def forward_again(self, forward: Callable[..., Tensor], x: Tensor, of: Tensor | RouterOutput) -> Tensor:
        """See ``StackedExperts``. The blocks compute again what they need, where a checkpoint would compute all."""
        if isinstance(of, RouterOutput) and self.way(x) == "blocked":
            return mix_blocked(x, of, self.gate_up, self.down, self.activation, keep=False)
        return super().forward_again(forward, x, of)

    def mixes(self, x: Tensor) -> bool:
        """See ``StackedExperts``."""
        return self.way(x) in OF_TOKENS

    def way(self, x: Tensor) -> Way:
        """How tokens x [T, D] are computed."""
        down, gate_up = self.down, self.gate_up
        blocked = partial(blocked_applies, x, gate_up, self.activation)

        def few() -> bool:
            # torch's grouped product is MKL's: where oneDNN is faster, only for what it is too small for.
            suits = not uses_onednn() or gate_up[0].numel() <= FEW_WEIGHTS
            fits = len(x) <= len(down) and grouped_applies(x, down)
            return suits and fits and not torch.is_grad_enabled() and blocked()

        one = partial(one_applies, x, gate_up)
        return choose(x, down, {**ways_of_rows(x, down), "blocked": blocked, "few": few, "single": one})

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """See ``StackedExperts``."""
        return self.gate_up, self.down

    def compute(self, rows: Tensor, counts: Tensor, *weights: Tensor) -> Tensor:
        """See ``StackedExperts``."""
        gate_up, down = weights
        way = WAYS[choose(rows, down, ways_of_rows(rows, down))]
        return way(rows, counts, gate_up, down, self.gate)

    def gate(self, x: Tensor) -> Tensor:
        """What the pre-activations of the gate become."""
        return self.activation(x)


class GEGLUExperts(Experts):
    """E GEGLU networks: as ``Experts``, with the tanh form of GELU (arXiv 2002.05202, equation 5)."""

    activation = staticmethod(gelu_tanh)


class DropoutExperts(Experts):
    """As ``Experts`` with this activation, and dropout of what enters ``down`` (arXiv 2101.03961, section 2.4)."""

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, activation: Activation, rate: float
    ) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size)
        self.activation = activation
        self.rate = rate

    def way(self, x: Tensor) -> Way:
        """See ``Experts``; the blocks drop nothing."""
        return choose(x, self.down, ways_of_rows(x, self.down)) if self.training else super().way(x)

    def gate(self, x: Tensor) -> Tensor:
        """See ``Experts``. What is dropped of one factor of a product is dropped of the product."""
        return F.dropout(self.activation(x), self.rate, self.training)


def experts_loop(
    rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, activation: Activation = F.silu
) -> Tensor:
    """The readable reference, and the tests' oracle: one expert after the other.

    Args:
        rows: [N, D], sorted by expert. counts: [E] int64. gate_up: [E, 2, F, D]. down: [E, D, F].
        activation: of the gate.

    Returns:
        [N, D].
    """
    out, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        x = rows[start : start + count]
        gate, up = F.linear(x, gate_up[expert, 0]), F.linear(x, gate_up[expert, 1])
        out.append(F.linear(activation(gate) * up, down[expert]))
        start += count
    return torch.cat(out)


def experts_split(
    rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, activation: Activation = F.silu
) -> Tensor:
    """Arguments and result as ``experts_loop``; gate and up in one product, and no expert without rows is touched.

    ``unbind`` and not indexing: the backward of indexing writes a whole [E, …] gradient for every expert.
    """
    sizes = counts.tolist()
    out = []
    for x, up, dn in zip(rows.split(sizes), gate_up.flatten(1, 2).unbind(), down.unbind(), strict=True):
        if len(x):
            gate, value = linear(x, up).chunk(2, dim=-1)
            out.append(linear(activation(gate) * value, dn))
    return torch.cat(out) if out else rows


def experts_grouped(
    rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, activation: Activation = F.silu
) -> Tensor:
    """Arguments and result as ``experts_loop``; all experts in two grouped matrix products, without host traffic."""
    rows, gate_up, down = as_autocast(rows, gate_up, down)
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(rows, gate_up.flatten(1, 2).mT, offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(activation(gate) * up, down.mT, offs=ends)


WAYS: dict[Way, Callable[..., Tensor]] = {"loop": experts_loop, "split": experts_split, "grouped": experts_grouped}
"""Ways of computing sorted rows."""

OF_TOKENS: dict[Way, Callable[..., Tensor]] = {"blocked": mix_blocked, "few": mix_few, "single": mix_one}
"""Ways of computing tokens with their routing."""


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in the dtype that autocast gives to products; grouped ones are not on its list."""
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    dtype = product_dtype(tensors[0])
    return tuple(tensor.to(dtype) for tensor in tensors)
