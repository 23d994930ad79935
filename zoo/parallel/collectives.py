"""Collectives with gradients, and the count of what they send.

Shapes: T tokens, R rows sent, D model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """Bytes that this rank sent to other ranks in all-to-alls, forward and backward; what stays here is not counted."""

    ranks_per_node: int
    """Neighbouring ranks of the world that share the fast network."""
    within_node: int = 0
    between_nodes: int = 0

    @property
    def sent(self) -> int:
        """Bytes over either network."""
        return self.within_node + self.between_nodes

    def reset(self) -> None:
        """Count from 0 again."""
        self.within_node = self.between_nodes = 0

    def count(self, rows: list[int], row_bytes: int, group: dist.ProcessGroup) -> None:
        """Add ``rows`` of ``row_bytes`` bytes that go to each rank of ``group``."""
        here = dist.get_rank()
        for rank, sent in zip(dist.get_process_group_ranks(group), rows, strict=True):
            if rank // self.ranks_per_node != here // self.ranks_per_node:
                self.between_nodes += sent * row_bytes
            elif rank != here:
                self.within_node += sent * row_bytes


class Exchange:
    """One all-to-all of rows with uneven splits, forward and backward.

    ``start`` launches it and ``wait`` finishes it; what is computed between them overlaps with it. Autograd runs nodes
    in the reverse order of their making, so that the backward pass overlaps with the backward of the same computation:
    the backward of ``wait`` launches the reverse exchange, that of ``start`` waits for it.

    Args:
        send: Rows that go to each rank of ``group``.
        receive: Rows that come from each.
        group: The ranks.
        traffic: Where the bytes are counted.
    """

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup, traffic: Traffic) -> None:
        self.send, self.receive, self.group, self.traffic = send, receive, group, traffic
        self._flight: tuple[Any, Tensor, Tensor] | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Send rows [sum(send), ...]; the result only links this call to that of ``wait``."""
        link: Tensor = _Start.apply(rows, self)
        return link

    def wait(self, link: Tensor) -> Tensor:
        """[sum(receive), ...], sorted by the rank they came from."""
        arrived: Tensor = _Wait.apply(link, self)
        return arrived

    def launch(self, rows: Tensor, send: list[int], receive: list[int]) -> None:
        """Begin one direction."""
        rows = rows.contiguous()
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        row_bytes = rows.element_size() * rows[0].numel() if len(rows) else 0
        self.traffic.count(send, row_bytes, self.group)
        work = dist.all_to_all_single(out, rows, receive, send, group=self.group, async_op=True)
        self._flight = (work, rows, out)  # the rows must outlive the sending

    def land(self) -> Tensor:
        """Wait for what ``launch`` began, and return what came."""
        assert self._flight is not None
        (work, _, out), self._flight = self._flight, None
        work.wait()
        return out


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.launch(rows, exchange.send, exchange.receive)
        return rows.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.land(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange.launch(grads[0], exchange.receive, exchange.send)
        return grads[0].new_zeros(()), None


def exchange_sizes(send: Tensor, group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """send [ranks] int64 → (rows to each rank, rows from each rank) on the host."""
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send, group=group)
    sent, received = torch.stack((send, receive)).tolist()
    return sent, received


# ---------------------------------------------------------------------------------------------------------------
# Tensor ranks hold the same tokens: each takes a slice of them, and all get all results
# ---------------------------------------------------------------------------------------------------------------


def slice_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [T, ...], the same on all ranks → this rank's share of the tokens, at most ceil(T / ranks).

    The gradient is gathered, so that all that made ``x`` gets whole gradients on every rank, and needs no reduction.
    """
    part: Tensor = _Slice.apply(x, group)
    return part


def gather_tokens(part: Tensor, tokens: int, group: dist.ProcessGroup) -> Tensor:
    """The inverse: every rank's share → [T, ...], the same on all ranks."""
    whole: Tensor = _Gather.apply(part, tokens, group)
    return whole


def _slice(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    share = -(-len(x) // dist.get_world_size(group))
    rank = dist.get_rank(group)
    return x[rank * share : (rank + 1) * share]


def _gather(part: Tensor, tokens: int, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    share = -(-tokens // ranks)
    padded = part.new_zeros((share, *part.shape[1:]))
    padded[: len(part)] = part
    whole = part.new_empty((share * ranks, *part.shape[1:]))
    dist.all_gather_single(whole, padded, group=group)
    return whole[:tokens]


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.tokens, ctx.group = len(x), group
        return _slice(x, group).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.tokens, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, tokens: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(part, tokens, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _slice(grads[0], ctx.group).contiguous(), None, None


class SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over the ranks: of a tensor that each rank uses for other heads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
