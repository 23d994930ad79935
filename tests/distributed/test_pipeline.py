"""A decoder in stages trains as one process does, alone and beside every other dimension."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, MODELS, PLAIN, Layout, Result, Run, meshes_of, snapshot, train_alone, train_parallel, whole
from pool import Pools, WorkerPool
from torch import Tensor, nn

from zoo.config import ModelConfig, ModelSpec
from zoo.families import expressible
from zoo.model import Decoder, build
from zoo.moe.balance import load_balance_loss, z_loss
from zoo.moe.router import Router, RouterOutput, update_selection_bias
from zoo.moe.stats import expert_counts
from zoo.parallel import init
from zoo.parallel.apply import ParallelOptions
from zoo.parallel.grads import all_finite, clip_gradients, global_norm, sum_over_data
from zoo.parallel.mesh import MeshSizes, build_meshes
from zoo.parallel.pipeline import Pipeline
from zoo.parallel.plan import load_plan
from zoo.parallel.stages import cut, forward_stage, layer_costs, split_layers
from zoo.parallel.weights import load_weights
from zoo.registry import find_spec, model_names
from zoo.weights import export_checkpoint, save_model

ROWS, LENGTH, STEPS = 4, 9, 3
Batch = dict[str, Tensor]
Settings = dict[str, Any]
"""Of ``Pipeline``."""
TWO: Settings = {"micro_batches": 2}

PP2 = Layout("fsdp", 2, pipeline=2)
PP2_FSDP2 = Layout("fsdp", 4, pipeline=2)
PP2_EP2 = Layout("ep_fsdp", 4, pipeline=2, expert=2)
PP2_TP2 = Layout("tp_ep_fsdp", 4, pipeline=2, tensor=2, expert=2)


def config_of(name: str) -> ModelConfig:
    return dataclasses.replace(MODELS[name], num_layers=4)


def batch(step: int, data_rank: int) -> Batch:
    """Packed documents of all lengths, padding before some and after others, labels that differ in number."""
    generator = torch.Generator().manual_seed(100 * step + data_rank)
    ids = torch.randint(37, (ROWS, LENGTH), generator=generator)
    documents = (torch.rand(ROWS, LENGTH, generator=generator) < 0.3).cumsum(1)
    mask = torch.ones_like(ids)
    mask[data_rank::3, :2] = 0
    mask[1, -2:] = 0
    labels = ids.roll(-1, 1).masked_fill(documents != documents.roll(-1, 1), -100).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "labels": labels, "document_ids": documents, "attention_mask": mask}


def likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def as_it_is(nll: Tensor) -> Tensor:
    return nll


def balance(outputs: Sequence[RouterOutput], micro: Mapping[str, Tensor]) -> Tensor:
    mask = micro["attention_mask"] != 0
    loss = 0.3 * load_balance_loss(outputs, mask) + 0.1 * z_loss(outputs, mask)
    return (micro["labels"] != -100).sum() * loss


def make_optimizer(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def update(optimizer: torch.optim.Optimizer, norm: Tensor, routers: list[Router], counts: Tensor) -> None:
    """Clip, step, and move the selection biases."""
    clip_gradients(optimizer.param_groups[0]["params"], 0.5, norm)
    optimizer.step()
    for router, count in zip(routers, counts, strict=True):
        if router.bias is not None:
            update_selection_bias(router.bias, count, 0.01)


@cache
def alone(name: str, data: int, micro_batches: int = 2) -> Result:
    """One process, all micro-batches one after the other."""
    model = build(config_of(name), seed=3, dtype=torch.float64)
    optimizer = make_optimizer(model.parameters())
    routers = [m for m in model.modules() if isinstance(m, Router)]
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        batches = [batch(step, rank) for rank in range(data)]
        labels = torch.stack([(b["labels"] != -100).sum() for b in batches]).sum()
        total, counts = 0.0, torch.zeros(len(routers), 8, dtype=torch.int64)
        for rows in torch.arange(ROWS).chunk(micro_batches):
            for micro in ({key: tensor[rows] for key, tensor in b.items()} for b in batches):
                mask = micro["attention_mask"]
                out = model(micro["input_ids"], mask, document_ids=micro["document_ids"])
                loss = likelihood(out.logits, micro["labels"])
                if routers:
                    loss = loss + balance(out.router_outputs, micro)
                    counts += torch.stack([expert_counts(o, mask != 0) for o in out.router_outputs])
                (loss / labels).backward()
                total += loss.item() / labels.item()
        norm = global_norm(model.parameters())
        update(optimizer, norm, routers, counts)
        losses.append(total)
        norms.append(norm.item())
    return {"loss": np.array(losses), "norm": np.array(norms)} | snapshot(model, optimizer)


def make(
    name: str, layout: Layout, pipeline: Settings, options: ParallelOptions = PLAIN, dtype: torch.dtype = torch.float64
) -> Pipeline:
    with torch.device("meta"):
        model = Decoder(config_of(name)).to(dtype)
    made = Pipeline(model, meshes_of(layout), load_plan(layout.plan), options, **pipeline)
    for stage in made.stages.values():
        init.initialize(stage.to_empty(device="cpu"), seed=3)
    return made


def train(
    name: str,
    layout: Layout,
    settings: Settings = TWO,
    options: ParallelOptions = PLAIN,
    dtype: torch.dtype = torch.float64,
) -> Result:
    """On one rank: losses and norms of all, and everything else of its own stages."""
    pipeline, meshes = make(name, layout, settings, options, dtype), meshes_of(layout)
    optimizer = make_optimizer(pipeline.parameters())
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        rows = batch(step, meshes.data.get_local_rank())
        labels = sum_over_data((rows["labels"] != -100).sum(), meshes)
        result = pipeline.step(rows, lambda nll, n=labels: nll / n, lambda o, micro, n=labels: balance(o, micro) / n)
        norm = global_norm(pipeline.parameters(), meshes.pipeline)
        update(optimizer, norm, pipeline.routers(), sum_over_data(result.expert_counts, meshes))
        losses.append(sum_over_data(result.loss, meshes).item())
        norms.append(norm.item())
    held = {"loss": np.array(losses), "norm": np.array(norms)}
    for stage in pipeline.stages.values():
        held |= snapshot(stage, optimizer)
    return held


def check(pools: Pools, name: str, layout: Layout, settings: Settings = TWO, options: ParallelOptions = PLAIN) -> None:
    """Every rank has the loss and norm of one process, and the stages together everything that it has."""
    expected = alone(name, layout.data, settings["micro_batches"])
    found: set[str] = set()
    for result in pools[layout.world].run(train, name, layout, settings, options):
        for key, values in result.items():
            np.testing.assert_allclose(values, expected[key], rtol=1e-10, atol=1e-10, err_msg=key)
        assert result.keys() < expected.keys()
        found |= result.keys()
    assert found == expected.keys()


@pytest.mark.parametrize("layout", [PP2, PP2_FSDP2, PP2_EP2, PP2_TP2], ids=["pp2", "pp2_fsdp2", "pp2_ep2", "pp2_tp2"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_stages_train_as_one_process(pools: Pools, name: str, layout: Layout) -> None:
    check(pools, name, layout)


def train_after_stages(name: str) -> Result:
    """In a layout whose tensor mesh is equal to that of the stages, which know other shapes on each rank."""
    train(name, PP2_TP2)
    return train_parallel(Run(name, steps=2), LAYOUTS["tp2_ep2"])


def test_a_process_may_use_one_layout_after_the_other() -> None:
    pool = WorkerPool(4)
    try:
        results = pool.run(train_after_stages, "deepseek-v3")
    finally:
        pool.close()
    expected = train_alone(Run("deepseek-v3", steps=2), LAYOUTS["tp2_ep2"].data)
    for result in results:
        for key, values in expected.items():
            np.testing.assert_allclose(result[key], values, rtol=1e-10, atol=1e-10, err_msg=key)


INTERLEAVED: Settings = {"schedule": "interleaved_1f1b", "stages_per_rank": 2}
"""With four layers, the first stage of deepseek-v3 is dense and the others are not."""


@pytest.mark.parametrize("schedule", [{"schedule": "gpipe"}, INTERLEAVED], ids=["gpipe", "interleaved"])
@pytest.mark.parametrize("layout", [PP2, PP2_FSDP2, PP2_EP2], ids=["pp2", "pp2_fsdp2", "pp2_ep2"])
def test_schedules(pools: Pools, layout: Layout, schedule: Settings) -> None:
    check(pools, "deepseek-v3", layout, {"micro_batches": 4, **schedule})


def test_dense_models_and_four_stages(pools: Pools) -> None:
    check(pools, "dense", Layout("fsdp", 4, pipeline=4), {"micro_batches": 4})


def test_recomputed_activations_are_counted_once(pools: Pools) -> None:
    options = ParallelOptions(recompute="block", reshard_after_forward=False)
    check(pools, "deepseek-v3", PP2_EP2, options=options)


def test_a_dense_stage_has_no_capacity(pools: Pools) -> None:
    """E / K is room for all tokens at one expert: nothing is dropped."""
    options = ParallelOptions(capacity_factor=8 / 3)
    check(pools, "deepseek-v3", PP2_EP2, {"micro_batches": 2, **INTERLEAVED}, options)


def test_half_precision_travels_as_such(pools: Pools) -> None:
    options = ParallelOptions(param_dtype=torch.bfloat16)
    for result in pools[4].run(train, "mixtral", PP2_EP2, TWO, options, torch.float32):
        np.testing.assert_allclose(result["loss"], alone("mixtral", 2)["loss"], rtol=0.02)


def twice(layout: Layout) -> bool:
    pipeline, rows = make("mixtral", layout, TWO), batch(0, 0)
    gradients = []
    for _ in range(2):
        pipeline.step(rows, as_it_is, balance)
        gradients.append([whole(p.grad) for p in pipeline.parameters()])
    return all(np.allclose(2 * one, two, rtol=1e-12, atol=0) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("layout", [PP2, PP2_EP2], ids=["pp2", "pp2_ep2"])
def test_gradients_of_batches_add_up(pools: Pools, layout: Layout) -> None:
    assert all(pools[layout.world].run(twice, layout))


def poisoned(rank: int) -> list[bool]:
    """Before and after one rank's gradient gets a NaN."""
    pipeline, meshes = make("mixtral", PP2_EP2, TWO), meshes_of(PP2_EP2)
    pipeline.step(batch(0, meshes.data.get_local_rank()), as_it_is)
    finite = [all_finite(global_norm(pipeline.parameters(), meshes.pipeline))]
    if torch.distributed.get_rank() == rank:
        next(pipeline.parameters()).grad.to_local().fill_(torch.nan)
    return [*finite, all_finite(global_norm(pipeline.parameters(), meshes.pipeline))]


