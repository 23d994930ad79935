"""Experts that take a limited number of tokens of each sequence (Switch Transformers, arXiv 2101.03961).

Shapes: B batch, S sequence, T = B·S tokens, D model.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from zoo.config import MoEConfig
from zoo.moe.dispatch import Dispatcher, KeptDispatcher
from zoo.moe.router import Router, RouterOutput
from zoo.moe.selection import within_capacity
from zoo.moe.ungated import ReLUExperts


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
