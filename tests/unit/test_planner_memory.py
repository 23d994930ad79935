"""What the planner says a rank holds, against hand computation, autograd and accounting."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import DEEPSEEK, DEEPSEEK_UNITS, MIXTRAL, MIXTRAL_UNITS, model_of, units_of, work

from zoo.accounting import count_parameters
from zoo.config import ModelConfig
from zoo.model import build
from zoo.moe.dispatch import LocalDispatcher
from zoo.parallel.activations import block_activations, head_activations, loss_chunk
from zoo.parallel.apply import moe_layers
from zoo.parallel.estimate import Setting
from zoo.parallel.footprint import Units, Weight, holdings
from zoo.parallel.memory import peak_memory
from zoo.parallel.mesh import MeshSizes
from zoo.parallel.plan import ExpertRule
from zoo.registry import find_spec, model_names

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
