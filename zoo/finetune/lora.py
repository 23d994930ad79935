"""Low-rank adapters of linear layers and of stacked experts, put in their places from outside the blocks.

What an adapter computes is added to the product with the frozen matrix: no gradient has that matrix's size.

Shapes: N rows of any number of dimensions, or routed rows sorted by expert; E experts; n LoRA experts, r rank;
o rows and i columns of a matrix.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.finetune.config import LoRAConfig, MoLoRAConfig
from zoo.layers.linear import linear
from zoo.model import initial_values
from zoo.moe.clamped import ClampedExperts, clamped_swiglu
from zoo.moe.experts import Experts, as_autocast
from zoo.moe.router import RouterOutput
from zoo.moe.ways import choose, ways_of_rows


class Adapter(Protocol):
    """What stands beside one matrix W [o, i], or beside those of stacked experts [E, o, i]."""

    def __call__(self, x: Tensor, product: Tensor, weight: Tensor, counts: Tensor | None) -> Tensor:
        """What is computed in place of ``product``.

        Args:
            x: [N, i]. product: W x, [N, o]. weight: W.
            counts: [E] int64, rows of each expert in turn; ``None`` where there is one matrix only.

        Returns:
            [N, o].
        """
        ...


class LoRA(nn.Module):
    """W x + s·B A x (arXiv 2106.09685, equation 3), of stacked experts each with A and B of its own.

    A [r, i] begins normal with the variance of the published code, 1/(3 i), i being the columns of one expert's matrix;
    B [o, r] begins with 0.
    """

    def __init__(self, weight: Tensor, config: LoRAConfig, name: str, seed: int) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        self.scaling = config.scaling
        self.a = nn.Parameter(weight.new_empty(*stack, config.rank, columns))
        self.b = nn.Parameter(weight.new_zeros(*stack, rows, config.rank))
        _draw(self.a, f"{name}.a", seed)

    def low_rank(self, x: Tensor, counts: Tensor | None) -> Tensor:
        """s·B A x, [N, o]."""
        return self.scaling * grouped_linear(grouped_linear(x, self.a, counts), self.b, counts)

    def forward(self, x: Tensor, product: Tensor, weight: Tensor, counts: Tensor | None = None) -> Tensor:
        """See ``Adapter``."""
        return product + self.low_rank(x, counts)

    def merged(self, weight: Tensor) -> Tensor:
        """W' of W, [o, i] or [E, o, i]."""
        return weight + self.scaling * (self.b @ self.a)


class DoRA(LoRA):
    """m ⊙ (W + s·B A) x / ‖W + s·B A‖, with lengths of rows (arXiv 2402.09353, equation 5).

    m [E · o], one vector so that no weight decay is on it, begins with ‖W‖. As in section 4.3 no gradient goes through
    the norm.
    """

    def __init__(self, weight: Tensor, config: LoRAConfig, name: str, seed: int) -> None:
        super().__init__(weight, config, name, seed)
        self.magnitude = nn.Parameter(weight.detach().norm(dim=-1).flatten())

    def forward(self, x: Tensor, product: Tensor, weight: Tensor, counts: Tensor | None = None) -> Tensor:
        """See ``Adapter``."""
        lengths = self.lengths(weight)
        scale = self.magnitude.view_as(lengths) / lengths
        if counts is not None:
            scale = scale.repeat_interleave(counts, dim=0, output_size=len(x))
        return (super().forward(x, product, weight, counts) * scale).to(product.dtype)

    @torch.no_grad()
    def lengths(self, weight: Tensor) -> Tensor:
        """‖W + s·B A‖ of every row, [o] or [E, o], without making the sum: ‖w‖² + 2 b·(A w) + b·(A Aᵀ b)."""
        with torch.autocast(weight.device.type, enabled=False):
            a, b = self.a, self.scaling * self.b
            cross = weight @ a.mT + b @ (a @ a.mT) / 2
            return (weight.square().sum(dim=-1) + 2 * (b * cross).sum(dim=-1)).clamp(min=0).sqrt()

    def merged(self, weight: Tensor) -> Tensor:
        """See ``LoRA``."""
        weight = super().merged(weight)
        lengths = weight.detach().norm(dim=-1)
        return (self.magnitude.view_as(lengths) / lengths).unsqueeze(-1) * weight


