"""The planner's figures against hand computation, accounting and each other; nothing is run in parallel here.

What real processes hold and send is compared in ``tests/distributed/test_plan_figures.py``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.accounting import count_parameters, training_flops
from zoo.cli.main import main
from zoo.config import ModelConfig, MoEConfig
from zoo.model import build
from zoo.moe.dispatch import LocalDispatcher
from zoo.parallel.activations import block_activations, head_activations, loss_chunk
from zoo.parallel.apply import moe_layers
from zoo.parallel.communication import (
    Collective,
    expert_exchanges,
    gradient_reductions,
    mean_destinations,
    parameter_gathers,
    tensor_collectives,
)
from zoo.parallel.estimate import Setting, Workload, gpu_hours_per_trillion, rank_flops, utilisation
from zoo.parallel.footprint import Units, Weight, holdings, resolve_units
from zoo.parallel.hardware import GPUS, Gpu, Group, all_to_all_seconds, find_gpu, ring_seconds
from zoo.parallel.memory import USABLE_MEMORY, peak_memory
from zoo.parallel.mesh import MeshSizes
from zoo.parallel.plan import ExpertRule, load_plan
from zoo.parallel.planner import Result, divisors, search
from zoo.registry import find_spec, model_names


def model_of(name: str) -> ModelConfig:
    """Without MTP modules, which are not planned."""
    return dataclasses.replace(find_spec(name).model, mtp_depth=0)


MIXTRAL, DEEPSEEK = model_of("mixtral-8x7b"), model_of("deepseek-v3")
H100 = find_gpu("h100")


def units_of(name: str, plan: str) -> Units:
    return resolve_units(model_of(name), load_plan(plan), "bf16-mixed")[0]


MIXTRAL_UNITS, DEEPSEEK_UNITS = units_of("mixtral-8x7b", "tp_ep_fsdp"), units_of("deepseek-v3", "tp_ep_fsdp")


def work(name: str = "mixtral-8x7b", gpus: int = 64, batch: int = 64, length: int = 4096) -> Workload:
    config = model_of(name)
    return Workload(config=config, gpu=H100, gpus=gpus, sequence_length=length, global_batch=batch)


# ---------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in model_names() if find_spec(name).model.moe])
def test_one_rank_holds_every_parameter(name: str) -> None:
    config = model_of(name)
    held = holdings(config, units_of(name, "ep_fsdp"), MeshSizes(), "32-true").whole
    assert held.at_rest == held.gathered == count_parameters(config).total


def test_shapes_of_one_weight_by_hand() -> None:
    sizes = MeshSizes(data_shard=4, tensor=2, expert=4)
    assert Weight((12, 10), "colwise", None).on_rank(sizes) == (6, 10)
    assert Weight((12, 10), "colwise", None).at_rest(sizes) == 2 * 10  # 6 rows over 4 ranks: 2, 2, 2, 0
    assert Weight((12, 10), "rowwise", None).on_rank(sizes) == (12, 5)
    assert Weight((12,), "rowwise", None).on_rank(sizes) == (12,)
    assert Weight((7,), None, None).at_rest(sizes) == 2
    experts = Weight((8, 2, 6, 5), None, ExpertRule(parameters="x", expert=0, shard=2))
    assert experts.gathered(sizes) == 2 * 2 * 6 * 5  # 8 experts over 4 ranks
    assert experts.at_rest(sizes) == 2 * 2 * 3 * 5  # 8 ranks / 4 expert ranks: 6 columns over 2


def test_mixtral_by_hand() -> None:
    """64 ranks, experts over 8: an eighth of the experts over 8 ranks, the rest over 64."""
    sizes = MeshSizes(data_shard=64, expert=8)
    held = holdings(MIXTRAL, units_of("mixtral-8x7b", "ep_fsdp"), sizes, "bf16-mixed")
    experts, total = 32 * 8 * 3 * 4096 * 14336, 46_702_792_704
    routers = 32 * 8 * 4096  # 8 rows over 64 ranks: the first 8 hold one
    assert held.whole.at_rest == experts // 64 + (total - experts - routers) // 64 + routers // 8
    assert held.whole.gathered == experts // 8 + total - experts
    assert held.root.gathered == 2 * 32_000 * 4096 + 4096


SIZES = st.builds(
    lambda replicate, shard, tensor, expert: {
        "data_replicate": 2**replicate,
        "data_shard": 2**shard,
        "tensor": 2**tensor,
        "expert": 2**expert,
    },
    *[st.integers(0, n) for n in (3, 4, 3, 3)],
).filter(
    lambda s: max(s["expert"], s["data_shard"] * s["tensor"]) <= s["data_replicate"] * s["data_shard"] * s["tensor"]
)


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_shards_add_up_to_the_whole(values: dict[str, int]) -> None:
    """Where sizes divide, all ranks together hold each copy of the model once; replicas and tensor ranks repeat it."""
    sizes = MeshSizes(**values)
    for unit in MIXTRAL_UNITS:
        for weight in unit.weights:
            whole, at_rest = math.prod(weight.shape), weight.at_rest(sizes)
            if weight.expert:
                ranks = sizes.expert * sizes.expert_shard
            elif weight.tensor in ("colwise", "rowwise"):
                ranks = sizes.tensor * sizes.data_shard
            else:
                ranks = sizes.data_shard
            assert at_rest * ranks >= whole
            if len(weight.shape) > 2 or weight.shape[0] % ranks == 0:
                assert at_rest * ranks == whole
        others = sizes.expert if unit.kind == "experts" else sizes.tensor
        assert unit.shards(sizes).size * unit.copies(sizes).size * others == sizes.world


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from(["data_shard", "tensor"]))
def test_memory_falls_with_more_shards(values: dict[str, int], more: str) -> None:
    less = holdings(MIXTRAL, MIXTRAL_UNITS, MeshSizes(**values), "bf16-mixed").whole.at_rest
    finer = MeshSizes(**{**values, more: 2 * values[more]})
    assert holdings(MIXTRAL, MIXTRAL_UNITS, finer, "bf16-mixed").whole.at_rest < less


def test_expert_ranks_hold_fewer_experts_at_a_time() -> None:
    gathered = [
        holdings(DEEPSEEK, DEEPSEEK_UNITS, MeshSizes(data_shard=256, expert=expert), "bf16-mixed").whole.gathered
        for expert in (1, 8, 64)
    ]
    assert gathered == sorted(gathered, reverse=True)


# ---------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------


def saved_bytes(config: ModelConfig, ids: torch.Tensor) -> int:
    """Bytes of activations that autograd saves in one forward pass, the rows of experts sorted as on a GPU."""
    model = build(config)
    for _, moe in moe_layers(model):
        moe.dispatcher = LocalDispatcher()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # keeps them, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize(
    "name",
    ["mixtral-tiny", "deepseek-v3-tiny", "qwen2-moe-tiny", "qwen3-moe-tiny", "olmoe-tiny", "llama-tiny", "olmo2-tiny"],
)
def test_activations_are_what_autograd_saves(name: str) -> None:
    """In fp32 on one process, within 3%."""
    config = model_of(name)
    if config.mla:  # the CPU's flash kernel is given values of the keys' size
        mla = dataclasses.replace(config.mla, v_head_dim=config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim)
        config = dataclasses.replace(config, mla=mla)
    blocks = sum(block_activations(config, layer, 4, MeshSizes()).whole for layer in range(config.num_layers))
    ids = torch.randint(config.vocab_size, (4, 256))  # enough for the norms that save as those of a GPU do
    expected = ids.numel() * (blocks + 4 * 2 * config.hidden_size + 4)
    assert saved_bytes(config, ids) == pytest.approx(expected, rel=0.03)


def test_a_dense_block_by_hand() -> None:
    """Llama 3 8B in bf16: D 4096, 32 query and 8 key heads of 128, F 14336."""
    block = block_activations(find_spec("llama-3-8b").model, 0, 2, MeshSizes())
    norms, attention, ffn = 2 * (8192 + 4), 8192 + 2 * 128 * 2 * 40 + 4 * 32, 8192 + 4 * 2 * 14336
    assert block.whole == norms + attention + ffn
    assert block.kept("block") == 8192
    assert head_activations(find_spec("llama-3-8b").model, 2) == 3 * 8192 + 4


def test_logits_of_one_chunk_by_hand() -> None:
    """2²⁷ of them: 1,046 tokens of Llama 3's vocabulary."""
    llama, gemma = find_spec("llama-3-8b").model, find_spec("gemma-2-9b").model
    assert loss_chunk(llama, 2, 8192) == 1046 * (6 * 128_256 + 8192)
    assert loss_chunk(llama, 4, 8192) == 1046 * (4 * 128_256 + 2 * 8192)
    assert loss_chunk(llama, 2, 100) == 100 * (6 * 128_256 + 8192)
    assert loss_chunk(gemma, 2, 8192) == 524 * (10 * 256_000 + 2 * 3584)


