"""The all-to-all: rows and gradients, what it sends, and what overlaps with it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from layouts import MODELS, Layout, batch, make_parallel
from pool import Pools

from zoo.parallel.apply import traffic
from zoo.parallel.collectives import Exchange, Traffic, exchange_sizes, gather_tokens, slice_tokens
from zoo.parallel.expert_parallel import most_destinations


def exchanged(table: list[list[int]]) -> tuple[list[float], list[float], int]:
    """(what came, gradient of what was sent, bytes sent), where rank i sends table[i][j] rows to rank j."""
    rank, group = dist.get_rank(), dist.group.WORLD
    send, receive = exchange_sizes(torch.tensor(table[rank]), group)
    assert (send, receive) == (table[rank], [row[rank] for row in table])
    counted = Traffic(ranks_per_node=4)
    exchange = Exchange(send, receive, group, counted)
    rows = (100.0 * rank + torch.arange(sum(send))).unsqueeze(1).requires_grad_()
    came = exchange.wait(exchange.start(rows))
    (came * (rank + 1)).sum().backward()
    return came.flatten().tolist(), rows.grad.flatten().tolist(), counted.sent


def test_uneven_and_empty_splits(pools: Pools) -> None:
    results = pools[4].run(exchanged, [[1, 2, 0, 0], [0, 0, 0, 0], [3, 0, 1, 0], [0, 1, 0, 0]])
    assert [came for came, _, _ in results] == [[0, 200, 201, 202], [1, 2, 300], [203], []]
    # The gradient of a row is the number of the rank that it was sent to.
    assert [gradient for _, gradient, _ in results] == [[1, 2, 2], [], [1, 1, 1, 3], [2]]
    # 4 bytes a row and direction; what stays here is free. Back go the gradients of what came.
    assert [sent for _, _, sent in results] == [4 * (2 + 3), 4 * (0 + 3), 4 * (3 + 0), 4 * (1 + 0)]


def shared(tokens: int) -> tuple[list[float], list[float], list[float]]:
    group = dist.group.WORLD
    x = torch.arange(float(tokens)).unsqueeze(1).requires_grad_()
    part = slice_tokens(x, group)
    whole = gather_tokens(part * (dist.get_rank() + 1), tokens, group)
    (whole * torch.arange(1.0, tokens + 1).unsqueeze(1)).sum().backward()
    return part.flatten().tolist(), whole.flatten().tolist(), x.grad.flatten().tolist()


@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
def test_tensor_ranks_share_their_tokens(pools: Pools, tokens: int) -> None:
    share = -(-tokens // 4)
    scale = [1 + t // share for t in range(tokens)]
    for rank, (part, whole, gradient) in enumerate(pools[4].run(shared, tokens)):
        assert part == list(range(tokens))[rank * share : (rank + 1) * share]
        assert whole == [t * scale[t] for t in range(tokens)]
        assert gradient == [(t + 1) * scale[t] for t in range(tokens)]


def sent_bytes(layout: Layout) -> tuple[list[int], int]:
    """(bytes that this rank sent, forward only, of each MoE layer; row bytes that it should have sent)."""
    model, meshes = make_parallel("deepseek-v3", layout)
    ids, _ = batch(model.config.vocab_size, 0, meshes.data.get_local_rank(), 0)
    with torch.no_grad():
        (routing,) = model(ids).router_outputs
    ranks, rank = meshes.expert.size(), meshes.expert.get_local_rank()
    owner = routing.experts // (8 // ranks)
    sent = [{int(o) for o in row} - {rank} for row in owner]
    there = sum(map(len, sent))
    # What this rank got from others, it sends back once weighted and summed.
    back = torch.tensor([sum(other in row for row in sent) for other in range(ranks)])
    received = torch.empty_like(back)
    torch.distributed.all_to_all_single(received, back, group=meshes.expert.get_group())
    top_k, width, size = routing.experts.shape[1], model.config.hidden_size, 8
    return [t.sent for t in traffic(model)], there * (width * size + top_k * (size + 4)) + int(
        received.sum()
    ) * width * size


@pytest.mark.parametrize("layout", [Layout("ep", 4, expert=4), Layout("ep_fsdp", 4, expert=2)], ids=["ep4", "ep2"])
def test_a_token_is_sent_once_to_each_rank_and_the_bytes_are_counted(pools: Pools, layout: Layout) -> None:
    for measured, expected in pools[4].run(sent_bytes, layout):
        assert measured == [expected]


def rows_a_token(layout: Layout) -> list[int]:
    """Most ranks that any token travelled to, and how many it may."""
    model, meshes = make_parallel("deepseek-v3", layout)
    ids = torch.randint(model.config.vocab_size, (8, 32))
    with torch.no_grad():
        (routing,) = model(ids).router_outputs
    ranks = meshes.expert.size()
    owner = routing.experts // (model.config.moe.num_experts // ranks)
    return [max(len(set(row.tolist())) for row in owner), most_destinations(model.config.moe, ranks)]


def test_node_limited_routing_limits_where_a_token_travels(pools: Pools) -> None:
    """Top 3 of 8 experts in 4 groups, 2 of which a token may use: with a group a rank it reaches 2 ranks and not 3."""
    assert MODELS["deepseek-v3"].moe.top_k == 3
    for measured, allowed in pools[4].run(rows_a_token, Layout("ep", 4, expert=4)):
        assert measured == allowed == 2


def events(layout: Layout) -> list[tuple[str, int]]:
    """Steps of one forward and backward pass, each with the bytes sent until then."""
    model, meshes = make_parallel("deepseek-v3", layout)
    moe, (sent,) = model.layers[1].ffn, traffic(model)
    log: list[tuple[str, int]] = []
    moe.shared_experts.register_forward_pre_hook(lambda *_: log.append(("shared", sent.sent)))
    moe.experts.register_forward_pre_hook(lambda *_: log.append(("experts", sent.sent)))
    moe.shared_experts.register_full_backward_pre_hook(lambda *_: log.append(("shared backward", sent.sent)))
    ids, _ = batch(model.config.vocab_size, 0, meshes.data.get_local_rank(), 0)
    model(ids).logits.sum().backward()
    return [*log, ("end", sent.sent)]


def test_shared_experts_are_computed_while_tokens_travel(pools: Pools) -> None:
    for log in pools[2].run(events, Layout("ep", 2, expert=2)):
        assert [name for name, _ in log] == ["shared", "experts", "shared backward", "end"]
        (_, at_shared), (_, at_experts), (_, at_backward), (_, at_end) = log
        assert at_shared == at_experts > 0  # the tokens were on their way before, and awaited after
        assert at_backward == at_end > at_experts  # and so were all gradients on the way back
