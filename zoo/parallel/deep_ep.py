"""The exchange through the kernels of DeepEP (github.com/deepseek-ai/DeepEP), where they are installed and apply.

They do what ``expert_parallel`` says: a token goes once to a node, and on within it once to each rank that holds any of
its experts; rows are summed on the way back. Used is ``deep_ep.Buffer``, as its documentation describes it. The kernels
count no bytes: ``Traffic`` stays 0.

Shapes: T tokens, D model, E experts, K top-k, M expert ranks, Q received rows, N routed rows here.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.moe.router import RouterOutput
from zoo.parallel.collectives import Traffic
from zoo.parallel.expert_parallel import ExchangeDispatcher, Sorted, sort_by_expert
from zoo.parallel.rows import weighted_sum_rows

PEERS = 8
"""Ranks of a node that the kernels between nodes are written for."""
GROUP_SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
"""Numbers of ranks for which DeepEP has settings."""
ROW_BYTES, LARGEST_ROW = 512, 8064
"""A row of bf16 is copied in units of so many bytes, and has at most so many elements."""


def deep_ep_applies(device_type: str, dtype: torch.dtype, hidden_size: int, ranks: int, ranks_per_node: int) -> bool:
    """Whether DeepEP is installed and takes rows of D = ``hidden_size`` elements between ``ranks`` expert ranks."""
    in_a_node = ranks <= min(ranks_per_node, PEERS)
    fits = (in_a_node or ranks_per_node == PEERS) and ranks in GROUP_SIZES
    fits = fits and hidden_size * 2 % ROW_BYTES == 0 and hidden_size <= LARGEST_ROW
    return (
        device_type == "cuda" and dtype == torch.bfloat16 and fits and importlib.util.find_spec("deep_ep") is not None
    )


def make_buffer(group: dist.ProcessGroup, hidden_size: int) -> Any:
    """The ``deep_ep.Buffer`` that all layers share. Every rank of ``group`` calls it."""
    from deep_ep import Buffer

    ranks, row = group.size(), hidden_size * 2
    configs = (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks))
    in_node = max(config.get_nvl_buffer_size_hint(row, ranks) for config in configs)
    between = max(config.get_rdma_buffer_size_hint(row, ranks) for config in configs)
    return Buffer(group, in_node, between)


class _Crossing:
    """One dispatch: the kernels' handle, with which rows go back, and what is under way on their stream."""

    def __init__(self, buffer: Any, experts: Tensor, num_experts: int) -> None:
        self.buffer, self.experts, self.num_experts = buffer, experts, num_experts
        self.local_experts = num_experts // buffer.group_size
        self.handle: Any = None
        self.received: Tensor | None = None
        """[Q, K], experts of this rank, numbered from 0; -1 stands for an expert elsewhere."""
        self._flight: tuple[Tensor, Tensor, Any] | None = None

    def dispatch(self, x: Tensor, weights: Tensor) -> None:
        """Send tokens [T, D] and fp32 weights [T, K]."""
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(self.experts, self.num_experts)
        rows, self.received, row_weights, _, self.handle, event = self.buffer.dispatch(
            x.contiguous(),
            topk_idx=self.experts,
            topk_weights=weights.contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )
        self._flight = (rows, row_weights, event)

    def combine(self, rows: Tensor, weights: Tensor) -> None:
        """Send rows [Q, D] and weights [Q, K] back, to be summed."""
        x, x_weights, event = self.buffer.combine(
            rows.contiguous(), self.handle, topk_weights=weights.contiguous(), async_finish=True
        )
        self._flight = (x, x_weights, event)

    def land(self) -> tuple[Tensor, Tensor]:
        """Wait, on this stream, for what is under way."""
        assert self._flight is not None
        (rows, weights, event), self._flight = self._flight, None
        event.current_stream_wait()
        return rows, weights


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.dispatch(x, weights)
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.crossing.land(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, crossing: _Crossing) -> tuple[Tensor, Tensor]:
        ctx.crossing = crossing
        return crossing.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.crossing.combine(*grads)
        return grads[0].new_zeros(()), None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        out: Tensor = crossing.buffer.combine(rows.contiguous(), crossing.handle)[0]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.crossing.buffer.dispatch(grads[0].contiguous(), handle=ctx.crossing.handle)[0], None


@dataclass(frozen=True, eq=False)
class _Flight:
    link: Tensor
    crossing: _Crossing
    tokens: int
    """T, tokens of all tensor ranks."""


class DeepEPDispatcher(ExchangeDispatcher):
    """``AllToAllDispatcher`` by DeepEP's kernels: bf16 rows, and sums in bf16 between ranks.

    Args:
        buffer: A ``deep_ep.Buffer`` over the expert ranks.
        traffic: Stays 0.
        tensor_group: Ranks that hold the same tokens.
    """

    def __init__(self, buffer: Any, traffic: Traffic, tensor_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(traffic, tensor_group)
        self.buffer = buffer

    def start(self, x: Tensor, routing: RouterOutput) -> _Flight:
        """See ``ExchangeDispatcher``."""
        # The kernels take -1 for no expert.
        experts = routing.experts if routing.kept is None else routing.experts.where(routing.kept, -1)
        crossing = _Crossing(self.buffer, self.share(experts).contiguous(), routing.scores.shape[-1])
        return _Flight(_Start.apply(self.share(x), self.share(routing.weights), crossing), crossing, len(x))

    def finish(self, flight: _Flight) -> tuple[Tensor, Tensor, tuple[_Flight, Sorted]]:
        """See ``ExchangeDispatcher``."""
        rows, weights = _Wait.apply(flight.link, flight.crossing)
        local_experts = flight.crossing.local_experts
        assert flight.crossing.received is not None
        ids = flight.crossing.received.long()
        rows, counts, order = sort_by_expert(rows, weights, ids.where(ids >= 0, local_experts), local_experts)
        return rows, counts, (flight, order)

    def combine(self, rows: Tensor, state: tuple[_Flight, Sorted]) -> Tensor:
        """See ``ExchangeDispatcher``."""
        flight, order = state
        summed = weighted_sum_rows(rows, order.weights, order.row, order.received)
        return self.unshare(_Back.apply(summed, flight.crossing), flight.tokens)