# ---------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "units"), [("mixtral-8x7b", MIXTRAL_UNITS), ("deepseek-v3", DEEPSEEK_UNITS)])
def test_memory_follows_the_setting(name: str, units: Units) -> None:
    """Less is kept where more is recomputed or freed, with smaller micro-batches, and with more tensor ranks."""

    def peak(setting: Setting, tensor: int = 1) -> float:
        sizes = MeshSizes(data_shard=64 // tensor, tensor=tensor, expert=8)
        held = holdings(model_of(name), units, sizes, "bf16-mixed")
        return sum(peak_memory(work(name, batch=256), sizes, held, setting).values())

    kept = [peak(Setting(4, 1, recompute, True)) for recompute in ("none", "experts", "block")]
    assert kept == sorted(kept, reverse=True)
    assert peak(Setting(4, 1, "none", True)) < peak(Setting(4, 1, "none", False))
    assert peak(Setting(2, 1, "none", True)) < peak(Setting(4, 1, "none", True))
    assert peak(Setting(4, 1, "none", True), tensor=4) < peak(Setting(4, 1, "none", True))


def test_unreduced_gradients_by_hand() -> None:
    """Between micro-batches all of what a rank computes with has a gradient in fp32: 47 GB of Mixtral's experts / 8."""
    sizes = MeshSizes(data_shard=64, expert=8)
    held = holdings(MIXTRAL, MIXTRAL_UNITS, sizes, "bf16-mixed")
    memory = peak_memory(work(batch=128), sizes, held, Setting(1, 2, "block", True))
    assert memory["gradients"] == 0
    extra = memory["unreduced gradients"] - 4 * held.whole.gathered
    assert 0 < extra < 0.1 * memory["unreduced gradients"]


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


# ---------------------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> Result:
    return search(work())


def test_fitting_layouts_fit_and_are_ranked(found: Result) -> None:
    times = [one.step_seconds for one in found.fitting]
    assert times and times == sorted(times)
    for one in found.fitting:
        assert one.total_memory <= USABLE_MEMORY * H100.memory
        assert one.layout.sizes.world == 64
        assert one.setting.micro_batch * one.setting.micro_batches * one.layout.sizes.data == 64
        assert 0 < utilisation(work(), one) < 0.5


def test_every_layout_is_there_once(found: Result) -> None:
    seen = [(one.layout.plan, one.layout.sizes) for one in found.fitting]
    assert len(set(seen)) == len(seen)
    rejected = [(one.plan, *one.sizes.values()) for one in found.rejected]
    assert len(set(rejected)) == len(rejected)
    assert {one.plan for one in found.rejected} | {plan for plan, _ in seen} == {
        "ddp",
        "ep",
        "ep_fsdp",
        "fsdp",
        "tp_ep_fsdp",
    }


def test_reasons(found: Result) -> None:
    reasons = {(one.plan, *one.sizes.values()): one for one in found.rejected}
    ddp = reasons["ddp", 64, 1, 1]
    assert ddp.kind == "memory" and ddp.needed > 16 * 46.7e9 and "optimizer" in ddp.reason
    assert "num_experts = 8" in reasons["ep_fsdp", 1, 1, 64].reason
    assert "num_kv_heads = 8" in reasons["tp_ep_fsdp", 1, 16, 1].reason
    across = search(work("olmoe-1b-7b"), only=("tp_ep_fsdp", {"tensor": 2})).rejected
    assert across and all("attention.qk_norm = projection is over all heads" in one.reason for one in across)
    uneven = search(work(batch=48), only=("ep_fsdp", {"expert": 8})).rejected
    assert [(one.kind, one.reason) for one in uneven] == [
        ("batch", "48 sequences a step are not divisible by 64 data ranks")
    ]
    (dense,) = search(work("llama-3-8b"), only=("ep_fsdp", {})).rejected
    assert dense.kind == "plan" and "matches no parameter" in dense.reason


def test_a_dense_model_has_layouts() -> None:
    assert {one.layout.plan for one in search(work("llama-3-8b")).fitting} == {"fsdp", "tp_ep_fsdp"}


RECURRENT = [name for name in model_names() if find_spec(name).model.mamba]


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([name for name in model_names() if name not in ("deepseek-v3", "deepseek-v2", *RECURRENT)]),
    st.integers(0, 13),
    st.sampled_from([1, 3, 8]),
    st.sampled_from(list(GPUS.values())),
)
def test_no_figure_is_absurd(name: str, power: int, rows: int, gpu: Gpu) -> None:
    config, gpus = model_of(name), 2**power
    length = min(4096, config.max_position_embeddings)
    asked = Workload(config=config, gpu=gpu, gpus=gpus, sequence_length=length, global_batch=rows * gpus)
    for one in search(asked).fitting:
        for figures in (one.memory, one.sent, one.between_nodes, one.seconds):
            assert all(math.isfinite(figure) and figure >= 0 for figure in figures.values()), (one.layout, figures)
        assert 0 < utilisation(asked, one) <= asked.efficiency
        assert all(0 <= size <= one.sent[kind] * (1 + 1e-9) for kind, size in one.between_nodes.items())
        assert one.memory["activations"] > 0 and one.total_memory <= USABLE_MEMORY * gpu.memory
        assert (one.hops > 0) == (one.layout.sizes.expert > 1)
        assert one.between_nodes == {} or gpus > gpu.gpus_per_node


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_not_estimated(name: str) -> None:
    with pytest.raises(ValueError, match="mamba: memory and time of recurrent layers are not estimated; choose a plan"):
        work(name)


