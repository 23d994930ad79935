"""Weights in and out of layouts: initial values, slices of checkpoints, and exports byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, MODELS, Layout, Result, make_parallel, whole
from pool import Pools

from zoo.config import ModelSpec
from zoo.families import expressible, get_family
from zoo.model import build
from zoo.parallel.torch_private import local_slices
from zoo.parallel.weights import export, load_weights, save_model
from zoo.weights import export_checkpoint
from zoo.weights import save_model as save_alone
from zoo.weights.convert import parameter_shapes

FOUR = [name for name, layout in LAYOUTS.items() if layout.world == 4]


def spec_of(name: str) -> ModelSpec:
    return ModelSpec(name=name, family=expressible(MODELS[name]), model=MODELS[name])


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def initial_state(name: str, layout: Layout, meta: bool) -> Result:
    model, _ = make_parallel(name, layout, torch.float32, meta=meta)
    for parameter in model.parameters():  # what a slice claims to be is what DTensor gathers it to
        assert np.array_equal(whole(parameter)[local_slices(parameter)], parameter.to_local().detach().numpy())
    return {key: whole(tensor) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("layout", ["tp2_ep2", "fsdp2_ep2", "hybrid2_ep2"])
@pytest.mark.parametrize("model", ["deepseek-v3", "qwen3"])
@pytest.mark.parametrize("meta", [True, False], ids=["meta", "whole"])
def test_initial_weights_are_bit_equal_in_every_layout(pools: Pools, model: str, layout: str, meta: bool) -> None:
    expected = build(MODELS[model], seed=3).state_dict()
    for state in pools[4].run(initial_state, model, LAYOUTS[layout], meta):
        assert state.keys() == expected.keys()
        assert all(np.array_equal(state[key], tensor.numpy()) for key, tensor in expected.items())


def loaded_state(name: str, layout: Layout, source: Path) -> Result:
    model, _ = make_parallel(name, layout, torch.float32)
    load_weights(model, source)
    return {key: whole(tensor) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("published", [False, True], ids=["zoo", "published"])
@pytest.mark.parametrize("layout", FOUR)
def test_each_rank_loads_its_slices(pools: Pools, tmp_path: Path, layout: str, published: bool) -> None:
    name = "deepseek-v3"
    model = build(MODELS[name], seed=8)
    torch.nn.init.normal_(model.layers[1].ffn.router.bias)
    save_alone(model, spec_of(name), tmp_path / "zoo", max_shard_bytes=4000)
    export_checkpoint(tmp_path / "zoo", tmp_path / "published", max_shard_bytes=4000)
    source = tmp_path / ("published" if published else "zoo")
    expected = model.state_dict()
    for state in pools[4].run(loaded_state, name, LAYOUTS[layout], source):
        assert all(np.array_equal(state[key], tensor.numpy()) for key, tensor in expected.items())


def load_error(name: str, layout: Layout, source: Path) -> str:
    model, _ = make_parallel(name, layout, torch.float32)
    with pytest.raises(ValueError) as caught:
        load_weights(model, source)
    return str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(pools: Pools, tmp_path: Path) -> None:
    save_alone(build(MODELS["qwen2"]), spec_of("qwen2"), tmp_path / "other")
    for message in pools[2].run(load_error, "mixtral", LAYOUTS["ep2"], tmp_path / "other"):
        assert "another architecture" in message


def write_both(name: str, layout: Layout, directory: Path) -> None:
    model, _ = make_parallel(name, layout, torch.float32)
    save_model(model, spec_of(name), directory / "zoo", max_shard_bytes=20_000)
    export(model, spec_of(name), directory / "published", max_shard_bytes=20_000)


@pytest.mark.parametrize("layout", ["fsdp2_ep2", "tp2_ep2", "hybrid2_ep2"])
@pytest.mark.parametrize("model", ["deepseek-v3", "qwen2"])
def test_files_are_those_of_one_process(pools: Pools, tmp_path: Path, model: str, layout: str) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    save_alone(build(MODELS[model], seed=3), spec_of(model), alone / "zoo", max_shard_bytes=20_000)
    export_checkpoint(alone / "zoo", alone / "published", max_shard_bytes=20_000)
    pools[4].run(write_both, model, LAYOUTS[layout], together)
    for kind in ("zoo", "published"):
        assert len(files(alone / kind)) > 3
        assert files(together / kind) == files(alone / kind)


def export_error(layout: Layout, directory: Path) -> str:
    model, _ = make_parallel("qwen2", layout, torch.float32)
    with pytest.raises(ValueError) as caught:
        save_model(model, spec_of("qwen2"), directory)
    return str(caught.value)


def test_all_ranks_raise_what_the_writing_rank_raises(pools: Pools, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    for message in pools[2].run(export_error, LAYOUTS["ep2"], tmp_path):
        assert "not a zoo checkpoint" in message


@settings(deadline=None)
@given(st.sampled_from(["per_expert", "fused"]), st.data())
def test_a_box_of_a_parameter_is_made_of_its_own_numbers_only(layout: str, data: st.DataObject) -> None:
    config = MODELS["deepseek-v3"]
    shapes = parameter_shapes(config)
    ops = get_family("deepseek_v3").weight_map(config, layout)
    op = data.draw(st.sampled_from([op for op in ops if len(shapes[op.targets[0]]) > 1]))
    shape = shapes[op.targets[0]]
    sources = {name: torch.randn(op.source_shape(shape)) for name in op.sources}
    ((_, full),) = op.to_zoo(sources.__getitem__)
    region = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        region.append(slice(start, data.draw(st.integers(start + 1, size))))
    read = []

    def read_region(name: str, box: tuple[slice, ...]) -> torch.Tensor:
        read.append(sources[name][box].numel())
        return sources[name][box]

    part = op.region_to_zoo(op.targets[0], tuple(region), shape, read_region)
    assert torch.equal(part, full[tuple(region)])
    assert sum(read) == part.numel()