def test_all_stages_agree_that_a_gradient_is_not_finite(pools: Pools) -> None:
    assert pools[4].run(poisoned, 3) == [[True, False]] * 4


# ---------------------------------------------------------------------------------------------------------------
# Mesh and cuts
# ---------------------------------------------------------------------------------------------------------------


def views() -> tuple[list[list[int]], list[int]]:
    meshes = build_meshes("cpu", MeshSizes(pipeline=2, data_shard=2, expert=2))
    ranks = [meshes.pipeline, meshes.data, meshes.tensor, meshes.expert]
    return [mesh.mesh.tolist() for mesh in ranks], list(meshes.sparse.shape)


def test_each_stage_has_views_of_its_own(pools: Pools) -> None:
    assert pools[4].run(views) == [
        ([[0, 2], [0, 1], [0], [0, 1]], [1, 1, 2]),
        ([[1, 3], [0, 1], [1], [0, 1]], [1, 1, 2]),
        ([[0, 2], [2, 3], [2], [2, 3]], [1, 1, 2]),
        ([[1, 3], [2, 3], [3], [2, 3]], [1, 1, 2]),
    ]


def test_experts_fold_within_a_stage() -> None:
    sizes = load_plan("ep_fsdp").sizes(64, pipeline=4, expert=8)
    assert (sizes.world, sizes.stage, sizes.data, sizes.expert_shard, sizes.expert_replicate) == (64, 16, 16, 2, 1)
    with pytest.raises(ValueError, match="expert = 32: it folds over data_shard"):
        load_plan("ep_fsdp").sizes(64, pipeline=4, expert=32)
    with pytest.raises(ValueError, match="pipeline = 3: it must divide the 64 processes"):
        load_plan("ep_fsdp").sizes(64, pipeline=3)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 8))
