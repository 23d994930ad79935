"""What is ours of the DeepEP transport, over a stand-in of ``deep_ep.Buffer`` that keeps to its documentation.

The kernels themselves need several GPUs, and are not run here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from layouts import meshes_of
from pool import Pools
from test_two_hops import (
    WIDE,
    WORLD,
    E,
    Outcome,
    Table,
    assert_like_one_process,
    outcome,
    parameters,
    tables_of_ranks,
)
from torch import Tensor

from zoo.parallel.collectives import Traffic
from zoo.parallel.deep_ep import DeepEPDispatcher, deep_ep_applies


class Event:
    def current_stream_wait(self) -> None:
        pass


@dataclass
class Handle:
    """Which token each sent row is, and how many rows go to and come from each rank."""

    token: Tensor
    tokens: int
    send: list[int]
    receive: list[int]


class Buffer:
    """``deep_ep.Buffer`` over gloo: ranks of one node, any dtype."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.group_size, self.rank = group, group.size(), group.rank()

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Tensor, None, Tensor, Tensor, Event]:
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        local = num_experts // self.group_size
        in_rank = torch.stack([(topk_idx // local == rank).any(1) for rank in range(self.group_size)], 1)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts)
        return in_rank.sum(0).int(), None, per_expert.int(), in_rank, Event()

    def dispatch(
        self,
        x: Tensor,
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        async_finish: bool = False,
    ) -> tuple[Any, ...]:
        assert x.is_contiguous()
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return self._exchange(x[handle.token], handle.send, handle.receive), None, None, None, None, Event()
        assert is_token_in_rank is not None and num_tokens_per_expert is not None and num_tokens_per_rank is not None
        assert topk_idx is not None and topk_weights is not None and topk_weights.is_contiguous()
        rank, token = is_token_in_rank.t().nonzero(as_tuple=True)
        counts = num_tokens_per_rank.clone()
        dist.all_to_all_single(counts, num_tokens_per_rank, group=self.group)
        made = Handle(token, len(x), num_tokens_per_rank.tolist(), counts.tolist())
        local = len(num_tokens_per_expert) // self.group_size
        there = topk_idx[token] // local == rank.unsqueeze(1)
        ids = torch.where(there, topk_idx[token] % local, -1)
        sent = (x[token], ids, topk_weights[token] * there)
        rows, ids, weights = (self._exchange(t, made.send, made.receive) for t in sent)
        return rows, ids, weights, torch.bincount(ids[ids >= 0], minlength=local).tolist(), made, Event()

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, async_finish: bool = False
    ) -> tuple[Tensor, Tensor | None, Event]:
        assert x.is_contiguous()
        summed = []
        for rows in (x, topk_weights):
            if rows is not None:
                back = self._exchange(rows, handle.receive, handle.send)
                summed.append(back.new_zeros((handle.tokens, back.shape[1])).index_add_(0, handle.token, back))
        return summed[0], summed[1] if topk_weights is not None else None, Event()

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        out = rows.new_empty((sum(receive), rows.shape[1]))
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=self.group)
        return out


def exchanged(tables: list[Table]) -> Outcome:
    rank, group = dist.get_rank(), meshes_of(WIDE).expert.get_group()
    gate_up, down = parameters()
    mine = slice(rank * E // WORLD, (rank + 1) * E // WORLD)
    dispatcher = DeepEPDispatcher(Buffer(group), Traffic(ranks_per_node=WORLD))
    return outcome(dispatcher, rank, tables[rank], gate_up[mine], down[mine])


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables=tables_of_ranks)
def test_any_routing_equals_one_process(pools: Pools, tables: list[Table]) -> None:
    assert_like_one_process(pools[WORLD].run(exchanged, tables), tables)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("deep_ep")
    module.__spec__ = ModuleSpec("deep_ep", None)
    monkeypatch.setitem(sys.modules, "deep_ep", module)


FITS = {"device_type": "cuda", "dtype": torch.bfloat16, "hidden_size": 7168, "ranks": 64, "ranks_per_node": 8}


def test_it_applies_only_where_it_is_installed() -> None:
    assert not deep_ep_applies(**FITS)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("change", "applies"),
    [
        ({}, True),
        ({"ranks": 4, "ranks_per_node": 4}, True),
        ({"device_type": "cpu"}, False),
        ({"dtype": torch.float32}, False),
        ({"hidden_size": 7000}, False),
        ({"hidden_size": 8192}, False),
        ({"ranks": 56}, False),
        ({"ranks_per_node": 4}, False),
        ({"ranks": 16, "ranks_per_node": 16}, False),
    ],
)
def test_it_applies_to_what_its_kernels_take(change: dict[str, Any], applies: bool) -> None:
    assert deep_ep_applies(**FITS | change) == applies
