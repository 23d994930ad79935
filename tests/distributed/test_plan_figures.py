"""What real processes hold and send, against the planner's figures.

Compared are bytes of parameters, gradients, moments and activations, bytes of the all-to-alls, and the number of
collectives.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from layouts import LAYOUTS, MODELS, Layout, micro_loss
from pool import Pools
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from zoo.accounting import FP32_BYTES, count_buffers
from zoo.config import ModelConfig
from zoo.model import Decoder
from zoo.parallel import init
from zoo.parallel.activations import block_activations
from zoo.parallel.apply import ParallelOptions, parallelize, traffic
from zoo.parallel.communication import (
    Kind,
    expert_exchanges,
    gradient_reductions,
    parameter_gathers,
    tensor_collectives,
)
from zoo.parallel.footprint import Precision, Recompute, holdings, resolve_units
from zoo.parallel.hardware import find_gpu
from zoo.parallel.mesh import MeshSizes, build_meshes
from zoo.parallel.plan import load_plan

WIDE = {"hidden_size": 64, "num_layers": 3, "vocab_size": 4096, "initializer_range": 0.01}
ROWS, LENGTH = 16, 64
DTYPES: dict[Precision, torch.dtype | None] = {"32-true": None, "bf16-mixed": torch.bfloat16}

OPERATIONS: dict[Kind, str] = {
    "all_gather_parameters": "all_gather",
    "all_gather_tokens": "all_gather",
    "reduce_scatter_gradients": "reduce_scatter",
    "all_reduce_gradients": "all_reduce",
    "all_reduce_tensor": "all_reduce",
    "all_to_all_dispatch": "all_to_all",
    "all_to_all_combine": "all_to_all",
}
NATIVE = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "alltoall_base_": "all_to_all",
}
"""torch's operation → kind of collective."""


def config_of(name: str) -> ModelConfig:
    """A model wide enough, and with embeddings different enough, for routers that are close to balanced."""
    config = MODELS[name]
    assert config.moe is not None
    experts = {"mixtral": {"num_experts": 8}, "deepseek-v3": {"num_experts": 16}}.get(name, {"num_experts": 12})
    return dataclasses.replace(config, **WIDE, moe=dataclasses.replace(config.moe, **experts))


def sizes_of(layout: Layout) -> MeshSizes:
    return load_plan(layout.plan).sizes(
        layout.world, tensor=layout.tensor, expert=layout.expert, replicate=layout.replicate
    )


def spread(config: ModelConfig, layout: Layout, options: ParallelOptions) -> tuple[Decoder, torch.Tensor]:
    """A model in its layout, and the token ids [ROWS, LENGTH] of this data rank."""
    meshes = build_meshes("cpu", sizes_of(layout))
    with torch.device("meta"):
        model = Decoder(config)
    parallelize(model, meshes, load_plan(layout.plan), options)
    model.to_empty(device="cpu")
    init.initialize(model, seed=1)
    generator = torch.Generator().manual_seed(meshes.data.get_local_rank())
    return model, torch.randint(config.vocab_size, (ROWS, LENGTH), generator=generator)


def measure(
    config: ModelConfig, layout: Layout, precision: Precision, recompute: Recompute, reshard: bool, ranks_per_node: int
) -> tuple[dict[str, int], tuple[int, int], dict[str, int]]:
    """One step on one rank.

    Returns:
        (bytes at rest by purpose, bytes of all-to-alls within the node and to others, calls of collectives by name)
    """
    options = ParallelOptions(
        param_dtype=DTYPES[precision],
        recompute=recompute,
        reshard_after_forward=reshard,
        ranks_per_node=ranks_per_node,
    )
    model, ids = spread(config, layout, options)
    optimizer = torch.optim.AdamW(model.parameters())
    with CommDebugMode() as mode:
        loss, _ = micro_loss(model, ids, ids.roll(-1, 1))
        loss.backward()
    calls: Counter[str] = Counter()
    for name, count in mode.get_comm_counts().items():
        calls[NATIVE[str(name).rpartition(".")[2]]] += count
    optimizer.step()
    held: Counter[str] = Counter()
    for parameter in model.parameters():
        assert parameter.grad is not None
        held["parameters"] += local_bytes(parameter)
        held["gradients"] += local_bytes(parameter.grad)
        state = optimizer.state[parameter]
        held["optimizer"] += local_bytes(state["exp_avg"]) + local_bytes(state["exp_avg_sq"])
    held["parameters"] += sum(buffer.nbytes for buffer in model.buffers())
    sent = sum(t.within_node for t in traffic(model)), sum(t.between_nodes for t in traffic(model))
    return dict(held), sent, dict(calls)