def test_no_cut_has_a_cheaper_dearest_stage(costs: list[int], stages: int) -> None:
    if stages > len(costs):
        with pytest.raises(ValueError, match=f"{stages} stages of {len(costs)} layers"):
            split_layers(costs, stages)
        return
    parts = split_layers(costs, stages)
    assert [layer for part in parts for layer in part] == list(range(len(costs)))
    assert len(parts) == stages and all(parts)
    dearest = min(
        max(sum(costs[a:b]) for a, b in zip((0, *ends), (*ends, len(costs)), strict=True))
        for ends in combinations(range(1, len(costs)), stages - 1)
    )
    assert max(sum(costs[layer] for layer in part) for part in parts) == dearest


def test_the_output_head_costs_the_last_stage_layers() -> None:
    """DeepSeek-V3 in 16 stages: 61 layers, three of them dense, and a head as dear as one and a half layers."""
    costs = layer_costs(find_spec("deepseek-v3").model, 4096)
    parts = split_layers(costs, 16)
    dear = [sum(costs[layer] for layer in part) for part in parts]
    assert len(parts[-1]) < 4
    assert max(dear) < 1.06 * sum(costs) / 16


@pytest.mark.parametrize("name", [name for name in model_names() if name.endswith("-tiny")])
def test_one_stage_after_the_other_computes_what_the_decoder_does(name: str) -> None:
    """Of every family: what a decoder learns to do, its stages must do as well."""
    model, rows = build(find_spec(name).model, seed=1), batch(0, 0)
    parts = split_layers(layer_costs(model.config, 64), 2)
    if model.config.tie_word_embeddings:
        with pytest.raises(ValueError, match="tie_word_embeddings = true"):
            cut(model, parts[0])
        return
    x, routing = rows.pop("input_ids"), []
    expected = model(x, rows["attention_mask"], document_ids=rows["document_ids"])
    for layers in parts:
        x = forward_stage(cut(copy.deepcopy(model), layers), lambda outputs, _: routing.extend(outputs), x, **rows)
    torch.testing.assert_close(x, likelihood(expected.logits, rows["labels"]))
    assert [r.experts.tolist() for r in routing] == [r.experts.tolist() for r in expected.router_outputs]


