"""Experts that take a limited number of tokens of each sequence (Switch Transformers, arXiv 2101.03961).

Shapes: B batch, S sequence, T = B·S tokens, D model, F FFN, E experts, N routed rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import MoEConfig
from zoo.moe.dispatch import Dispatcher, KeptDispatcher
from zoo.moe.router import Router, RouterOutput
from zoo.moe.selection import within_capacity


class CappedMoE(nn.Module):
    """y = p · expert(x), of the one expert with the largest probability p; 0 where that expert is full (equation 2).

    An expert takes the first ``capacity`` tokens of a sequence that choose it. What a dropped token goes on with is
    the residual around this layer. Decoding with a cache, the tokens of each call are a sequence of their own, as in
    transformers.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, capacity: int) -> None:
        super().__init__()
        top_1 = MoEConfig(
            num_experts=num_experts,
            top_k=1,
            moe_intermediate_size=intermediate_size,
            score_func="softmax",
            norm_topk_prob=False,
        )
        self.capacity = capacity
        self.router = Router(hidden_size, top_1)
        self.experts = ReLUExperts(num_experts, hidden_size, intermediate_size)
        self.dispatcher: Dispatcher = KeptDispatcher()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, RouterOutput]:
        """x [B, S, D], valid [B, S] bool with False for padding → ([B, S, D], the routing of all T tokens)."""
        tokens = x.flatten(0, 1)
        routing = self.router(tokens)
        kept = within_capacity(routing.experts.view(x.shape[:2]), routing.scores.shape[-1], self.capacity, valid)
        kept = kept.view(-1, 1)
        routing = replace(routing, weights=routing.weights.masked_fill(~kept, 0), kept=kept)
        rows, counts, state = self.dispatcher.dispatch(tokens, routing)
        return self.dispatcher.combine(self.experts(rows, counts), state).view_as(x), routing


class ReLUExperts(nn.Module):
    """E networks down(max(0, up(x))). Parameters: ``up`` [E, F, D] and ``down`` [E, D, F]."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [N, D] sorted by expert, counts [E] int64 rows of each expert in turn → [N, D]."""
        parts = rows.split(counts.tolist())
        # unbind and not indexing: the backward of indexing writes a whole [E, …] gradient for every expert.
        return torch.cat(
            [
                F.linear(F.relu(F.linear(x, up)), down)
                for x, up, down in zip(parts, self.up.unbind(), self.down.unbind(), strict=True)
            ]
        )