def local_bytes(tensor: torch.Tensor) -> int:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().nbytes


CASES = [
    ("mixtral", "dp2", "32-true", "none", True, 8),
    ("mixtral", "fsdp2", "bf16-mixed", "none", True, 8),
    ("mixtral", "dp2_ep2", "bf16-mixed", "block", False, 8),
    ("mixtral", "tp2_ep2", "32-true", "none", True, 8),
    ("deepseek-v3", "fsdp2_ep2", "bf16-mixed", "none", True, 8),
    ("deepseek-v3", "hybrid2_ep2", "32-true", "experts", True, 8),
    ("deepseek-v3", "tp2_ep4", "bf16-mixed", "block", True, 8),
    ("qwen2", "ep2", "bf16-mixed", "none", True, 8),
    ("qwen2", "tp2_ep2", "bf16-mixed", "none", False, 8),
    ("deepseek-v3", "tp2_ep4", "32-true", "none", True, 2),
]


@pytest.mark.parametrize(("name", "layout", "precision", "recompute", "reshard", "ranks_per_node"), CASES)
def test_figures(
    pools: Pools,
    name: str,
    layout: str,
    precision: Precision,
    recompute: Recompute,
    reshard: bool,
    ranks_per_node: int,
) -> None:
    config, case = config_of(name), LAYOUTS[layout]
    sizes, tokens = sizes_of(case), ROWS * LENGTH
    results = pools[case.world].run(measure, config, case, precision, recompute, reshard, ranks_per_node)
    units, _ = resolve_units(config, load_plan(case.plan), precision)
    at_rest = holdings(config, units, sizes, precision).whole.at_rest * FP32_BYTES
    held = {purpose: max(one[purpose] for one, _, _ in results) for purpose in ("parameters", "gradients", "optimizer")}
    buffers = count_buffers(config) * FP32_BYTES
    assert held == {"parameters": at_rest + buffers, "gradients": at_rest, "optimizer": 2 * at_rest}

    exchanges = list(expert_exchanges(config, sizes, tokens, precision, recompute, ranks_per_node))
    nodes = dataclasses.replace(find_gpu("h100"), gpus_per_node=ranks_per_node)
    between = sum(c.between_nodes(nodes) for c in exchanges)
    within = sum(c.sent for c in exchanges) - between
    for measured, expected in zip(zip(*(sent for _, sent, _ in results), strict=True), (within, between), strict=True):
        assert sum(measured) / len(results) == pytest.approx(expected, rel=0.01)

    planned: Counter[str] = Counter()
    for collective in (
        *exchanges,
        *parameter_gathers(units, sizes, precision, reshard),
        *gradient_reductions(units, sizes),
        *tensor_collectives(config, units, sizes, tokens, precision, recompute),
    ):
        if collective.group.size > 1:
            planned[OPERATIONS[collective.kind]] += int(collective.calls)
    if recompute == "block" and sizes.tensor > 1 and config.moe is not None:
        planned["all_reduce"] -= config.moe.first_k_dense  # the last sum of a dense block is not recomputed
    for _, _, calls in results:
        assert calls == planned


def saved_bytes(config: ModelConfig, layout: Layout, recompute: Recompute) -> int:
    """Bytes of activations that one rank saves in a forward pass; parameters stay gathered, to be told apart."""
    model, ids = spread(config, layout, ParallelOptions(recompute=recompute, reshard_after_forward=False))
    saved: dict[int, torch.UntypedStorage] = {}  # keeps them, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = storage_of(tensor)
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids)
    weights = {storage_of(parameter).data_ptr() for parameter in model.parameters()}
    return sum(storage.nbytes() for address, storage in saved.items() if address not in weights)


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


@pytest.mark.parametrize("recompute", ["none", "experts", "block"])
@pytest.mark.parametrize(("name", "layout"), [("mixtral", "fsdp2_ep2"), ("deepseek-v3", "tp2_ep4"), ("qwen2", "ep2")])
def test_activations(pools: Pools, name: str, layout: str, recompute: Recompute) -> None:
    """In fp32, within 5%."""
    config, case = config_of(name), LAYOUTS[layout]
    if config.mla is not None:  # the CPU's flash kernel is given values of the keys' size
        mla = dataclasses.replace(config.mla, v_head_dim=config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim)
        config = dataclasses.replace(config, mla=mla)
    results = pools[case.world].run(saved_bytes, config, case, recompute)
    layers = range(config.num_layers)
    blocks = sum(block_activations(config, layer, 4, sizes_of(case)).kept(recompute) for layer in layers)
    expected = ROWS * LENGTH * (blocks + 4 * 2 * config.hidden_size + 4)
    assert max(results) == pytest.approx(expected, rel=0.05)
