"""Plans and sizes: what is refused, and that every rule that ships is of use."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import MODELS, Layout, make_parallel
from pool import TIMEOUT, Pools, WorkerPool
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from zoo.config import MoEConfig
from zoo.config_reading import from_dict
from zoo.model import Decoder
from zoo.parallel.apply import check_sizes, parallelize
from zoo.parallel.expert_parallel import most_destinations
from zoo.parallel.mesh import MeshSizes, build_meshes
from zoo.parallel.plan import Plan, TensorRule, load_plan, plan_names, resolve
from zoo.parallel.torch_private import set_timeout, unflatten
from zoo.registry import find_spec, model_names


def on_meta(name: str) -> Decoder:
    with torch.device("meta"):
        return Decoder(MODELS[name])


def test_every_shipped_rule_matches_a_model_of_the_zoo() -> None:
    assert plan_names() == ["ddp", "ep", "ep_fsdp", "fsdp", "tp_ep_fsdp"]
    with torch.device("meta"):
        models = [Decoder(find_spec(name).model) for name in model_names() if name.endswith("-tiny")]
    moe = [model for model in models if model.config.moe]
    for name in plan_names():
        plan = load_plan(name)
        resolved = [resolve(plan, model) for model in (moe if plan.experts else models)]
        for rule in plan.tensor:
            alone = Plan(data=plan.data, units=plan.units, tensor=(rule,))
            if rule.optional:
                assert any(resolve(alone, model).tensor for model in models), rule
        assert all(r.units for r in resolved)


def plan_from(**fields: object) -> Plan:
    return from_dict(Plan, {"data": "shard", "units": ["layers.*"], **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"units": ["layer.*"]}, "'layer.*' matches no module"),
        ({"units": ["layers.*", "layers.0"]}, "'layers.0' is a unit twice"),
        ({"tensor": [{"modules": "layers.*.mixer.qkv", "style": "colwise"}]}, "'layers.*.mixer.qkv' matches no module"),
        (
            {
                "tensor": [
                    {"modules": "layers.*.mixer.{q_proj,k_proj}", "style": "colwise"},
                    {"modules": "layers.1.mixer.q_proj", "style": "rowwise"},
                ]
            },
            "'layers.1.mixer.q_proj.weight' is sharded twice, by 'layers.*.mixer.{q_proj,k_proj}' and by "
            "'layers.1.mixer.q_proj'",
        ),
        (
            {"experts": [{"parameters": "layers.*.ffn.experts.{gate_up,down}", "expert": 0, "shard": 0}]},
            "'layers.0.ffn.experts.gate_up' is sharded twice along dimension 0",
        ),
        (
            {"experts": [{"parameters": "layers.*.ffn.experts.down", "expert": 0, "shard": 3}]},
            "shard = 3: 'layers.0.ffn.experts.down' has 3 dimensions",
        ),
        (
            {"experts": [{"parameters": "layers.*.ffn.experts.down", "expert": 1, "shard": 2}]},
            "expert = 1: experts are stacked along dimension 0",
        ),
        ({"experts": [{"parameters": "experts", "expert": 0, "shard": 2}]}, "'experts' matches no parameter"),
        ({"tensor": [{"modules": "layers.*", "style": "diagonal"}]}, "'diagonal'"),
        ({"shards": 2}, "unknown key 'shards'"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(plan_from(**fields), on_meta("mixtral"))
    assert message in str(caught.value)


def test_experts_left_out_by_a_rule_are_refused() -> None:
    plan = plan_from(experts=[{"parameters": "layers.*.ffn.experts.down", "expert": 0, "shard": 2}])
    with pytest.raises(ValueError, match="gate_up"):
        resolve(plan, on_meta("mixtral"))


def test_an_optional_rule_may_match_nothing() -> None:
    rule = TensorRule(modules="layers.*.mixer.kv_a_proj", style="shared_key", optional=True)
    assert resolve(Plan(data="shard", units=("layers.*",), tensor=(rule,)), on_meta("mixtral")).tensor == {}


def test_a_dense_model_has_no_experts_to_spread() -> None:
    plan, model = load_plan("tp_ep_fsdp"), on_meta("dense")
    rules = resolve(plan, model)
    assert rules.experts == {} and rules.tensor["layers.0.ffn.down_proj"] == "rowwise"
    check_sizes(model.config, plan.sizes(4, tensor=2), rules)
    with pytest.raises(ValueError, match="expert = 2 ranks: the model has no experts to spread"):
        check_sizes(model.config, plan.sizes(4, tensor=2, expert=2), rules)
    with pytest.raises(ValueError, match="matches no parameter"):
        resolve(load_plan("ep_fsdp"), model)
    misspelt = [{"parameters": "layers.*.ffn.expert.{gate_up,down}", "expert": 0, "shard": 2, "optional": True}]
    with pytest.raises(ValueError, match="has no rule, but the plan is to spread experts"):
        resolve(plan_from(experts=misspelt), on_meta("mixtral"))


def test_a_plan_is_found_by_name_or_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: replicate\nunits: ['layers.*']\n")
    assert load_plan(path) == Plan(data="replicate", units=("layers.*",))
    with pytest.raises(ValueError, match="ep_fsdp"):
        load_plan("zero3")


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        ("fsdp", {"expert": 2}, "spreads no experts"),
        ("ep", {"tensor": 2}, "splits nothing"),
        ("tp_ep_fsdp", {"tensor": 3}, "tensor = 3: it must divide the 8 processes"),
        ("ep_fsdp", {"replicate": 3}, "replicate = 3: it must divide the 8 data ranks"),
        ("ep_fsdp", {"expert": 16}, "expert = 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(plan: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_plan(plan).sizes(8, **options)
    assert message in str(caught.value)


def test_the_expert_dimension_folds_over_tensor_then_data_ranks() -> None:
    plan = load_plan("tp_ep_fsdp")
    deepseek = plan.sizes(2048, tensor=8, expert=64)
    assert (deepseek.data, deepseek.expert_shard, deepseek.expert_replicate) == (256, 32, 1)
    hybrid = plan.sizes(64, tensor=2, expert=8, replicate=4)
    assert (hybrid.data_shard, hybrid.expert_shard, hybrid.expert_replicate) == (8, 2, 4)
    over_replicas = load_plan("ep").sizes(8, expert=4)
    assert (over_replicas.data_replicate, over_replicas.expert_shard, over_replicas.expert_replicate) == (8, 1, 2)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 64))
def test_both_views_have_all_ranks_of_a_stage(
    pipeline: int, replicate: int, shard: int, tensor: int, expert: int
) -> None:
    try:
        sizes = MeshSizes(pipeline=pipeline, data_replicate=replicate, data_shard=shard, tensor=tensor, expert=expert)
    except ValueError:
        return
    assert sizes.expert_replicate * sizes.expert_shard * sizes.expert == sizes.stage == replicate * shard * tensor
    assert sizes.world == pipeline * sizes.stage


def views() -> tuple[list[list[int]], list[int], list[int]]:
    meshes = build_meshes("cpu", MeshSizes(data_shard=2, tensor=2, expert=2))
    ranks = [meshes.data, meshes.tensor, meshes.expert]
    return [m.mesh.tolist() for m in ranks], list(meshes.dense.shape), list(meshes.sparse.shape)


def test_views_of_the_ranks(pools: Pools) -> None:
    results = pools[4].run(views)
    assert [r[0] for r in results] == [
        [[0, 2], [0, 1], [0, 1]],
        [[1, 3], [0, 1], [0, 1]],
        [[0, 2], [2, 3], [2, 3]],
        [[1, 3], [2, 3], [2, 3]],
    ]
    assert results[0][1:] == ([2, 2], [1, 2, 2])


def unflattened() -> tuple[list[list[int]], bool]:
    root = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    one, other = unflatten(root, (2, 2), ("a", "b")), unflatten(root, (4, 1), ("c", "d"))
    return one.mesh.tolist(), one["a"].size() == 2 and other["c"].size() == 4


def test_unflatten_gives_two_views_of_one_mesh(pools: Pools) -> None:
    assert pools[4].run(unflattened) == [([[0, 1], [2, 3]], True)] * 4


def wait_in_vain() -> float:
    """Seconds that rank 0 waits in a group of a mesh for rank 1, which does not come."""
    group = build_meshes("cpu", MeshSizes(data_shard=2)).data.get_group()
    set_timeout(timedelta(seconds=1))
    began = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(1), group=group)
    return time.monotonic() - began


def test_the_groups_of_a_mesh_have_the_timeout_of_the_run() -> None:
    pool = WorkerPool(2)  # of its own: its groups are broken afterwards
    try:
        seconds, _ = pool.run(wait_in_vain)
    finally:
        pool.close()
    assert 1 <= seconds < TIMEOUT


def wrong_world() -> str:
    with pytest.raises(ValueError) as caught:
        build_meshes("cpu", MeshSizes(data_shard=3))
    return str(caught.value)


def test_sizes_must_fill_the_world(pools: Pools) -> None:
    assert "the run has 2 processes" in pools[2].run(wrong_world)[0]


def misfit(name: str, layout: Layout) -> str:
    with pytest.raises(ValueError) as caught:
        make_parallel(name, layout)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        ("mixtral", Layout("tp_ep_fsdp", 4, tensor=4), "tensor = 4 ranks: num_kv_heads = 2"),
        ("gpt-oss", Layout("tp_ep_fsdp", 4, tensor=2), "tensor = 2 ranks: attention.sinks of all heads"),
        ("dense", Layout("ep", 4, expert=4), "'{layers,mtp}.*.ffn.experts.{gate_up,down}' matches no parameter"),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_refused(pools: Pools, model: str, layout: Layout, message: str) -> None:
    assert all(message in answer for answer in pools[4].run(misfit, model, layout))


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 4), st.data())
def test_no_token_reaches_more_ranks_than_node_limited_routing_allows(
    group_size: int, groups_log: int, top_groups: int, ranks_log: int, data: st.DataObject
) -> None:
    groups, ranks = 2**groups_log, 2**ranks_log
    num_experts = groups * group_size * 4
    if num_experts % ranks:
        return
    top_groups = min(top_groups + 1, groups)
    moe = MoEConfig(
        num_experts=num_experts,
        top_k=min(3, top_groups * group_size * 4),
        moe_intermediate_size=4,
        score_func="sigmoid",
        norm_topk_prob=True,
        num_groups=groups,
        top_k_groups=top_groups,
    )
    chosen_groups = data.draw(st.permutations(range(groups)))[:top_groups]
    size = num_experts // groups
    allowed = [g * size + i for g in chosen_groups for i in range(size)]
    experts = data.draw(st.permutations(allowed))[: moe.top_k]
    assert len({e // (num_experts // ranks) for e in experts}) <= most_destinations(moe, ranks)


def test_deepseek_v3_fits_its_ranks_without_any() -> None:
    """671B parameters, and 12B of MTP, in the layout of tp 8, ep 64 over 2,048 ranks that exist in name only."""
    dist.init_process_group("fake", store=FakeStore(), rank=1234, world_size=2048)
    try:
        plan = load_plan("tp_ep_fsdp")
        meshes = build_meshes("cpu", plan.sizes(2048, tensor=8, expert=64))
        with torch.device("meta"):
            model = Decoder(find_spec("deepseek-v3").model)
        parallelize(model, meshes, plan)
        local = {name: p.to_local().numel() for name, p in model.named_parameters()}
        whole = {name: p.numel() for name, p in model.named_parameters()}
    finally:
        dist.destroy_process_group()
    assert sum(count for name, count in whole.items() if not name.startswith("mtp.")) == 671_026_404_352
    for name in whole:
        if ".experts." in name:
            assert local[name] * 2048 == whole[name]
    # What tensor ranks hold copies of is 256 ways sharded: latent projections, embedding, head, routers.
    assert sum(local.values()) < 1.05 * sum(whole.values()) / 2048
