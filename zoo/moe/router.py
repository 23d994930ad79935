"""Which experts a token goes to, and with what weight.

Shapes: T tokens, D model, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.config import MoEConfig
from zoo.layers.linear import linear
from zoo.layers.sequence import SequenceLayout


@dataclass(frozen=True, eq=False)
class RouterOutput:
    """All that balance losses and statistics need to know of one layer's routing. Floats are fp32."""

    logits: Tensor
    """[T, E]"""
    scores: Tensor
    """[T, E], softmax or sigmoid of the logits."""
    weights: Tensor
    """[T, K], what each chosen expert's output is multiplied with."""
    experts: Tensor
    """[T, K] int64, the chosen experts, distinct in a row."""
    chosen: Tensor | None = None
    """[T, K] bool, which of ``experts`` the router chose, whether or not they had room: what balance losses and counts
    are taken from. None: all."""
    kept: Tensor | None = None
    """[T, K] bool, which of them take the token. Weights are 0 elsewhere, so that who computes all of them is right as
    well. None: all. Given wherever ``chosen`` is."""

    @property
    def destinations(self) -> Tensor:
        """[T, K] int64, ``experts`` with E in place of those that do not take the token."""
        return self.experts if self.kept is None else self.experts.where(self.kept, self.scores.shape[-1])


class Router(nn.Module):
    """s = score(W x); choose the K best of s + b among the best groups; weights from s, never from s + b.

    Softmax with ``norm_topk_prob`` is Mixtral (arXiv 2401.04088, section 2.1); without, and with groups scored by
    their maximum, DeepSeek-V2 (arXiv 2405.04434, section 2.2); sigmoid, bias and groups scored by the sum of their
    two best, DeepSeek-V3 (arXiv 2412.19437, equations 12 to 16). All in fp32, also under autocast: half precision
    makes ties, and ties choose wrong experts.
    """

    bias: Tensor | None

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.register_buffer(
            "bias", torch.zeros(config.num_experts, dtype=torch.float32) if config.router_bias else None
        )

    def forward(self, x: Tensor, layout: SequenceLayout | None = None) -> RouterOutput:
        """x [T, D], the T tokens of ``layout``, or of one sequence → RouterOutput."""
        c = self.config
        device = x.device.type
        # Where there is no autocast, leaving it takes longer than the products of a token.
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            exact = torch.promote_types(x.dtype, torch.float32)
            logits = self.logits(x.to(exact))
            scores = logits.softmax(dim=-1) if c.score_func == "softmax" else logits.sigmoid()
            return self.select(logits, scores, layout)

    def select(self, logits: Tensor, scores: Tensor, layout: SequenceLayout | None) -> RouterOutput:
        """Logits and scores [T, E] → which experts, and their weights."""
        return self.weighted(logits, scores, self.best(scores, self.config.top_k))

    def best(self, scores: Tensor, top_k: int) -> Tensor:
        """scores [T, E] → [T, top_k], the best experts of each token."""
        c = self.config
        choice = scores.detach() if self.bias is None else scores.detach() + self.bias
        if c.num_groups > 1:
            choice = limit_groups(choice, c.num_groups, c.top_k_groups, c.group_score)
        return choice.topk(top_k, dim=-1).indices

    def weighted(self, logits: Tensor, scores: Tensor, experts: Tensor) -> RouterOutput:
        """Logits and scores [T, E] and the chosen experts [T, K] → these with their weights."""
        weights = scores.gather(-1, experts)
        if self.config.norm_topk_prob:
            # Sigmoid scores may all underflow; softmax ones are untouched by 1e-20 in fp32.
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if self.config.routed_scaling_factor != 1:
            weights = weights * self.config.routed_scaling_factor
        return RouterOutput(logits, scores, weights, experts)

    def logits(self, x: Tensor) -> Tensor:
        """x [T, D] in the dtype of the result → [T, E]."""
        return linear(x, self.weight.to(x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Casting the model leaves the selection bias in fp32: its updates of 1e-3 vanish in bf16."""
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and self.bias is not None and self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        return self


class BiasedRouter(Router):
    """A router with logits W x + logit_bias, which training moves like any other parameter (arXiv 2508.10925)."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__(hidden_size, config)
        self.logit_bias = nn.Parameter(torch.empty(config.num_experts))

    def logits(self, x: Tensor) -> Tensor:
        """See ``Router``."""
        return linear(x, self.weight.to(x.dtype), self.logit_bias.to(x.dtype))


def limit_groups(scores: Tensor, num_groups: int, top_k_groups: int, group_score: Literal["max", "top2_sum"]) -> Tensor:
    """scores [T, E] → the same with -inf outside each token's best ``top_k_groups`` groups of neighbouring experts.

    -inf and not 0: with a negative selection bias 0 would beat experts of the chosen groups.
    """
    groups = scores.unflatten(-1, (num_groups, -1))
    value = groups.amax(dim=-1) if group_score == "max" else groups.topk(2, dim=-1).values.sum(dim=-1)
    best = value.topk(top_k_groups, dim=-1).indices
    outside = torch.ones_like(value, dtype=torch.bool).scatter(-1, best, False)
    return groups.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(-2)


@torch.no_grad()
def update_selection_bias(bias: Tensor, counts: Tensor, rate: float) -> None:
    """Loss-free balancing (arXiv 2408.15664, algorithm 1): b += rate · sign(mean load − load), in place.

    Call once after each optimizer step.

    Args:
        bias: [E] fp32, ``Router.bias``.
        counts: [E] assignments to each expert over all tokens of the step, however many parts it was taken in.
        rate: γ, 1e-3 in the paper.
    """
    load = counts.to(bias.dtype)
    bias += rate * torch.sign(load.mean() - load)
