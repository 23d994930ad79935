"""Upcycling: what the first forward is, what noise and drop change, and that what comes out trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from zoo.cli.main import main
from zoo.config import ModelSpec, MoEConfig, load_spec, save_spec
from zoo.config_routing import RoutingConfig, TemperatureConfig
from zoo.model import Decoder, build
from zoo.moe.layer import MoE
from zoo.registry import find_spec
from zoo.tokenizer import Tokenizer
from zoo.upcycle import Recipe, derive, layout, upcycle
from zoo.weights import load, save_model

WIDTH = 48
"""Of the dense FFN."""

SPARSE = MoEConfig(num_experts=8, top_k=2, moe_intermediate_size=WIDTH, score_func="softmax", norm_topk_prob=True)


def dense_spec(name: str) -> ModelSpec:
    """The tiny model ``name``, tinier, and with weights that make large logits."""
    spec = find_spec(name)
    config = replace(spec.model, vocab_size=61, hidden_size=32, num_layers=2, intermediate_size=WIDTH)
    assert config.attention
    attention = replace(config.attention, num_heads=4, num_kv_heads=2, head_dim=8)
    return replace(spec, name="dense", model=replace(config, attention=attention, initializer_range=0.3))


def dense_checkpoint(directory: Path, name: str = "llama-tiny", dtype: torch.dtype = torch.float32) -> Path:
    spec = dense_spec(name)
    save_model(build(spec.model, seed=1, dtype=dtype), spec, directory / "dense")
    return directory / "dense"


def sparse_spec(moe: MoEConfig, name: str = "llama-tiny") -> ModelSpec:
    spec = dense_spec(name)
    return replace(spec, name="sparse", family=None, model=replace(spec.model, moe=moe))


@torch.no_grad()
def difference(dense: Path, sparse: Path, dtype: torch.dtype = torch.float64) -> float:
    """Largest difference of logits, as a part of the largest logit."""
    tokens = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(5))
    expected, logits = (load(path, dtype=dtype)(tokens).logits for path in (dense, sparse))
    return float((logits - expected).abs().max() / expected.abs().max())


def moe_layers(model: Decoder) -> list[MoE]:
    return [block.ffn for block in model.layers if isinstance(block.ffn, MoE)]


EXACT = {
    "copies": {"experts": 8},
    "fine-grained": {"experts": 4, "granularity": 4},
    "one copy of each part": {"experts": 8, "top_k": 1, "granularity": 2},
    "some parts shared": {"experts": 4, "granularity": 4, "shared": 1},
    "all parts shared, too": {"experts": 4, "granularity": 2, "shared": 2},
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama-tiny", kind) for kind in EXACT),
        *((name, "some parts shared") for name in ("qwen2-tiny", "olmo2-tiny", "gemma2-tiny")),
    ],
)
def test_the_first_forward_equals_the_dense_models(tmp_path: Path, name: str, kind: str) -> None:
    dense = dense_checkpoint(tmp_path, name)
    target = derive(load_spec(dense / "zoo.yaml"), **EXACT[kind])
    result = upcycle(dense, target, tmp_path / "sparse")
    assert result.inexact is None
    assert result.difference is not None and result.difference <= 1e-5
    assert difference(dense, tmp_path / "sparse", torch.float32) <= 1e-5


@torch.no_grad()
def test_a_trained_model_with_eight_experts_reads_a_text_as_the_dense_one(tmp_path: Path, shared_data: Path) -> None:
    dense = shared_data / "models" / "stories260K_hf"
    upcycle(dense, derive(find_spec(dense), experts=8), tmp_path / "sparse", check=False)
    text = (shared_data / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")[:4000]
    tokens = torch.tensor(Tokenizer.load(tmp_path / "sparse").encode(text, bos=True)[:512])
    for dtype, tolerance in (
        (torch.float64, 1e-9),
        (torch.float32, 1e-5 * 20),
    ):  # of fp32, as part of the largest logit
        expected, logits = (load(path, dtype=dtype)(tokens[None]).logits for path in (dense, tmp_path / "sparse"))
        assert expected.abs().max() > 20
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
        losses = [F.cross_entropy(out[0, :-1], tokens[1:]) for out in (expected, logits)]
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)


def test_a_factor_that_half_precision_rounds_is_said_and_can_go_into_the_config(tmp_path: Path) -> None:
    dense = dense_checkpoint(tmp_path, dtype=torch.bfloat16)
    target = derive(load_spec(dense / "zoo.yaml"), experts=4, granularity=4, shared=1)
    result = upcycle(dense, target, tmp_path / "sparse")
    assert result.inexact is not None and "times 3 are rounded to bfloat16; moe.routed_scaling_factor = 3 would" in (
        result.inexact
    )
    assert result.difference is not None and result.difference > 1e-3
    assert target.model.moe is not None
    kept = replace(target.model, moe=replace(target.model.moe, routed_scaling_factor=3.0))
    result = upcycle(dense, replace(target, model=kept), tmp_path / "kept")
    assert result.inexact is None
    assert result.difference is not None and result.difference <= 1e-5


PARTS = {"moe_intermediate_size": WIDTH // 4, "num_experts": 16, "top_k": 8}
EXACT_CONFIGS = {
    "sigmoid, bias, groups, factor": replace(
        SPARSE, **PARTS, score_func="sigmoid", router_bias=True, routed_scaling_factor=2.5, num_groups=4, top_k_groups=2
    ),
    "groups smaller than a virtual group": replace(SPARSE, **PARTS, num_groups=8, top_k_groups=5),
    "router with a trained bias": replace(SPARSE, router_logit_bias=True),
    "gated shared expert": replace(SPARSE, num_shared_experts=1, shared_expert_gate=True),
    "two parts of four shared": replace(SPARSE, **PARTS, num_shared_experts=2),
    "every second layer": replace(SPARSE, layer_interval=2),
    "the first layer dense": replace(SPARSE, first_k_dense=1),
    "noise, jitter, dropout and capacity, while training": replace(
        SPARSE,
        expert_dropout=0.1,
        routing=RoutingConfig(noise=True, jitter=0.1, router_dropout=0.1, capacity_factor=1.0),
    ),
    "balanced plans while training, annealed": replace(
        SPARSE, routing=RoutingConfig(choice="sinkhorn", temperature=TemperatureConfig(start=2.0, end=1.0, steps=10))
    ),
    "hash, which takes neighbours": replace(
        SPARSE, **PARTS, norm_topk_prob=False, routing=RoutingConfig(choice="hash")
    ),
    "all experts, not normalised": replace(SPARSE, top_k=8, norm_topk_prob=False),
}


@pytest.mark.parametrize("kind", EXACT_CONFIGS)
def test_a_given_config_with_constant_weights_is_exact(tmp_path: Path, kind: str) -> None:
    dense = dense_checkpoint(tmp_path)
    result = upcycle(dense, sparse_spec(EXACT_CONFIGS[kind]), tmp_path / "sparse")
    assert result.inexact is None
    assert result.difference is not None and result.difference <= 1e-5


INEXACT = {
    "norm_topk_prob = False": replace(SPARSE, norm_topk_prob=False),
    "top_k = 6 is no multiple of the 4 parts": replace(SPARSE, **(PARTS | {"top_k": 6})),
    "num_groups = 4 cuts through": replace(SPARSE, **(PARTS | {"num_experts": 24}), num_groups=4, top_k_groups=2),
    "eval_capacity_factor = 0.5": replace(SPARSE, routing=RoutingConfig(eval_capacity_factor=0.5)),
    "choice = expert": replace(SPARSE, norm_topk_prob=False, routing=RoutingConfig(choice="expert")),
    "scaled_input = True": replace(SPARSE, top_k=1, norm_topk_prob=False, scaled_input=True),
}


@pytest.mark.parametrize("reason", INEXACT)
def test_what_cannot_be_exact_is_said_and_measured(tmp_path: Path, reason: str) -> None:
    dense = dense_checkpoint(tmp_path)
    result = upcycle(dense, sparse_spec(INEXACT[reason]), tmp_path / "sparse")
    assert result.inexact is not None and reason in result.inexact
    assert result.difference is not None and result.difference > 1e-3


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_weights_that_are_not_normalised_are_exact_for_a_router_without_an_opinion(
    tmp_path: Path, score_func: str
) -> None:
    dense = dense_checkpoint(tmp_path)
    moe = replace(SPARSE, norm_topk_prob=False, score_func=score_func, routed_scaling_factor=1.5)
    target = sparse_spec(moe)
    quiet = replace(target, model=replace(target.model, initializer_range=1e-8))
    upcycle(dense, quiet, tmp_path / "sparse", check=False)
    assert difference(dense, tmp_path / "sparse") <= 1e-6


@torch.no_grad()
def test_experts_of_a_virtual_group_hold_all_parts_and_have_one_row_of_the_router(tmp_path: Path) -> None:
    dense = dense_checkpoint(tmp_path)
    upcycle(dense, derive(load_spec(dense / "zoo.yaml"), experts=3, granularity=4, shared=1), tmp_path / "sparse")
    ffn = load(dense).layers[1].ffn
    moe = moe_layers(load(tmp_path / "sparse"))[1]
    assert moe.shared_experts is not None and moe.experts.gate_up.shape == (9, 2, 12, 32)
    rows = moe.router.weight.unflatten(0, (3, 3))
    assert (rows == rows[:, :1]).all() and len(moe.router.weight.unique(dim=0)) == 3
    for group in range(3):
        mine = slice(3 * group, 3 * group + 3)
        gates = torch.cat((moe.shared_experts.gate_proj.weight, moe.experts.gate_up[mine, 0].flatten(0, 1)))
        assert torch.equal(gates, ffn.gate_proj.weight)
        downs = torch.cat((moe.shared_experts.down_proj.weight, *(moe.experts.down[mine] / 3)), dim=1)
        torch.testing.assert_close(downs, ffn.down_proj.weight)


@torch.no_grad()
def test_drop_draws_a_part_of_the_hidden_units_anew_with_their_statistics(tmp_path: Path) -> None:
    spec = dense_spec("llama-tiny")
    spec = replace(spec, model=replace(spec.model, intermediate_size=400, hidden_size=64, num_layers=1))
    model = build(spec.model, seed=1)
    for weight in model.layers[0].ffn.parameters():
        weight.add_(0.5)  # a mean to be found again
    save_model(model, spec, tmp_path / "dense")
    upcycle(tmp_path / "dense", derive(spec, experts=4), tmp_path / "sparse", Recipe(drop=0.3), check=False)
    ffn, moe = model.layers[0].ffn, moe_layers(load(tmp_path / "sparse"))[0]
    dropped = []
    for expert in range(4):
        gate, up = moe.experts.gate_up[expert]
        mine = (gate != ffn.gate_proj.weight).all(dim=1)
        dropped.append(mine)
        assert mine.sum() == 120
        for new, old in ((gate, ffn.gate_proj.weight), (up, ffn.up_proj.weight), (moe.experts.down[expert].T, None)):
            old = ffn.down_proj.weight.T if old is None else old
            assert torch.equal(new[~mine], old[~mine]) and not (new[mine] == old[mine]).any()
            assert float(new[mine].mean()) == pytest.approx(0.5, abs=0.02)
            assert float(new[mine].std()) == pytest.approx(float(old[mine].std()), rel=0.03)
    assert len(torch.stack(dropped).unique(dim=0)) == 4


@torch.no_grad()
def test_noise_is_in_units_of_each_matrix_and_another_for_every_expert(tmp_path: Path) -> None:
    dense = dense_checkpoint(tmp_path)
    target = derive(load_spec(dense / "zoo.yaml"), experts=4, top_k=2)
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        upcycle(dense, target, tmp_path / name, Recipe(noise=0.1, seed=seed), check=False)
    gate = load(dense).layers[0].ffn.gate_proj.weight
    one, again, other = (load(tmp_path / name).state_dict() for name in ("one", "again", "other"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    noise = one["layers.0.ffn.experts.gate_up"][:, 0] - gate
    assert float(noise.std() / gate.std()) == pytest.approx(0.1, rel=0.05)
    flat = noise.flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 0.1
    assert not torch.equal(one["layers.0.ffn.router.weight"], other["layers.0.ffn.router.weight"])
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {name for name in one if ".router." in name or ".experts." in name}


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(noise=0.05), Recipe(drop=0.5)], ids=str)
def test_it_trains_every_expert_and_the_router(tmp_path: Path, recipe: Recipe) -> None:
    dense = dense_checkpoint(tmp_path)
    upcycle(dense, derive(load_spec(dense / "zoo.yaml"), experts=4, granularity=2), tmp_path / "sparse", recipe)
    model = load(tmp_path / "sparse").train()
    tokens = torch.randint(61, (8, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss() -> Tensor:
        return F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    before = loss()
    before.backward()
    for moe in moe_layers(model):
        for weight in (moe.router.weight, *moe.experts.parameters()):
            assert weight.grad is not None and (weight.grad.flatten(1).norm(dim=1) > 0).all()
    optimizer.step()
    assert loss() < before


def test_plain_copies_teach_the_router_only_after_the_first_step(tmp_path: Path) -> None:
    """Σ weights · same output does not depend on the weights until experts differ."""
    dense = dense_checkpoint(tmp_path)
    upcycle(dense, derive(load_spec(dense / "zoo.yaml"), experts=4), tmp_path / "sparse", check=False)
    model = load(tmp_path / "sparse", dtype=torch.float64).train()
    tokens = torch.randint(61, (8, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sizes = []
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        grads = [moe.router.weight.grad for moe in moe_layers(model)]
        sizes.append([float(grad.norm()) for grad in grads if grad is not None])
        optimizer.step()
    assert max(sizes[0]) < 1e-12 and min(sizes[1]) > 1e-6


def test_half_precision_stays_and_the_selection_bias_is_fp32(tmp_path: Path) -> None:
    dense = dense_checkpoint(tmp_path, dtype=torch.bfloat16)
    moe = EXACT_CONFIGS["sigmoid, bias, groups, factor"]
    upcycle(dense, sparse_spec(moe), tmp_path / "sparse", check=False, max_shard_bytes=30_000)
    dtypes = {}
    for path in (tmp_path / "sparse").glob("model-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            dtypes |= {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 no mapping
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        f"layers.{layer}.ffn.router.bias" for layer in (0, 1)
    }
    assert {dtype for dtype in dtypes.values() if dtype != torch.float32} == {torch.bfloat16}


MISFITS = {
    "no moe block": None,
    "moe.moe_intermediate_size = 20: it must divide the dense model's intermediate_size = 48": replace(
        SPARSE, moe_intermediate_size=20
    ),
    "moe.num_experts = 6: give a multiple of the 4 parts": replace(SPARSE, **(PARTS | {"num_experts": 6, "top_k": 4})),
    "moe.num_shared_experts = 2: the dense FFN has only 1 parts": replace(SPARSE, num_shared_experts=2),
    "moe.swiglu_limit = 7.0": replace(SPARSE, swiglu_limit=7.0),
}


@pytest.mark.parametrize("message", MISFITS)
def test_experts_that_do_not_fit_are_refused(message: str) -> None:
    dense = dense_spec("llama-tiny").model
    with pytest.raises(ValueError, match=message):
        layout(dense, replace(dense, moe=MISFITS[message]))


OTHERS = {
    "hidden_size = 16: the dense model has 32": {"hidden_size": 16},
    "num_layers = 3: the dense model has 2": {"num_layers": 3},
    "rope.theta = 7.0: the dense model has 10000.0": {"rope": replace(dense_spec("llama-tiny").model.rope, theta=7.0)},
    "intermediate_size = 24: some layers keep their dense FFN, which has 48": {
        "moe": replace(SPARSE, first_k_dense=1),
        "intermediate_size": 24,
    },
}


@pytest.mark.parametrize("message", OTHERS)
def test_another_model_is_refused_by_the_first_field_that_differs(message: str) -> None:
    dense = dense_spec("llama-tiny").model
    with pytest.raises(ValueError, match=message):
        layout(dense, replace(dense, **({"moe": SPARSE} | OTHERS[message])))


def test_the_command_derives_writes_and_says_how_exact_it_is(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = shared_data / "models" / "stories260K_hf", tmp_path / "stories-8x"
    assert main(["upcycle", str(dense), "--experts", "8", "--granularity", "4", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exact"] and result["largest_difference"] <= 1e-5 and result["largest_logit"] > 10
    moe = load_spec(out / "zoo.yaml").model.moe
    assert moe is not None and (moe.num_experts, moe.top_k, moe.moe_intermediate_size) == (32, 8, 43)
    assert load_spec(out / "zoo.yaml").reference == "stories260K_hf upcycled (copy, seed 0)"
    assert (out / "tokenizer.model").read_bytes() == (dense / "tokenizer.model").read_bytes()
    assert main(["verify", str(out)]) == 0
    capsys.readouterr()

    assert main(["upcycle", str(dense), "--experts", "8", "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["upcycle", str(out), "--experts", "8", "--out", str(tmp_path / "twice")]) == 2
    assert "has experts already" in capsys.readouterr().err
    assert main(["upcycle", str(dense), "--experts", "8", "--granularity", "3", "--out", str(tmp_path / "x")]) == 2
    assert "granularity = 3: it must divide the dense model's intermediate_size = 172" in capsys.readouterr().err
    assert main(["upcycle", str(dense), "--to", "mixtral-tiny", "--out", str(tmp_path / "x")]) == 2
    assert "mixtral-tiny from stories260K_hf: vocab_size = 4096: the dense model has 512" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["stories-8x"]


def test_the_command_takes_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, config, out = dense_checkpoint(tmp_path), tmp_path / "sparse.yaml", tmp_path / "out"
    save_spec(sparse_spec(replace(SPARSE, norm_topk_prob=False)), config)
    command = ["upcycle", str(dense), "--to", str(config), "--out", str(out)]
    assert main([*command, "--top-k", "2"]) == 2
    assert "--top-k: belongs to --experts" in capsys.readouterr().err
    assert main([*command, "--no-check"]) == 0
    assert "first forward: not the dense model's: moe.norm_topk_prob = False" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"noise = 0.1 and drop = 0.5: give one of the two"):
        Recipe(noise=0.1, drop=0.5)
    for drop in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"drop = {drop}: give a part of the hidden units"):
            Recipe(drop=drop)
