"""Stages of a pipeline: where a decoder is cut, and what a part of it computes.

A stage is a ``Decoder`` that has kept a run of its layers: the first stage the embedding too, the last one the final
norm and the output head. What it has keeps its name, so that plans, initial weights and checkpoints are those of the
whole model.

Shapes: B batch, S sequence, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from zoo.accounting import attention_flops, count_parameters
from zoo.config import ModelConfig
from zoo.layers.sequence import sequence_layout
from zoo.model import Decoder
from zoo.moe.router import RouterOutput

Batch = Mapping[str, Tensor]
"""``input_ids`` and ``labels``, and if wanted ``document_ids`` and ``attention_mask``, each [B, S]."""


def layer_costs(config: ModelConfig, sequence_length: int) -> list[float]:
    """Forward FLOPs of a token in each layer; the output head counts with the last, the embedding costs nothing."""
    attention = attention_flops(config, sequence_length)
    costs = [2.0 * layer.active + attention for layer in count_parameters(config).layers]
    costs[-1] += 2.0 * config.vocab_size * config.hidden_size
    return costs


def split_layers(costs: Sequence[float], stages: int) -> list[range]:
    """The layers of each stage, at least one each, so that the dearest stage costs as little as it can.

    Raises:
        ValueError: fewer layers than stages.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise ValueError(f"pipeline: {stages} stages of {layers} layers: give 1 to {layers} stages")
    before = [0.0, *accumulate(costs)]

    @cache
    def best(start: int, parts: int) -> tuple[float, tuple[int, ...]]:
        """(cost of the dearest part, ends of the parts), of the layers from ``start``."""
        if parts == 1:
            return before[layers] - before[start], (layers,)
        rests = ((end, *best(end, parts - 1)) for end in range(start + 1, layers - parts + 2))
        return min((max(before[end] - before[start], dearest), (end, *ends)) for end, dearest, ends in rests)

    return [range(start, end) for start, end in pairwise((0, *best(0, stages)[1]))]


def cut(model: Decoder, layers: range) -> Decoder:
    """Take out of ``model`` what does not belong to the stage with ``layers``.

    Raises:
        ValueError: input and output embedding are one matrix, or there are MTP modules: two stages would need the same;
            or experts are chosen by the tokens' ids, which only the first stage has.
    """
    config = model.config
    if config.mtp_depth and len(layers) < config.num_layers:
        raise ValueError(
            f"pipeline: mtp_depth = {config.mtp_depth}: an MTP module needs the embedding of the first stage and the "
            "head of the last; set mtp_depth to 0"
        )
    if config.moe and config.moe.routing and config.moe.routing.choice == "hash" and len(layers) < config.num_layers:
        raise ValueError("pipeline: moe.routing.choice = hash: only the first stage has the tokens; use one stage")
    if config.tie_word_embeddings and len(layers) < config.num_layers:
        raise ValueError("pipeline: tie_word_embeddings = true: the first and the last stage would share a matrix")
    for layer in set(range(config.num_layers)).difference(layers):
        delattr(model.layers, str(layer))
    if layers.start > 0:
        del model.embed_tokens
    if layers.stop < config.num_layers:
        del model.norm, model.lm_head
    return model


def forward_stage(
    stage: Decoder,
    router_loss: Callable[[list[RouterOutput], Batch], Tensor | None],
    x: Tensor,
    *,
    labels: Tensor,
    **others: Tensor,
) -> Tensor:
    """``Decoder.forward`` of one stage.

    Args:
        stage: From ``cut``.
        router_loss: Called with the routing of the stage's MoE layers and the batch, if there are any. The backward
            pass through the result is that of the scalar that it returns, too.
        x: input_ids [B, S] in the first stage, hidden [B, S, D] in the others.
        labels: [B, S], -100 to ignore; all but the last stage only see how much there is.
        others: The rest of the batch.

    Returns:
        hidden [B, S, D], or in the last stage the sum of −ln p of the labels, a scalar.
    """
    layout = sequence_layout(
        labels,
        attention_mask=others.get("attention_mask"),
        document_ids=others.get("document_ids"),
        past=0,
        past_valid=None,
    )
    if hasattr(stage, "embed_tokens"):
        x = stage.embed_tokens(x)
    rotary = stage.rotary(layout.positions, layout.keys, x.dtype)
    outputs = []
    for block in stage.layers:
        x, routing = block(x, layout, rotary, None)
        if routing is not None:
            outputs.append(routing)
    loss = router_loss(outputs, {"labels": labels, **others}) if outputs else None
    if loss is not None:
        x = _WithLoss.apply(x, loss)
    return stage.nll(stage.norm(x), labels) if hasattr(stage, "norm") else x


class _WithLoss(torch.autograd.Function):
    """A tensor as it is, from which the backward pass goes into a scalar loss as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return x.clone()  # FSDP warns of results that are views

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.one
