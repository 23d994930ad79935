"""Experts over two nodes of two ranks: tokens cross between nodes once a node, and nothing else changes.

Shapes: T tokens of a rank, D model, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import Layout, Run, meshes_of
from pool import Pools
from test_layouts import check
from torch import Tensor

from zoo.moe.dispatch import Dispatcher, LocalDispatcher
from zoo.moe.experts import experts_loop
from zoo.moe.router import RouterOutput
from zoo.parallel.apply import ParallelOptions
from zoo.parallel.exchange import choose_exchange
from zoo.parallel.expert_parallel import AllToAllDispatcher, ExchangeDispatcher

WORLD, PER_NODE, E, K, D, FFN = 4, 2, 8, 3, 5, 4
WIDE = Layout("ep", WORLD, expert=WORLD)

Table = list[list[int]]
"""The experts of each token."""


def parameters() -> tuple[Tensor, Tensor]:
    """``gate_up`` and ``down`` of all experts."""
    generator = torch.Generator().manual_seed(1)
    shapes = (E, 2, FFN, D), (E, D, FFN)
    gate_up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return gate_up, down


def tokens(rank: int, table: Table) -> tuple[Tensor, Tensor, RouterOutput]:
    """Tokens [T, D] and weights [T, K] of one rank, and their routing."""
    generator = torch.Generator().manual_seed(rank)
    shapes = (len(table), D), (len(table), K)
    x, weights = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    scores = torch.zeros(len(table), E)
    return x, weights, RouterOutput(scores, scores, weights, torch.tensor(table, dtype=torch.int64).view(-1, K))


@dataclass
class Outcome:
    """Of one rank."""

    tensors: list[Tensor]
    """Result, and gradients of the tokens, the weights, and of ``gate_up`` and ``down`` of its experts."""
    between_nodes: int = 0
    within_node: int = 0


def outcome(dispatcher: Dispatcher, rank: int, table: Table, gate_up: Tensor, down: Tensor) -> Outcome:
    x, weights, routing = tokens(rank, table)
    gate_up, down = gate_up.clone().requires_grad_(), down.clone().requires_grad_()
    rows, counts, state = dispatcher.dispatch(x, routing)
    out = dispatcher.combine(experts_loop(rows, counts, gate_up, down), state)
    (out.square().sum() + 0 * (gate_up.sum() + down.sum())).backward()
    return Outcome([out.detach(), x.grad, weights.grad, gate_up.grad, down.grad])


@cache
def dispatcher_of(ranks_per_node: int) -> ExchangeDispatcher:
    meshes = meshes_of(WIDE)
    rows = {"dtype": torch.float64, "hidden_size": D}
    return choose_exchange(meshes.expert, None, ranks_per_node=ranks_per_node, capacity_factor=None, **rows)()


def exchanged(tables: list[Table], hops: int) -> Outcome:
    rank = torch.distributed.get_rank()
    dispatcher = dispatcher_of(PER_NODE)
    assert isinstance(dispatcher, AllToAllDispatcher) and len(dispatcher.groups) == 2
    if hops == 1:
        dispatcher = AllToAllDispatcher([meshes_of(WIDE).expert.get_group()], dispatcher.traffic)
    dispatcher.traffic.reset()
    mine = slice(rank * E // WORLD, (rank + 1) * E // WORLD)
    gate_up, down = parameters()
    result = outcome(dispatcher, rank, tables[rank], gate_up[mine], down[mine])
    result.between_nodes, result.within_node = dispatcher.traffic.between_nodes, dispatcher.traffic.within_node
    return result


def assert_like_one_process(results: list[Outcome], tables: list[Table]) -> None:
    alone = [outcome(LocalDispatcher(), rank, table, *parameters()) for rank, table in enumerate(tables)]
    for result, expected in zip(results, alone, strict=True):
        for ours, theirs in zip(result.tensors[:3], expected.tensors[:3], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for i in (3, 4):
        ours = torch.cat([result.tensors[i] for result in results])
        torch.testing.assert_close(ours, sum(r.tensors[i] for r in alone), rtol=1e-10, atol=1e-10)


def crossings(tables: list[Table], ranks_a_place: int) -> int:
    """How often tokens go to another node, where each goes once to a place of ``ranks_a_place`` ranks."""
    total = 0
    for rank, table in enumerate(tables):
        for experts in table:
            ranks = {expert * WORLD // E for expert in experts}
            total += len({r // ranks_a_place for r in ranks if r // PER_NODE != rank // PER_NODE})
    return total


ROW_BYTES = 4 * D * 8 + K * (4 + 8 + 8)
"""A row and its result, forward and backward; the numbers of its experts; weights, forward and backward."""

experts_of_a_token = st.permutations(range(E)).map(lambda order: list(order[:K]))
tables_of_ranks = st.lists(st.lists(experts_of_a_token, max_size=6), min_size=WORLD, max_size=WORLD)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables=tables_of_ranks)
def test_any_routing_equals_one_process_and_crosses_once_a_node(pools: Pools, tables: list[Table]) -> None:
    results = pools[WORLD].run(exchanged, tables, 2)
    assert_like_one_process(results, tables)
    assert sum(r.between_nodes for r in results) == ROW_BYTES * crossings(tables, PER_NODE)


def test_ranks_and_nodes_without_tokens(pools: Pools) -> None:
    for tables in ([[], [], [], []], [[[0, 1, 2]], [], [], []], [[], [[4, 5, 6]] * 3, [[4, 6, 7]], []]):
        assert_like_one_process(pools[WORLD].run(exchanged, tables, 2), tables)


def test_two_hops_spare_the_network_between_nodes(pools: Pools) -> None:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.rand(64, E, generator=generator).topk(K).indices.tolist() for _ in range(WORLD)]
    one, two = (pools[WORLD].run(exchanged, tables, hops) for hops in (1, 2))
    assert_like_one_process(one, tables)
    between = [sum(r.between_nodes for r in results) for results in (one, two)]
    assert between == [ROW_BYTES * crossings(tables, 1), ROW_BYTES * crossings(tables, PER_NODE)]
    assert between[1] < 0.75 * between[0]


NODES = ParallelOptions(ranks_per_node=PER_NODE)


@pytest.mark.parametrize("layout", [WIDE, Layout("tp_ep_fsdp", WORLD, tensor=2, expert=WORLD)], ids=["ep4", "tp2_ep4"])
def test_training_equals_one_process(pools: Pools, layout: Layout) -> None:
    """With group-limited routing, shared experts beside the exchange, and experts that nobody chooses."""
    check(pools, Run("deepseek-v3", steps=2, idle=(6, 7)), layout, NODES)


def test_recomputed_blocks(pools: Pools) -> None:
    check(pools, Run("mixtral", steps=2, accumulate=2), WIDE, ParallelOptions(ranks_per_node=2, recompute="block"))


def chosen(ranks_per_node: int) -> list[int]:
    dispatcher = dispatcher_of(ranks_per_node)
    assert isinstance(dispatcher, AllToAllDispatcher)
    return [group.size() for group in dispatcher.groups]


@pytest.mark.parametrize(("ranks_per_node", "groups"), [(1, [4]), (2, [2, 2]), (3, [4]), (4, [4]), (8, [4])])
def test_a_second_hop_only_where_experts_fill_several_nodes(
    pools: Pools, ranks_per_node: int, groups: list[int]
) -> None:
    assert pools[WORLD].run(chosen, ranks_per_node) == [groups] * WORLD


def refused() -> str:
    with pytest.raises(ValueError) as caught:
        dispatcher_of(0)
    return str(caught.value)


def test_nodes_without_ranks_are_refused(pools: Pools) -> None:
    assert "ranks_per_node = 0" in pools[WORLD].run(refused)[0]
