"""Routers with a ``RoutingConfig``: the ways of choosing that are not each token's K best, and limits on them.

Shapes: B batch, S sequence, T = B·S tokens, D model, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from zoo.config import MoEConfig
from zoo.config_routing import RoutingConfig
from zoo.layers.sequence import SequenceLayout
from zoo.moe.exploration import Jitter, NoisyLogits, Temperature
from zoo.moe.router import BiasedRouter, Router, RouterOutput
from zoo.moe.selection import capacity, expert_choice, hash_experts, sinkhorn, use_second, within_capacity


class Limits(nn.Module):
    """Which of the chosen experts take the token: not every second one, and none beyond its capacity."""

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, routing: RouterOutput, layout: SequenceLayout | None) -> RouterOutput:
        """``routing`` with all experts chosen → with some; other weights stay as they are, as in all these papers."""
        c, threshold = self.config, self.config.second_expert_threshold
        factor = c.capacity_factor if self.training else c.eval_capacity_factor
        chosen = use_second(routing.weights, threshold) if self.training and threshold is not None else None
        kept = chosen if factor is None else _places(routing, chosen, factor, layout)
        if kept is None:
            return routing
        return replace(routing, weights=routing.weights.masked_fill(~kept, 0), chosen=chosen, kept=kept)


def _places(routing: RouterOutput, chosen: Tensor | None, factor: float, layout: SequenceLayout | None) -> Tensor:
    """[T, K] bool: the chosen ones that find a place in their sequence."""
    (tokens, top_k), num_experts = routing.experts.shape, routing.scores.shape[-1]
    rows, valid = _sequences(layout)
    length: int | Tensor = tokens // rows
    counted = chosen
    if valid is not None:
        length = valid.sum(dim=1, keepdim=True)
        of_tokens = valid.view(-1, 1).expand(-1, top_k)
        counted = of_tokens if counted is None else counted & of_tokens
    most = capacity(length, top_k, num_experts, factor)
    by_row = None if counted is None else counted.reshape(rows, -1)
    return within_capacity(routing.experts.view(rows, -1), num_experts, most, by_row).view(tokens, top_k)


def _sequences(layout: SequenceLayout | None) -> tuple[int, Tensor | None]:
    """(B, valid [B, S] bool or None where all tokens are): without a layout, one sequence without padding."""
    return (1, None) if layout is None else (layout.batch_size, layout.valid)


class TokenChoice(Router):
    """Each token its K best experts: of logits that ``exploration`` changes, within ``Limits``; or all, while training.

    With K = E it is the dense mixture of all experts (Jacobs et al. 1991).
    """

    def __init__(self, hidden_size: int, config: MoEConfig, routing: RoutingConfig) -> None:
        super().__init__(hidden_size, config)
        self.dense_training = routing.dense_training
        self.jitter = Jitter(routing.jitter) if routing.jitter else nn.Identity()
        self.dropout = nn.Dropout(routing.router_dropout) if routing.router_dropout else nn.Identity()
        self.noise = NoisyLogits(hidden_size, config.num_experts) if routing.noise else None
        self.temperature = Temperature(routing.temperature) if routing.temperature else nn.Identity()
        self.limits = Limits(routing)

    def logits(self, x: Tensor) -> Tensor:
        """See ``Router``."""
        x = self.dropout(self.jitter(x))
        logits = super().logits(x)
        if self.noise is not None:
            logits = self.noise(logits, x)
        out: Tensor = self.temperature(logits)
        return out

    def select(self, logits: Tensor, scores: Tensor, layout: SequenceLayout | None) -> RouterOutput:
        """See ``Router``."""
        top_k = self.config.num_experts if self.dense_training and self.training else self.config.top_k
        out: RouterOutput = self.limits(self.weighted(logits, scores, self.best(scores, top_k)), layout)
        return out


class SinkhornRouter(TokenChoice):
    """As ``TokenChoice``, but while training the K largest parts of a plan that is balanced over all T tokens."""

    def select(self, logits: Tensor, scores: Tensor, layout: SequenceLayout | None) -> RouterOutput:
        """See ``Router``; the weights are of the scores, as ever."""
        if not self.training:
            return super().select(logits, scores, layout)
        _, valid = _sequences(layout)
        plan = sinkhorn(logits.detach(), None if valid is None else valid.flatten())
        experts = plan.topk(self.config.top_k, dim=-1).indices
        out: RouterOutput = self.limits(self.weighted(logits, scores, experts), layout)
        return out


class ExpertChoice(TokenChoice):
    """Every expert its best tokens of a sequence, weighted with their scores: all E experts are listed for a token.

    A token may have none, and what an expert chooses depends on later tokens.
    """

    def select(self, logits: Tensor, scores: Tensor, layout: SequenceLayout | None) -> RouterOutput:
        """See ``Router``."""
        rows, valid = _sequences(layout)
        by_row = scores.detach().view(rows, -1, scores.shape[-1])
        chosen = expert_choice(by_row, self.config.top_k, valid).flatten(0, 1)
        experts = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
        weights = (scores * self.config.routed_scaling_factor).masked_fill(~chosen, 0)
        return RouterOutput(logits, scores, weights, experts, chosen, chosen)


class HashRouter(nn.Module):
    """Experts by the token's id, with equal weights. Nothing is learned: logits are 0, scores equal."""

    def __init__(self, config: MoEConfig, routing: RoutingConfig) -> None:
        super().__init__()
        self.config = config
        self.limits = Limits(routing)

    def forward(self, x: Tensor, layout: SequenceLayout | None = None) -> RouterOutput:
        """x [T, D], the T tokens of ``layout``, which must be given → RouterOutput."""
        assert layout is not None, "a hash needs the tokens' ids"
        c = self.config
        logits = x.new_zeros(len(x), c.num_experts, dtype=torch.promote_types(x.dtype, torch.float32))
        experts = hash_experts(layout.input_ids.flatten(), c.num_experts, c.top_k)
        weights = torch.full_like(logits[:, : c.top_k], c.routed_scaling_factor / c.top_k)
        out: RouterOutput = self.limits(RouterOutput(logits, logits.softmax(dim=-1), weights, experts), layout)
        return out


def make_router(hidden_size: int, config: MoEConfig) -> nn.Module:
    """The kind of router that ``config`` asks for."""
    routing = config.routing
    if routing is None:
        return (BiasedRouter if config.router_logit_bias else Router)(hidden_size, config)
    if routing.choice == "hash":
        return HashRouter(config, routing)
    kind = {"token": TokenChoice, "sinkhorn": SinkhornRouter, "expert": ExpertChoice}[routing.choice]
    return kind(hidden_size, config, routing)
