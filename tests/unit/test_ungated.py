"""FFNs and experts without a gate, and the dense FFN after experts, against their equations; what does not take them.

Shapes: T tokens, N routed rows, E experts, D model, F FFN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.accounting import forward_flops
from zoo.config import ModelConfig, RelativePositionConfig
from zoo.config_reading import from_dict
from zoo.finetune.apply import apply
from zoo.finetune.config import FinetuneConfig
from zoo.layers.sequence import sequence_layout
from zoo.model import Decoder, SparseDenseBlock, build
from zoo.moe.layer import MoE
from zoo.moe.ungated import ReLUExperts, relu_grouped, relu_loop, relu_split
from zoo.parallel.apply import check_sizes
from zoo.parallel.estimate import Workload
from zoo.parallel.hardware import find_gpu
from zoo.parallel.mesh import MeshSizes
from zoo.parallel.plan import load_plan, resolve
from zoo.quantize import quantize
from zoo.registry import find_spec
from zoo.upcycle.layout import layout as upcycled

D, FFN = 16, 24


def small(**changes: Any) -> ModelConfig:
    config = find_spec("glam-tiny").model
    assert config.moe is not None
    moe = dataclasses.replace(config.moe, num_experts=4, moe_intermediate_size=FFN, **changes)
    return dataclasses.replace(
        config, vocab_size=40, hidden_size=D, num_layers=2, intermediate_size=2 * FFN, moe=moe, initializer_range=0.3
    )


COUNTS = [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 2], [2, 3, 4, 5], [0, 0, 0, 0]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(
    ("way", "dtype"), [(relu_split, torch.float64), (relu_grouped, torch.float32)], ids=["split", "grouped"]
)
def test_every_way_equals_the_loop_and_the_loop_the_equation(
    way: Callable[..., Tensor], dtype: torch.dtype, counts: list[int]
) -> None:
    up, down = torch.randn(4, FFN, D, dtype=dtype), torch.randn(4, D, FFN, dtype=dtype)
    rows, upstream = torch.randn(2, sum(counts), D, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in (rows, up, down)]
    experts = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    inner = torch.einsum("nd,nfd->nf", rows, up[experts]).clamp(min=0)
    expected = torch.einsum("nf,ndf->nd", inner, down[experts])
    if not sum(counts):
        assert way(rows, torch.tensor(counts), up, down).shape == (0, D)
        return
    for result in (relu_loop(rows, torch.tensor(counts), up, down), way(rows, torch.tensor(counts), up, down)):
        torch.testing.assert_close(result, expected)
        for got, want in zip(
            *(torch.autograd.grad(out, leaves, upstream, retain_graph=True) for out in (result, expected)), strict=True
        ):
            torch.testing.assert_close(got, want)


def test_a_layer_is_the_weighted_sum_of_the_experts_that_each_token_chose() -> None:
    layer = build(small(), dtype=torch.float64).layers[1].ffn
    assert isinstance(layer, MoE) and isinstance(layer.experts, ReLUExperts)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    out, routing = layer(x)
    best = (x.flatten(0, 1) @ layer.router.weight.T).softmax(-1).topk(2)
    weights = best.values / best.values.sum(-1, keepdim=True)
    inner = F.relu(torch.einsum("td,efd->tef", x.flatten(0, 1), layer.experts.up))
    of_all = torch.einsum("tef,edf->ted", inner, layer.experts.down)
    chosen = of_all.gather(1, best.indices.unsqueeze(-1).expand(-1, -1, D))
    expected = (weights.unsqueeze(-1) * chosen).sum(1).view_as(x)
    assert torch.equal(routing.experts, best.indices)
    torch.testing.assert_close(out, expected)
    leaves, upstream = [x, *layer.parameters()], torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (out, expected)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("placement", ["before", "after", "both"])
def test_a_dense_ffn_after_the_experts_is_a_sub_block_of_its_own(placement: str) -> None:
    config = dataclasses.replace(small(dense_ffn=True), norm_placement=placement, ffn="relu")
    plain, block = build(config, dtype=torch.float64).layers
    assert not isinstance(plain, SparseDenseBlock) and isinstance(block, SparseDenseBlock)

    def norm(z: Tensor, given: bool) -> Tensor:
        return z / (z.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() if given else z

    before, after = placement != "after", placement != "before"
    layout = sequence_layout(torch.zeros(1, 6).long(), attention_mask=None, document_ids=None, past=0, past_valid=None)
    x = torch.randn(1, 6, D, dtype=torch.float64, requires_grad=True)
    y = x + norm(block.mixer(norm(x, before), layout, (x, x), None), after)
    y = y + norm(block.ffn(norm(y, before))[0], after)
    inner = (norm(y, before) @ block.dense_ffn.up_proj.weight.T).clamp(min=0)
    expected = y + norm(inner @ block.dense_ffn.down_proj.weight.T, after)
    out, routing = block(x, layout, (x, x), None)
    assert routing is not None
    torch.testing.assert_close(out, expected)
    leaves, upstream = [x, *(p for name, p in block.named_parameters() if "norm" not in name)], torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(z, leaves, upstream) for z in (out, expected)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dense_ffn", [False, True])
def test_flops_are_those_of_the_weights_that_a_token_meets(dense_ffn: bool) -> None:
    config = small(dense_ffn=dense_ffn)
    attention = 4 * D * 128 + 4 * 128 * (64 + 1) / 2 / 2  # projections, and scores with values of the mean query
    dense = 3 * D * 2 * FFN  # gated
    experts = 4 * D + 2 * 2 * D * FFN  # the router, and two experts without a gate
    assert forward_flops(config, 64) == 2 * (40 * D + 2 * attention + (1 + dense_ffn) * dense + experts)


def test_what_does_not_go_together_is_refused_with_the_fix() -> None:
    for message, make in {
        r"moe.expert_dropout = 0.1: .* without a gate have none; set it to 0": lambda: small(expert_dropout=0.1),
        r"ffn = relu: experts with a swiglu_limit are swiglu": lambda: small(swiglu_limit=7.0),
        r"mtp_depth = 1: MTP modules have no FFN after": lambda: dataclasses.replace(
            small(dense_ffn=True), mtp_depth=1
        ),
        r"rope = given: attention.relative_positions take its place": lambda: dataclasses.replace(
            small(), rope=find_spec("mixtral-tiny").model.rope
        ),
        r"attention.relative_positions.num_buckets = 5: give an even number from 4": lambda: with_buckets(5, 9),
        r"attention.relative_positions.max_distance = 4: it must exceed half": lambda: with_buckets(8, 4),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


def with_buckets(num_buckets: int, max_distance: int) -> ModelConfig:
    config = small()
    positions = RelativePositionConfig(num_buckets=num_buckets, max_distance=max_distance)
    assert config.attention is not None
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, relative_positions=positions))


def test_what_knows_nothing_of_them_refuses_them() -> None:
    plain = find_spec("mixtral-tiny").model
    assert plain.moe is not None
    ungated = dataclasses.replace(plain, moe=dataclasses.replace(plain.moe, ffn="relu"))
    followed = dataclasses.replace(plain, moe=dataclasses.replace(plain.moe, dense_ffn=True))
    for config in (small(), ungated, followed):
        with pytest.raises(ValueError, match=r"relative_positions, ffn = relu, moe.dense_ffn: memory and time are"):
            Workload(config=config, gpu=find_gpu("h100"), gpus=8, sequence_length=64, global_batch=8)
    with pytest.raises(ValueError, match=r"int8: experts .* without a gate, are not supported"):
        quantize(build(ungated), "int8")
    with pytest.raises(ValueError, match=r"finetune.lora.targets: layers.0.ffn.experts are experts without a gate"):
        apply(build(ungated), from_dict(FinetuneConfig, {"lora": {"targets": ["ffn"]}}, "finetune"))
    for sparse, message in ((ungated, "ffn = relu: only gated FFNs"), (followed, "moe.dense_ffn = True: the dense")):
        with pytest.raises(ValueError, match=message):
            upcycled(dataclasses.replace(sparse, moe=None), sparse)


def test_experts_are_spread_over_ranks_and_one_table_of_all_heads_is_not_split() -> None:
    with torch.device("meta"):
        model = Decoder(small(dense_ffn=True))
    rules = resolve(load_plan("tp_ep_fsdp"), model)
    assert {name.split(".")[-1]: (rule.expert, rule.shard) for name, rule in rules.experts.items()} == {
        "up": (0, 1),
        "down": (0, 2),
    }
    assert rules.tensor["layers.1.dense_ffn.up_proj"] == "colwise"
    check_sizes(model.config, MeshSizes(data_shard=2, expert=2), rules)
    with pytest.raises(ValueError, match=r"attention.relative_positions have one table for all heads; use"):
        check_sizes(model.config, MeshSizes(tensor=2), rules)