class MixtureOfLoRA(nn.Module):
    """W x + s·Σᵢ gᵢ(x) Bᵢ Aᵢ x with g = softmax(G x) over n LoRA experts (arXiv 2312.09979, equation 4).

    All of them are computed, as in both papers. Beside stacked experts it is one mixture for the rows of all.
    """

    def __init__(self, weight: Tensor, config: MoLoRAConfig, name: str, seed: int) -> None:
        super().__init__()
        rows, columns = weight.shape[-2:]
        self.scaling, self.num_experts = config.scaling, config.num_experts
        self.router = nn.Parameter(weight.new_empty(config.num_experts, columns))
        self.a = nn.Parameter(weight.new_empty(config.num_experts * config.rank, columns))
        self.b = nn.Parameter(weight.new_zeros(rows, config.num_experts * config.rank))
        for part in ("router", "a"):
            _draw(getattr(self, part), f"{name}.{part}", seed)

    def forward(self, x: Tensor, product: Tensor, weight: Tensor, counts: Tensor | None = None) -> Tensor:
        """See ``Adapter``."""
        with torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(x.dtype, torch.float32)
            gates = linear(x.to(exact), self.router.to(exact)).softmax(dim=-1)
        inner = linear(x, self.a).unflatten(-1, (self.num_experts, -1))
        mixed = (inner * gates.unsqueeze(-1)).to(inner.dtype).flatten(-2)
        return product + self.scaling * linear(mixed, self.b)


class AdaptedLinear(nn.Module):
    """A frozen ``nn.Linear`` and its adapter. Blocks that read ``weight`` themselves get the merged one."""

    def __init__(self, base: nn.Linear, adapter: LoRA | MixtureOfLoRA) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """x [..., i] → [..., o]."""
        weight, bias = self.base.weight, self.base.bias
        out: Tensor = self.adapter(x, linear(x, weight), weight)
        return out if bias is None else out + bias

    @property
    def weight(self) -> Tensor:
        """[o, i], W' of the latent that is absorbed and of the output head in its chunked loss."""
        assert isinstance(self.adapter, LoRA)
        return self.adapter.merged(self.base.weight)

    def merged(self) -> nn.Linear:
        """The linear layer that computes the same."""
        self.base.weight.data = self.weight.detach()
        return self.base


class AdaptedExperts(nn.Module):
    """Frozen ``Experts`` and their adapters, one beside gate and up together and one beside down."""

    def __init__(self, base: Experts, gate_up: LoRA | MixtureOfLoRA, down: LoRA | MixtureOfLoRA) -> None:
        super().__init__()
        self.base = base
        self.gate_up_adapter = gate_up
        self.down_adapter = down

    def mixes(self, x: Tensor) -> bool:
        """See ``Experts``: never, the blocks know of no adapters."""
        return False

    def forward(self, rows: Tensor, counts: Tensor | RouterOutput) -> Tensor:
        """rows [N, D] sorted by expert, counts [E] int64 rows of each expert in turn → [N, D]."""
        assert isinstance(counts, Tensor)
        base, (gate_up, down) = self.base, matrices(self.base)
        clamped = base if isinstance(base, ClampedExperts) else None
        both = self.gate_up_adapter(rows, grouped_linear(rows, gate_up, counts), gate_up, counts)
        if clamped is not None:
            both = both + _of_rows(clamped.gate_up_bias.flatten(1), counts, rows)
        gate, up = both.chunk(2, dim=-1)
        inner = base.gate(gate) * up if clamped is None else clamped_swiglu(gate, up, clamped.limit)
        out: Tensor = self.down_adapter(inner, grouped_linear(inner, down, counts), down, counts)
        return out if clamped is None else out + _of_rows(clamped.down_bias, counts, rows)

    def merged(self) -> Experts:
        """The experts that compute the same."""
        gate_up, down = matrices(self.base)
        assert isinstance(self.gate_up_adapter, LoRA) and isinstance(self.down_adapter, LoRA)
        self.base.gate_up.data = self.gate_up_adapter.merged(gate_up).detach().view_as(self.base.gate_up)
        self.base.down.data = self.down_adapter.merged(down).detach()
        return self.base


def matrices(experts: Experts) -> tuple[Tensor, Tensor]:
    """What is adapted of experts: gate and up as one matrix [E, 2·F, D], and down [E, D, F]."""
    return experts.gate_up.flatten(1, 2), experts.down


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor | None) -> Tensor:
    """x [N, i] times weight [o, i], or, of rows sorted by expert, times that of their own in [E, o, i] → [N, o]."""
    if counts is None:
        return linear(x, weight)
    able = ways_of_rows(x, weight)
    del able["loop"]
    if choose(x, weight, able) == "grouped":
        x, weight = as_autocast(x, weight)
        return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0).to(torch.int32))
    # unbind and not indexing: the backward of indexing writes a whole [E, …] gradient for every expert.
    parts = zip(x.split(counts.tolist()), weight.unbind(), strict=True)
    out = [linear(part, matrix) for part, matrix in parts if len(part)]
    return torch.cat(out) if out else x.new_zeros(0, weight.shape[1])


def _of_rows(values: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    """values [E, o] → [N, o], of the expert that each of the rows goes to."""
    return values.repeat_interleave(counts, dim=0, output_size=len(rows))


@torch.no_grad()
def _draw(parameter: nn.Parameter, name: str, seed: int) -> None:
    """Fill a matrix, or each of stacked ones, with normal numbers of variance 1/(3 · columns)."""
    std = (3 * parameter.shape[-1]) ** -0.5
    with torch.device("cpu"):
        for index, values in initial_values(name, parameter.shape, seed, std, range(len(parameter))):
            parameter[index].copy_(values)
