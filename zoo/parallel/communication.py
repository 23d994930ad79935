"""Which collectives one rank takes part in during a step, and how many bytes it sends in each.

Bytes are those that a rank sends to others: (n - 1) / n of a whole that is gathered or scattered over n ranks, twice
that of one that is all-reduced (arXiv 1909.09756, section 2), and of an all-to-all the rows that leave.

Shapes: T tokens of a micro-batch on a data rank, D model, E experts, K top-k, M expert ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from zoo.accounting import FP32_BYTES
from zoo.config import ModelConfig, MoEConfig
from zoo.moe.router import limit_groups
from zoo.parallel.exchange import spans_nodes
from zoo.parallel.footprint import COMPUTE_BYTES, Precision, Recompute, Units
from zoo.parallel.hardware import Gpu, Group, all_to_all_seconds, ring_seconds
from zoo.parallel.mesh import MeshSizes

Kind = Literal[
    "all_gather_parameters",
    "reduce_scatter_gradients",
    "all_reduce_gradients",
    "all_reduce_tensor",
    "all_gather_tokens",
    "all_to_all_dispatch",
    "all_to_all_combine",
]
EXPERT_ID_BYTES = 4
SAMPLED_TOKENS, SAMPLE_SEED = 16_384, 0


@dataclass(frozen=True)
class Collective:
    """Equal collectives taken together."""

    kind: Kind
    group: Group
    sent: float
    """Bytes that one rank sends to others, in all calls."""
    calls: float

    @property
    def exchange(self) -> bool:
        """Whether it is an all-to-all; all others are rings."""
        return self.kind in ("all_to_all_dispatch", "all_to_all_combine")

    def between_nodes(self, gpu: Gpu) -> float:
        """Bytes of ``sent`` that leave the node, in the mean over the ranks."""
        here, size = self.group.per_node(gpu), self.group.size
        if here == size:
            return 0.0
        return self.sent * (size - here) / (size - 1) if self.exchange else self.sent / here

    def seconds(self, gpu: Gpu) -> float:
        """Time of all calls, one after the other."""
        if self.exchange:
            return all_to_all_seconds(gpu, self.group, self.sent, self.calls)
        passes = 2 if self.kind in ("all_reduce_gradients", "all_reduce_tensor") else 1
        return ring_seconds(gpu, self.group, self.sent, self.calls, passes)


def parameter_gathers(units: Units, sizes: MeshSizes, precision: Precision, reshard: bool) -> Iterator[Collective]:
    """All-gathers of one micro-batch: each unit for the forward pass, and if it was freed again for the backward pass.

    The root stays gathered.
    """
    for unit, count in units.items():
        group = unit.shards(sizes)
        times = count * (2 if reshard and unit.kind != "root" else 1)
        sent = (group.size - 1) * unit.at_rest(sizes) * unit.compute_bytes(precision)
        yield Collective("all_gather_parameters", group, times * sent, times)


def gradient_reductions(units: Units, sizes: MeshSizes) -> Iterator[Collective]:
    """Reduce-scatters of a step and all-reduces between copies of the shards, in fp32."""
    for unit, count in units.items():
        shard = unit.at_rest(sizes) * FP32_BYTES
        group, copies = unit.shards(sizes), unit.copies(sizes)
        yield Collective("reduce_scatter_gradients", group, count * (group.size - 1) * shard, count)
        between = 2 * (copies.size - 1) / copies.size * shard
        yield Collective("all_reduce_gradients", copies, count * between, count)


def tensor_collectives(
    config: ModelConfig, units: Units, sizes: MeshSizes, tokens: int, precision: Precision, recompute: Recompute
) -> Iterator[Collective]:
    """What tensor ranks exchange in one micro-batch of ``tokens`` tokens.

    A row-wise layer sums its output in the forward pass (and when it is recomputed), a column-wise one the gradient of
    its input in the backward pass, MLA the gradient of its rotary key (arXiv 1909.08053, section 3). In an MoE layer
    every rank dispatches its share of the tokens: results are gathered forward, gradients of the tokens and of their
    weights backward. Sums of vectors are left out. The sum at the end of a dense block is not recomputed in truth.
    """
    group = Group(sizes.tensor)
    if group.size == 1:
        return
    again = 2 if recompute == "block" else 1
    itemsize = COMPUTE_BYTES[precision]
    for unit, count in units.items():
        for weight in unit.weights:
            if len(weight.shape) != 2:
                continue
            features, times = 0, count
            if weight.tensor == "rowwise":
                features, times = weight.shape[0], count * again
            elif weight.tensor == "colwise":
                features = weight.shape[1]
            elif weight.tensor == "shared_key":
                assert config.mla is not None
                features = config.mla.qk_rope_head_dim
            if features:
                sent = 2 * (group.size - 1) / group.size * tokens * features * itemsize
                yield Collective("all_reduce_tensor", group, times * sent, times)
    if config.moe is not None and any(unit.kind == "experts" for unit in units):
        layers = sum(map(config.is_moe_layer, range(config.num_layers)))
        others = (group.size - 1) * math.ceil(tokens / group.size)
        row, weights = config.hidden_size * itemsize, config.moe.top_k * FP32_BYTES
        yield Collective("all_gather_tokens", group, layers * others * (2 * row + weights), layers * 3)


def expert_exchanges(
    config: ModelConfig,
    sizes: MeshSizes,
    tokens: int,
    precision: Precision,
    recompute: Recompute,
    ranks_per_node: int = 1,
) -> Iterator[Collective]:
    """All-to-alls of all MoE layers in one micro-batch of ``tokens`` tokens, under a balanced router.

    Forward, a row carries D activations, the numbers of its K experts and their fp32 weights, and brings D activations
    back; backward, gradients of the same except for the numbers. Each dispatch is preceded by an exchange of sizes,
    whose bytes are not counted. Where the expert ranks fill several nodes of ``ranks_per_node`` ranks, there is one
    exchange between nodes and then one within them, the first first.
    """
    if config.moe is None or sizes.expert == 1:
        return
    layers = sum(map(config.is_moe_layer, range(config.num_layers)))
    again = 2 if recompute == "block" else 1
    row, top_k = config.hidden_size * COMPUTE_BYTES[precision], config.moe.top_k
    there = again * (row + top_k * (EXPERT_ID_BYTES + FP32_BYTES)) + row + top_k * FP32_BYTES
    for group, rows in _hops(config.moe, sizes.expert, math.ceil(tokens / sizes.tensor), ranks_per_node):
        yield Collective("all_to_all_dispatch", group, layers * rows * there, layers * (4 * again + 2))
        yield Collective("all_to_all_combine", group, layers * rows * (again + 1) * row, layers * (again + 1))


def _hops(moe: MoEConfig, expert_ranks: int, tokens: int, ranks_per_node: int) -> Iterator[tuple[Group, float]]:
    """(who exchanges, rows that a rank sends to others) for ``tokens`` tokens of each rank."""
    if not spans_nodes(expert_ranks, ranks_per_node):
        yield Group(expert_ranks), rows_sent(moe, expert_ranks, tokens)
        return
    nodes = expert_ranks // ranks_per_node
    yield Group(nodes, ranks_per_node), rows_sent(moe, nodes, tokens)
    # A node hands on what came to it, as many rows as if each token had gone to its ranks at once.
    yield Group(ranks_per_node), tokens * mean_destinations(moe, expert_ranks) * (1 - 1 / ranks_per_node)


def rows_sent(moe: MoEConfig, expert_ranks: int, tokens: int) -> float:
    """Rows that a rank sends to others for ``tokens`` tokens: one to each rank that holds any of a token's experts."""
    return tokens * mean_destinations(moe, expert_ranks) * (expert_ranks - 1) / expert_ranks


@cache
def mean_destinations(moe: MoEConfig, expert_ranks: int) -> float:
    """Mean number of expert ranks (M) that hold any of the K experts of a token, where all experts are equally likely.

    Without groups a rank holds none of them with probability C(E - E/M, K) / C(E, K). With groups the choice is
    sampled: independent scores, through the router's own rule.
    """
    if moe.num_groups == 1:
        elsewhere = moe.num_experts - moe.num_experts // expert_ranks
        none = math.comb(elsewhere, moe.top_k) / math.comb(moe.num_experts, moe.top_k)
        return expert_ranks * (1 - none)
    ranks = _sampled_experts(moe) // (moe.num_experts // expert_ranks)
    held = torch.zeros(len(ranks), expert_ranks, dtype=torch.bool).scatter_(1, ranks, True)
    return held.sum(1).double().mean().item()


@cache
def _sampled_experts(moe: MoEConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    scores = torch.rand(SAMPLED_TOKENS, moe.num_experts, generator=generator)
    return limit_groups(scores, moe.num_groups, moe.top_k_groups, moe.group_score).topk(moe.top_k, dim=-1).indices
