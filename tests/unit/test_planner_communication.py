"""What the planner says ranks send each other, and how long it takes, against hand computation and accounting."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import DEEPSEEK, H100, MIXTRAL, MIXTRAL_UNITS, model_of, units_of

from zoo.accounting import training_flops
from zoo.config import MoEConfig
from zoo.parallel.communication import (
    Collective,
    expert_exchanges,
    gradient_reductions,
    mean_destinations,
    parameter_gathers,
    tensor_collectives,
)
from zoo.parallel.estimate import rank_flops
from zoo.parallel.footprint import holdings
from zoo.parallel.hardware import Group, all_to_all_seconds, ring_seconds
from zoo.parallel.mesh import MeshSizes
from zoo.registry import find_spec

# ---------------------------------------------------------------------------------------------------------------
# Communication
# ---------------------------------------------------------------------------------------------------------------


def moe(num_experts: int, top_k: int, **more: int) -> MoEConfig:
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        moe_intermediate_size=8,
        score_func="softmax",
        norm_topk_prob=top_k > 1,
        **more,
    )


def test_destinations_by_hand() -> None:
    assert mean_destinations(moe(8, 1), 4) == pytest.approx(1)
    assert mean_destinations(moe(4, 2), 2) == pytest.approx(2 * (1 - 1 / 6))  # C(2, 2) / C(4, 2) have none of a rank
    assert mean_destinations(moe(8, 2), 8) == pytest.approx(2)
    assert mean_destinations(moe(8, 3), 1) == pytest.approx(1)
    grouped = moe(8, 4, num_groups=4, top_k_groups=2)  # the two chosen groups have four experts: all of them
    assert mean_destinations(grouped, 4) == pytest.approx(2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 4), st.integers(1, 8))
def test_destinations_grow_with_ranks_and_stay_in_bounds(power: int, top_k: int) -> None:
    few, more = (mean_destinations(moe(32, top_k), ranks) for ranks in (2**power, 2 ** (power + 1)))
    assert 1 - 1e-9 <= few <= more + 1e-9
    assert more <= min(top_k, 2 ** (power + 1)) + 1e-9


def test_sampled_destinations_of_one_group_are_the_formula() -> None:
    """All groups allowed is no limit: sampling and formula must agree."""
    sampled = mean_destinations(moe(64, 6, num_groups=4, top_k_groups=4), 16)
    assert sampled == pytest.approx(mean_destinations(moe(64, 6), 16), rel=0.005)


def test_groups_limit_traffic() -> None:
    free = dataclasses.replace(DEEPSEEK.moe, num_groups=1, top_k_groups=1, group_score="max")
    assert mean_destinations(DEEPSEEK.moe, 8) <= 4 < mean_destinations(free, 8)


def test_fsdp_bytes_by_hand() -> None:
    """Every unit is gathered twice in bf16 (the root once, routers in fp32) and scattered once in fp32."""
    sizes = MeshSizes(data_shard=64)
    units = units_of("mixtral-8x7b", "ep_fsdp")
    gathered = sum(c.sent for c in parameter_gathers(units, sizes, "bf16-mixed", reshard=True))
    scattered = {c.kind: 0.0 for c in gradient_reductions(units, sizes)}
    for collective in gradient_reductions(units, sizes):
        scattered[collective.kind] += collective.sent
    total, root, routers = 46_702_792_704, 2 * 32_000 * 4096 + 4096, 32 * 8 * 4096
    blocks = total - root - routers
    padded_routers = 8 * routers  # 8 rows over 64 ranks: each shard is padded to a row
    assert gathered == 63 / 64 * (2 * 2 * blocks + 2 * root) + 63 / 64 * 2 * 4 * padded_routers
    assert scattered["reduce_scatter_gradients"] == 63 / 64 * 4 * (blocks + root + padded_routers)
    assert scattered["all_reduce_gradients"] == 0


def test_copies_are_all_reduced() -> None:
    sizes = MeshSizes(data_replicate=4, data_shard=8)
    sent = sum(c.sent for c in gradient_reductions(MIXTRAL_UNITS, sizes) if c.kind == "all_reduce_gradients")
    assert sent == pytest.approx(2 * 3 / 4 * 4 * holdings(MIXTRAL, MIXTRAL_UNITS, sizes, "bf16-mixed").whole.at_rest)


def test_tensor_bytes_by_hand() -> None:
    """Mixtral on 2 tensor ranks: o_proj forward, q, k and v backward, each [T, D]; rows gathered once each way."""
    sizes = MeshSizes(data_shard=4, tensor=2)
    sent = {c.kind: 0.0 for c in tensor_collectives(MIXTRAL, MIXTRAL_UNITS, sizes, 10, "bf16-mixed", "none")}
    for collective in tensor_collectives(MIXTRAL, MIXTRAL_UNITS, sizes, 10, "bf16-mixed", "none"):
        sent[collective.kind] += collective.sent
    assert sent["all_reduce_tensor"] == 32 * 4 * 10 * 4096 * 2
    assert sent["all_gather_tokens"] == 32 * 5 * (2 * 4096 * 2 + 2 * 4)


def test_exchange_bytes_by_hand() -> None:
    """Mixtral over 8 expert ranks: a token goes to 2 ranks, to others with probability 7/8."""
    sizes = MeshSizes(data_shard=8, expert=8)
    dispatch, combine = expert_exchanges(MIXTRAL, sizes, 16, "bf16-mixed", "none")
    rows = 32 * 16 * 2 * 7 / 8
    assert dispatch.sent == pytest.approx(rows * ((4096 * 2 + 2 * 8) + (4096 * 2 + 2 * 4)))
    assert combine.sent == pytest.approx(rows * 2 * 4096 * 2)
    assert not list(expert_exchanges(MIXTRAL, MeshSizes(data_shard=8), 16, "bf16-mixed", "none"))


def test_exchange_in_two_hops_by_hand() -> None:
    """Mixtral over two nodes of 4: a token goes to a rank in the other node with probability 1 - C(4, 2) / C(8, 2)."""
    sizes = MeshSizes(data_shard=8, expert=8)
    dispatch, back, *within = expert_exchanges(MIXTRAL, sizes, 16, "bf16-mixed", "none", ranks_per_node=4)
    assert dispatch.group == back.group == Group(2, 4) and {c.group for c in within} == {Group(4)}
    assert back.sent == pytest.approx(32 * 16 * (1 - 6 / 28) * 2 * 4096 * 2)
    assert within[1].sent == pytest.approx(32 * 16 * 2 * 3 / 4 * 2 * 4096 * 2)
    nodes = dataclasses.replace(H100, gpus_per_node=4)
    assert back.between_nodes(nodes) == back.sent and within[1].between_nodes(nodes) == 0
    at_once = list(expert_exchanges(MIXTRAL, sizes, 16, "bf16-mixed", "none"))[1]
    assert at_once.between_nodes(nodes) == pytest.approx(at_once.sent * 4 / 7)
    assert Collective("all_gather_parameters", Group(8), 70.0, 1).between_nodes(nodes) == 70 / 4


@pytest.mark.parametrize(("name", "nodes", "per_node"), [("deepseek-v3", 8, 8), ("mixtral-8x7b", 4, 2)])
def test_nodes_and_ranks_of_tokens_sent_one_by_one(name: str, nodes: int, per_node: int) -> None:
    moe = find_spec(name).model.moe
    generator = torch.Generator().manual_seed(7)
    ranks = nodes * per_node
    counts = [0, 0]
    for _ in range(2000):
        scores = torch.rand(moe.num_experts, generator=generator)
        groups = scores.view(moe.num_groups, -1)
        value = groups.topk(2).values.sum(1) if moe.group_score == "top2_sum" else groups.amax(1)
        size = groups.shape[1]
        allowed = [g * size + i for g in value.topk(moe.top_k_groups).indices.tolist() for i in range(size)]
        chosen = sorted(allowed, key=lambda expert: -scores[expert])[: moe.top_k]
        reached = {expert // (moe.num_experts // ranks) for expert in chosen}
        counts[0] += len(reached)
        counts[1] += len({rank // per_node for rank in reached})
    for ranks_or_nodes, count in zip((ranks, nodes), counts, strict=True):
        assert mean_destinations(moe, ranks_or_nodes) == pytest.approx(count / 2000, rel=0.01)


# ---------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------


def test_links_by_hand() -> None:
    within, across = Group(8), Group(16)
    assert (across.per_node(H100), across.nodes(H100)) == (8, 2)
    assert (Group(4, 16).per_node(H100), Group(4, 16).nodes(H100)) == (1, 4)
    assert ring_seconds(H100, within, 360e9, calls=0) == pytest.approx(1)  # 450 GB/s, 80% of it
    assert ring_seconds(H100, across, 320e9, calls=0) == pytest.approx(1)  # 8 cards of 50 GB/s, 80% of it
    assert ring_seconds(H100, Group(4, 16), 40e9, calls=0) == pytest.approx(1)  # one card each
    assert ring_seconds(H100, across, 0, calls=2) == pytest.approx(2 * (8.4e-6 + 14 * 3.4e-6 + 14e-6))
    assert ring_seconds(H100, Group(1), 1e12, calls=9) == 0
    # 8 of 15 other ranks are in the other node.
    assert all_to_all_seconds(H100, across, 40e9 * 15 / 8, calls=0) == pytest.approx(1)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "qwen2-57b-a14b", "qwen3-30b-a3b", "llama-3-8b"])
def test_one_rank_computes_what_accounting_says(name: str) -> None:
    config = model_of(name)
    units = units_of(name, "fsdp")
    assert rank_flops(config, units, MeshSizes(), 4096) == pytest.approx(training_flops(config, 4096))


def test_tensor_ranks_share_what_the_plan_splits() -> None:
    whole, split = (rank_flops(MIXTRAL, MIXTRAL_UNITS, MeshSizes(tensor=tensor), 4096) for tensor in (1, 4))
    everywhere = 3 * 2 * (32_000 * 4096 + 32 * 8 * 4096)  # output head and routers
    assert split == pytest.approx(everywhere + (whole - everywhere) / 4)
    again = rank_flops(MIXTRAL, MIXTRAL_UNITS, MeshSizes(), 4096, "block")
    assert again == pytest.approx(whole + (whole - 3 * 2 * 32_000 * 4096) / 3)
