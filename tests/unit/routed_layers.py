"""MoE layers of the papers' routings, small, in double precision."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from zoo.config import ModelConfig, MoEConfig
from zoo.config_routing import RoutingConfig
from zoo.layers.sequence import SequenceLayout, sequence_layout
from zoo.moe.layer import MoE, moe_layer
from zoo.registry import find_spec, paper_names

D, FFN, E = 6, 5, 4
NAMES = [name for name in paper_names() if name.endswith("-tiny")]


def small(name: str, **changes: Any) -> ModelConfig:
    """The model ``name`` with 4 narrow experts."""
    config = find_spec(name).model
    assert config.moe is not None
    top_k = E if config.moe.top_k == config.moe.num_experts else min(config.moe.top_k, 2)
    moe = dataclasses.replace(config.moe, num_experts=E, top_k=top_k, moe_intermediate_size=FFN, **changes)
    return dataclasses.replace(config, hidden_size=D, moe=moe)


def layer_of(config: ModelConfig, training: bool, seed: int = 0) -> MoE:
    layer = moe_layer(config).double().train(training)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer


def layout_of(ids: Tensor, mask: Tensor | None = None) -> SequenceLayout:
    return sequence_layout(ids, attention_mask=mask, document_ids=None, past=0, past_valid=None)


def routing_block(top_k: int, num_experts: int = E, norm: bool = False, **routing: Any) -> MoEConfig:
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        moe_intermediate_size=FFN,
        score_func="softmax",
        norm_topk_prob=norm,
        routing=RoutingConfig(**routing),
    )
