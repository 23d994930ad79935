"""One hop of tokens towards their experts: a token goes once to each rank of a group that holds any of them.

Shapes: T tokens, D model, E experts of the group, K top-k, R rows sent, Q rows received.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.parallel.collectives import Exchange, Traffic, exchange_sizes
from zoo.parallel.rows import copy_rows, sum_rows


class Hop:
    """Where the tokens go is exchanged at once; the tokens themselves by ``start`` and ``wait``; results by ``back``.

    Args:
        experts: [T, K], numbers from 0 to E - 1; E stands for an expert that no rank of the group holds.
        num_experts: E; rank r of the group holds those from r · E / ranks on.
        group: The ranks.
        traffic: Where the bytes are counted.
    """

    def __init__(self, experts: Tensor, num_experts: int, group: dist.ProcessGroup, traffic: Traffic) -> None:
        ranks = dist.get_world_size(group)
        self.num_experts = num_experts // ranks
        """E / ranks: of one rank."""
        destination = experts // self.num_experts
        wanted = torch.zeros(len(experts), ranks + 1, dtype=torch.bool, device=experts.device)
        wanted = wanted.scatter_(1, destination, True)[:, :ranks]
        rank, self._token = wanted.t().nonzero(as_tuple=True)
        self._tokens = len(experts)
        self._there = destination[self._token] == rank.unsqueeze(1)
        ids = experts[self._token] - rank.unsqueeze(1) * self.num_experts
        ids = torch.where(self._there, ids, self.num_experts).to(torch.int32)
        self._send, self._receive = exchange_sizes(wanted.sum(0), group)
        self._group, self._traffic = group, traffic
        exchange = self._exchange()
        self.experts = exchange.wait(exchange.start(ids)).long()
        """[Q, K], of this rank, numbered from 0; ``num_experts`` stands for an expert elsewhere."""

    def start(self, x: Tensor, weights: Tensor) -> None:
        """Send tokens x [T, D], and of their weights [T, K] those that are meant for the experts there."""
        self._weight_exchange, self._row_exchange = self._exchange(), self._exchange()
        self._weight_link = self._weight_exchange.start(weights[self._token] * self._there)
        self._row_link = self._row_exchange.start(copy_rows(x, self._token))

    def wait(self) -> tuple[Tensor, Tensor]:
        """The rows [Q, D] and weights [Q, K] that came."""
        weights = self._weight_exchange.wait(self._weight_link)
        return self._row_exchange.wait(self._row_link), weights

    def back(self, rows: Tensor) -> Tensor:
        """One row for each that came [Q, D] → [T, D], each token's sum over the ranks that it went to."""
        exchange = Exchange(self._receive, self._send, self._group, self._traffic)
        return sum_rows(exchange.wait(exchange.start(rows)), self._token, self._tokens)

    def _exchange(self) -> Exchange:
        return Exchange(self._send, self._receive, self._group, self._traffic)