# ---------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------


def loaded(source: Path) -> Result:
    pipeline = make("deepseek-v3", PP2_EP2, TWO, dtype=torch.float32)
    for stage in pipeline.stages.values():
        load_weights(stage, source)
    return {name: whole(tensor) for name, tensor in pipeline.state_dict().items()}


@pytest.mark.parametrize("published", [False, True], ids=["zoo", "published"])
def test_each_stage_loads_its_part_of_a_checkpoint(pools: Pools, tmp_path: Path, published: bool) -> None:
    config = config_of("deepseek-v3")
    model = build(config, seed=8)
    nn.init.normal_(model.layers[1].ffn.router.bias)
    save_model(model, ModelSpec(name="tiny", family=expressible(config), model=config), tmp_path / "zoo")
    export_checkpoint(tmp_path / "zoo", tmp_path / "published")
    state: Result = {}
    for held in pools[4].run(loaded, tmp_path / ("published" if published else "zoo")):
        state |= held
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(np.array_equal(state[name], tensor.numpy()) for name, tensor in expected.items())


def saved(path: Path) -> None:
    dcp.save(make("deepseek-v3", PP2_EP2, TWO).state_dict(), checkpoint_id=path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_stages_make_one_sharded_checkpoint(pools: Pools, tmp_path: Path) -> None:
    pools[4].run(saved, tmp_path)
    expected = build(config_of("deepseek-v3"), seed=3, dtype=torch.float64).state_dict()
    read = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    dcp.load(read, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


# ---------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------


def refused(name: str, settings: Settings, rows: tuple[int, ...] = ()) -> str:
    with pytest.raises(ValueError) as caught:
        pipeline = make(name, PP2, settings)
        for count in rows:
            pipeline.step({key: tensor[:count] for key, tensor in batch(0, 0).items()}, as_it_is)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "rows", "message"),
    [
        ("qwen3", TWO, (), "tie_word_embeddings = true"),
        ("mixtral", {"micro_batches": 1}, (), "micro_batches = 1: give 2 or more with schedule 1f1b on 2 stages"),
        ("mixtral", {"micro_batches": 3, **INTERLEAVED}, (), "micro_batches = 3: give a multiple of 2"),
        ("mixtral", {**TWO, "stages_per_rank": 2}, (), "stages_per_rank = 2: give 1 with schedule 1f1b"),
        ("mixtral", {**TWO, **INTERLEAVED, "stages_per_rank": 3}, (), "6 stages of 4 layers: give 1 to 4 stages"),
        ("mixtral", TWO, (3,), "micro_batches = 2: it must divide the 3 rows of a batch"),
        ("mixtral", TWO, (4, 2), "batch of (2, 9) ids: the first had (4, 9); keep to one shape"),
    ],
)
def test_refusals(pools: Pools, name: str, settings: Settings, rows: tuple[int, ...], message: str) -> None:
    for answer in pools[2].run(refused, name, settings, rows):
        assert message in answer and "\n" not in answer
