"""The mixture-of-experts feed-forward layer.

Shapes: B batch, S sequence, T = B·S tokens, D model, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from zoo.config import ModelConfig
from zoo.layers.ffn import FFNS
from zoo.layers.linear import Linear
from zoo.layers.sequence import SequenceLayout
from zoo.moe.clamped import ClampedExperts
from zoo.moe.dispatch import Dispatcher, KeptDispatcher, LocalDispatcher
from zoo.moe.experts import DropoutExperts, Experts, GEGLUExperts, StackedExperts
from zoo.moe.router import RouterOutput
from zoo.moe.routers import make_router
from zoo.moe.ungated import ReLUExperts


class MoE(nn.Module):
    """y = Σ_k weight_k · expert_k(x) + [sigmoid(g x)] · shared(x) (arXiv 2401.06066, equations 9 to 11)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.router = make_router(config.hidden_size, moe)
        self.experts = _experts(config)
        self.shared_experts = (
            FFNS[config.expert_ffn](config.hidden_size, moe.num_shared_experts * moe.moe_intermediate_size)
            if moe.num_shared_experts
            else None
        )
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False) if moe.shared_expert_gate else None
        self.dispatcher: Dispatcher | None = None
        """By default all experts are at hand, and compute tokens in whichever way is the fastest."""

    def forward(self, x: Tensor, layout: SequenceLayout | None = None) -> tuple[Tensor, RouterOutput]:
        """x [B, S, D], by default all of one sequence → ([B, S, D], the routing of the T tokens)."""
        tokens = x.flatten(0, 1)
        tokens, routing = self.route(tokens, layout)
        out = self.mix(tokens, routing).view_as(x)
        if self.shared_experts is not None:
            shared = self.shared_experts(x)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(x).sigmoid()
            out = out + shared
        return out, routing

    def mix(self, tokens: Tensor, routing: RouterOutput) -> Tensor:
        """tokens [T, D] → [T, D], each token's sum over its experts of weight · expert(token)."""
        if self.dispatcher is None and self.experts.mixes(tokens):
            mixed: Tensor = self.experts(tokens, routing)
            return mixed
        local: Dispatcher = LocalDispatcher() if routing.kept is None else KeptDispatcher()
        dispatcher = self.dispatcher or local
        rows, counts, state = dispatcher.dispatch(tokens, routing)
        return dispatcher.combine(self.experts(rows, counts), state)

    def route(self, tokens: Tensor, layout: SequenceLayout | None = None) -> tuple[Tensor, RouterOutput]:
        """tokens [T, D] → (what the experts take of each [T, D], the routing)."""
        return tokens, self.router(tokens, layout)


class ScaledInputMoE(MoE):
    """y = expert(s · x) + shared(x) with the score s of the one chosen expert (Llama 4, published code)."""

    def route(self, tokens: Tensor, layout: SequenceLayout | None = None) -> tuple[Tensor, RouterOutput]:
        """See ``MoE``; outputs are not weighted."""
        routing = self.router(tokens, layout)
        scaled = (tokens * routing.weights).to(tokens.dtype)
        return scaled, replace(routing, weights=torch.ones_like(routing.weights))


def moe_layer(config: ModelConfig) -> MoE:
    """The kind of MoE layer that ``config.moe`` asks for."""
    assert config.moe is not None
    return ScaledInputMoE(config) if config.moe.scaled_input else MoE(config)


def _experts(config: ModelConfig) -> StackedExperts:
    moe = config.moe
    assert moe is not None
    sizes = (moe.num_experts, config.hidden_size, moe.moe_intermediate_size)
    if moe.swiglu_limit is not None:
        return ClampedExperts(*sizes, moe.swiglu_limit)
    if config.expert_ffn == "relu":
        return ReLUExperts(*sizes)
    kind = {"swiglu": Experts, "geglu": GEGLUExperts}[config.expert_ffn]
    return DropoutExperts(*sizes, kind.activation, moe.expert_dropout) if moe.expert_dropout else kind(*sizes)