def test_prediction_modules_are_not_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ValueError, match="mtp_depth = 1: memory and time of MTP modules are not estimated; plan the model"
    ):
        Workload(config=find_spec("deepseek-v3").model, gpu=H100, gpus=8, sequence_length=4096, global_batch=8)
    assert main(["plan", "deepseek-v3", "--gpus", "8", "--layout", "fsdp"]) == 1
    assert "deepseek-v3 without its MTP modules on 8 h100" in capsys.readouterr().out


def test_one_gpu() -> None:
    fitting = search(work("mixtral-tiny", 1, 1, 256)).fitting
    assert fitting and not any(one.sent for one in fitting)


def test_gpu_hours() -> None:
    one = search(work(), only=("ep_fsdp", {"expert": 8})).fitting[0]
    tokens_per_hour = 64 * 4096 / one.step_seconds * 3600
    assert gpu_hours_per_trillion(work(), one) == pytest.approx(64 * 1e12 / tokens_per_hour)


@pytest.mark.parametrize("number", [1, 12, 2048, 97])
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_gpus_are_plausible(gpu: Gpu) -> None:
    assert 1e12 < gpu.memory_bandwidth < 1e13 and 50e9 < gpu.memory < 300e9
    assert gpu.fp32_flops < gpu.bf16_flops and gpu.inter_bandwidth < gpu.intra_bandwidth and gpu.source


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "gpus"), [("deepseek-v3", 2048), ("mixtral-8x7b", 64)])
def test_large_worlds_take_seconds_and_little_memory(name: str, gpus: int) -> None:
    code = (
        "import resource, sys\n"
        "from zoo.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-c", code, "plan", name, "--gpus", str(gpus), "--gpu", "h100", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stderr.split()[-1]) * 1024 < 4 * 2**30
    plan = json.loads(done.stdout)
    best = plan["fitting"][0]
    assert plan["tokens_per_step"] == gpus * 4096
    assert best["memory_bytes"]["total"] == pytest.approx(sum(best["memory_bytes"].values()) / 2)
    assert best["seconds"]["step"] > 0 and best["sent_bytes_per_step"]["all_to_all_dispatch"] > 0
    assert all(one["reason"] for one in plan["rejected"])


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mixtral-8x7b", "--gpus", "64", "--layout", "ep_fsdp,expert=8", "--global-batch", "128"]) == 0
    text = capsys.readouterr().out
    assert "128 sequences of 4,096 tokens" in text and "all to all dispatch" in text


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mixtral-8x7b", "--gpus", "1"]) == 1
    assert "for their memory, such as ddp" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpu", "h10"], "gpu 'h10': did you mean 'h100'?"),
        (["--gpus", "0"], "gpus = 0: give a positive integer"),
        (["--efficiency", "2"], "efficiency = 2.0"),
        (["--sequence-length", "1000000"], "the model has positions up to 32768"),
        (["--tokens-per-step", "5000"], "give a multiple of the sequence length, 4096"),
        (["--layout", "ep_fsdp,pipeline=2"], "'pipeline=2' is none of tensor=N, expert=N, replicate=N"),
        (["--layout", "zero3"], "plan 'zero3'"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    assert main(["plan", "mixtral-8x7b", "--gpus", "8", *more]) == 2
    assert message in capsys.readouterr().err
