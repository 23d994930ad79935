"""Freezing by named sets, and low-rank adapters: what is trained, what is computed, and what is left of it merged."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.config_reading import from_dict
from zoo.finetune.apply import adapted_modules, apply, merge
from zoo.finetune.config import FinetuneConfig, LoRAConfig
from zoo.finetune.lora import AdaptedExperts, LoRA, MixtureOfLoRA
from zoo.finetune.sets import PARTS, part_of, select, set_trainable
from zoo.generation import generate
from zoo.layers.sequence import sequence_layout
from zoo.model import Decoder, build
from zoo.moe.blocked import mix_blocked
from zoo.moe.experts import Experts, experts_loop
from zoo.registry import find_spec, model_names
from zoo.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer

NO_PADDING: dict[str, Any] = {"attention_mask": None, "document_ids": None, "past": 0, "past_valid": None}


def tiny(name: str = "qwen2-moe-tiny", seed: int = 0, **changes: Any) -> Decoder:
    changes = {"num_layers": 2, "vocab_size": 64} | changes
    return build(dataclasses.replace(find_spec(name).model, **changes), seed)


def ids() -> Tensor:
    return torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))


def loss_of(model: Decoder) -> Tensor:
    tokens = ids()
    return model.nll(model(tokens[:, :-1], logits_to_keep=None).hidden, tokens[:, 1:])


def finetune(**section: Any) -> FinetuneConfig:
    return from_dict(FinetuneConfig, section, "finetune")


def moved(model: Decoder) -> Decoder:
    """``model`` with what is trained somewhere else than where it began."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Sets
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in model_names() if name.endswith("-tiny")])
def test_every_parameter_is_in_the_part_that_its_module_is(name: str) -> None:
    config = dataclasses.replace(find_spec(name).model, mtp_depth=1 if name == "deepseek-v3-tiny" else 0)
    with torch.device("meta"):
        model = Decoder(config)
    found = {part: {name for name, _ in model.named_parameters() if part_of(name) == part} for part in PARTS}
    assert sum(map(len, found.values())) == len(list(model.parameters()))
    norms = {f"{path}." for path, module in model.named_modules() if "Norm" in type(module).__name__}
    assert found["norms"] == {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[0] + "." in norms}
    assert bool(found["experts"]) == bool(found["router"]) == (config.moe is not None)
    assert bool(found["lm_head"]) != config.tie_word_embeddings
    assert bool(found["mtp"]) == (config.mtp_depth > 0)


@pytest.mark.parametrize(
    ("section", "trained"),
    [
        ({}, set(PARTS) - {"mamba", "mtp", "dense_ffn"}),
        ({"train": ["experts"]}, {"experts"}),
        ({"freeze": ["experts"]}, {"norms", "router", "shared_experts", "attention", "embeddings", "lm_head"}),
        ({"freeze": ["non_experts"]}, {"experts"}),
        ({"train": ["router"]}, {"router"}),
        ({"freeze": ["router", "embeddings", "ffn"]}, {"norms", "attention", "lm_head"}),
        ({"train": ["attention", "norms"]}, {"attention", "norms"}),
    ],
)
def test_what_is_frozen_has_neither_gradient_nor_optimizer_state(section: dict[str, Any], trained: set[str]) -> None:
    model = tiny()
    table = apply(model, finetune(**section))
    assert {part for part, count, _ in table if count} - {"all"} == trained
    adamw, _ = build_optimizer(model, OptimizerConfig(), ScheduleConfig(), 10)
    before = copy.deepcopy(model.state_dict())
    loss_of(model).backward()
    adamw.step()
    for name, parameter in model.named_parameters():
        if part_of(name) in trained:
            assert parameter.grad is not None and adamw.state[parameter], name
            assert not torch.equal(parameter, before[name]), name
        else:
            assert parameter.grad is None and parameter not in adamw.state, name
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_blocks_take_no_gradient_that_is_not_needed(needed: tuple[int, int, int]) -> None:
    """x, gate_up, down: each is as in the loop, or not there."""
    moe = tiny().layers[1].ffn
    gate_up, down = moe.experts.gate_up.data, moe.experts.down.data
    x = torch.randn(20, gate_up.shape[-1])
    with torch.no_grad():
        routing = moe.router(x)
    grads = []
    for way in (mix_blocked, by_the_loop):
        leaves = [t.clone().requires_grad_(wanted > 0) for t, wanted in zip((x, gate_up, down), needed, strict=True)]
        way(leaves[0], routing, *leaves[1:]).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs, wanted in zip(*grads, needed, strict=True):
        assert (ours is not None) == (wanted > 0)
        if wanted:
            torch.testing.assert_close(ours, theirs)


def by_the_loop(x: Tensor, routing: Any, gate_up: Tensor, down: Tensor) -> Tensor:
    from zoo.moe.dispatch import LocalDispatcher

    rows, counts, state = LocalDispatcher().dispatch(x, routing)
    return LocalDispatcher().combine(experts_loop(rows, counts, gate_up, down), state)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"freeze": ["exprts"]}, "finetune.freeze: 'exprts' is no set of parameters; did you mean 'experts'?"),
        (
            {"train": ["mamba"]},
            "finetune.train: 'mamba' matches nothing in this model; sets that do are norms,",
        ),
        ({"freeze": ["experts", "non_experts"]}, "experts, non_experts are all parameters of this model"),
        ({"freeze": ["router"], "train": ["experts"]}, "remove one"),
        ({"frozen": ["router"]}, "unknown key 'frozen'; did you mean 'freeze'?"),
        ({"freeze": "router"}, "freeze = 'router': expected a list"),
        ({"freeze": ["router"], "lora": {"targets": ["experts"]}}, "all but the adapter is frozen already"),
        ({"lora": {"targets": ["experts"]}, "molora": {}}, "both lora and molora are given"),
        ({"lora": {"targets": ["experts"], "rank": 0}}, "rank = 0"),
        ({"lora": {"targets": []}}, "targets = []"),
        ({"lora": {"targets": ["experts"]}, "train": ["experts"]}, "layers.0.ffn.experts is trained in full"),
        ({"molora": {"targets": ["attention"]}}, "layers.0.mixer.q_proj is outside of the FFNs"),
        ({"molora": {"num_experts": 1}}, "num_experts = 1"),
        ({"prefix": {"length": 0}}, "length = 0"),
    ],
)
def test_a_mistake_names_the_value_and_the_fix(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        apply(tiny(), finetune(**section))


# ---------------------------------------------------------------------------------------------------------------------
# LoRA
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "model"), [("experts", "llama-tiny"), ("lm_head", "tied"), ("w_q", "qwen2-moe-tiny")]
)
def test_row_29_a_target_that_matches_nothing_is_refused(target: str, model: str) -> None:
    decoder = tiny(tie_word_embeddings=True) if model == "tied" else tiny(model)
    with pytest.raises(
        ValueError, match=f"finetune.lora.targets: '{target}' matches nothing.* sets that do are .*q_proj"
    ):
        apply(decoder, finetune(lora={"targets": ["attention", target]}))


def test_row_29_stacked_experts_are_adapted_and_counted() -> None:
    model = tiny()
    (experts, *_), rank = [m for m in model.modules() if isinstance(m, Experts)], 3
    num_experts, _, ffn, width = experts.gate_up.shape
    table = {part: trained for part, trained, _ in apply(model, finetune(lora={"targets": ["experts"], "rank": rank}))}
    expected = 2 * num_experts * rank * ((width + 2 * ffn) + (ffn + width))
    assert table == {part: 0 for part in table} | {"lora": expected, "all": expected}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    a = model.layers[0].ffn.experts.gate_up_adapter.a
    assert a.std().item() == pytest.approx((3 * width) ** -0.5, rel=0.1), "the fan-in of one expert, not of all"
    assert not torch.equal(a[0], a[1])


MERGES = {
    "attention": ("qwen2-moe-tiny", {"targets": ["attention"]}),
    "attention with biases": ("qwen2-tiny", {"targets": ["q_proj", "v_proj"]}),
    "latent attention": ("deepseek-v3-tiny", {"targets": ["attention"]}),
    "mamba": ("jamba-tiny", {"targets": ["in_proj", "x_proj", "dt_proj", "out_proj"]}),
    "shared experts": ("qwen2-moe-tiny", {"targets": ["shared_experts"]}),
    "experts": ("qwen2-moe-tiny", {"targets": ["experts"]}),
    "clamped experts": ("gpt-oss-tiny", {"targets": ["experts"]}),
    "geglu experts": ("grok1-tiny", {"targets": ["experts"]}),
    "scaled inputs": ("llama4-tiny", {"targets": ["ffn"]}),
    "output head": ("qwen2-moe-tiny", {"targets": ["lm_head"]}),
    "rslora": ("qwen2-moe-tiny", {"targets": ["experts", "attention"], "rslora": True}),
    "dora": ("qwen2-moe-tiny", {"targets": ["experts", "attention", "lm_head"], "dora": True}),
    "dora of clamped experts": ("gpt-oss-tiny", {"targets": ["experts", "attention"], "dora": True}),
}


@pytest.mark.parametrize(("name", "lora"), MERGES.values(), ids=MERGES)
@torch.no_grad()
def test_merged_is_unmerged_and_an_adapter_begins_as_nothing(name: str, lora: dict[str, Any]) -> None:
    model, tokens = tiny(name, num_layers=find_spec(name).model.num_layers), ids()
    before, names = model(tokens).logits, list(model.state_dict())
    apply(model, finetune(lora={"rank": 4, "alpha": 4} | lora))
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=1e-5)
    unmerged, decoded = moved(model)(tokens).logits, generate(model, tokens, max_new_tokens=4)
    likelihood = model.nll(model(tokens).hidden, tokens)
    assert (unmerged - before).abs().max() > 1e-3
    merge(model)
    assert list(model.state_dict()) == names
    assert not adapted_modules(model)
    merged = model(tokens)
    assert (merged.logits - unmerged).abs().max() < 1e-5
    assert generate(model, tokens, max_new_tokens=4) == decoded
    torch.testing.assert_close(model.nll(merged.hidden, tokens), likelihood)


def test_rank_stabilised_scaling_by_hand() -> None:
    assert LoRAConfig(targets=("experts",), rank=16, alpha=8).scaling == 0.5
    assert LoRAConfig(targets=("experts",), rank=16, alpha=8, rslora=True).scaling == 2


def adapted_experts(dora: bool) -> AdaptedExperts:
    """Three experts in double precision, with adapters that have been trained."""
    holder = tiny("mixtral-tiny")
    holder.layers[0].ffn.experts = Experts(3, 6, 4)
    for parameter in holder.layers[0].ffn.experts.parameters():
        nn.init.normal_(parameter)
    apply(holder.double(), finetune(lora={"targets": ["experts"], "rank": 2, "dora": dora}))
    adapted = moved(holder).layers[0].ffn.experts
    assert isinstance(adapted, AdaptedExperts)
    return adapted


COUNTS = torch.tensor([2, 0, 3])


def test_gradients_of_lora_on_experts_by_finite_differences() -> None:
    adapted = adapted_experts(dora=False)
    rows = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 4
    assert torch.autograd.gradcheck(lambda *_: adapted(rows, COUNTS), (rows, *trained))
    assert all(p.grad is None for p in adapted.base.parameters())


def test_gradients_of_dora_on_experts_are_those_of_its_equation_with_a_constant_norm() -> None:
    adapted = adapted_experts(dora=True)
    rows = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weights = []
    for adapter, weight in (
        (adapted.gate_up_adapter, adapted.base.gate_up.flatten(1, 2)),
        (adapted.down_adapter, adapted.base.down),
    ):
        summed = weight + adapter.scaling * adapter.b @ adapter.a
        weights.append(adapter.magnitude.view(3, -1, 1) * summed / summed.norm(dim=-1, keepdim=True).detach())
    written = experts_loop(rows, COUNTS, weights[0].unflatten(1, (2, -1)), weights[1])
    torch.testing.assert_close(adapted(rows, COUNTS), written)
    leaves = [rows, *(p for p in adapted.parameters() if p.requires_grad)]
    assert len(leaves) == 7
    for ours, theirs in zip(
        torch.autograd.grad(adapted(rows, COUNTS).square().sum(), leaves),
        torch.autograd.grad(written.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_length_of_dora_is_that_of_the_sum() -> None:
    model = tiny()
    apply(model, finetune(lora={"targets": ["experts"], "dora": True}))
    experts = moved(model).layers[0].ffn.experts
    weight = experts.base.down
    torch.testing.assert_close(
        experts.down_adapter.lengths(weight), LoRA.merged(experts.down_adapter, weight).norm(dim=-1)
    )


def test_what_is_trained_beside_an_adapter() -> None:
    model = tiny()
    table = apply(model, finetune(lora={"targets": ["experts"], "rank": 2}, train=["router", "norms"]))
    assert {part for part, trained, _ in table if trained} == {"router", "norms", "lora", "all"}
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) != parameter.requires_grad, name
    assert model.layers[0].ffn.experts.base.gate_up.grad is None


def test_select_gives_parameters_by_name() -> None:
    model = tiny()
    assert list(select(model, ["lm_head"], "test")) == ["lm_head.weight"]
    set_trainable(model, train=["lm_head"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]


# ---------------------------------------------------------------------------------------------------------------------
# LoRA experts with a router
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tiny", "qwen2-moe-tiny"])
def test_a_mixture_of_lora_is_its_equation_at_every_projection_of_the_ffn(name: str) -> None:
    """Against LoRA of every expert's own matrices: with one gate at 1, the mixture is that expert's."""
    model, tokens = tiny(name).double(), ids()
    before = model(tokens).logits
    table = apply(model, finetune(molora={"num_experts": 3, "rank": 2, "alpha": 4}))
    torch.testing.assert_close(model(tokens).logits, before)
    assert {part for part, trained, _ in table if trained} == {"molora", "all"}
    mixtures = [m for m in moved(model).modules() if isinstance(m, MixtureOfLoRA)]
    assert len(mixtures) == {"llama-tiny": 6, "qwen2-moe-tiny": 12}[name]
    mixture = mixtures[0]
    x = torch.randn(7, mixture.a.shape[1], dtype=torch.float64)
    product = torch.zeros(7, mixture.b.shape[0], dtype=torch.float64)
    a, b = mixture.a.unflatten(0, (3, 2)), mixture.b.unflatten(1, (3, 2))
    gates = (x @ mixture.router.T).softmax(-1)
    written = sum(2 * gates[:, i, None] * (x @ a[i].T @ b[:, i].T) for i in range(3))
    torch.testing.assert_close(mixture(x, product, product), written)
    loss_of(model).backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is None) != parameter.requires_grad, parameter_name
    with pytest.raises(ValueError, match=r"layers.0.ffn\S*: LoRA experts with a router and prefixes are no change of"):
        merge(model)


# ---------------------------------------------------------------------------------------------------------------------
# Prefixes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tiny", "mistral-tiny", "gemma2-tiny", "gpt-oss-tiny", "dbrx-tiny"])
def test_every_query_sees_the_prefix_and_nothing_else_changes(name: str) -> None:
    model, tokens = tiny(name).double(), ids()
    apply(model, finetune(prefix={"length": 3}))
    attention = moved(model).layers[0].mixer
    x, layout = torch.randn(2, 12, model.config.hidden_size, dtype=torch.float64), sequence_layout(tokens, **NO_PADDING)
    rotary = model.rotary(layout.positions, layout.keys, x.dtype)
    base = attention.base
    q, k, v = base.project(x)
    q, k = base.place(q, k, layout, rotary)
    k, v = (torch.cat((new.expand(2, -1, -1, -1), old), 1) for new, old in ((attention.keys, k), (attention.values, v)))
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("bshd,blhd->bhsl", q, k.repeat_interleave(groups, 2)) * base.scale
    if hasattr(base, "softcap"):
        scores = base.softcap * (scores / base.softcap).tanh()
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    if base.window is not None:
        seen &= ~torch.ones(12, 12, dtype=torch.bool).tril(-base.window)
    scores = scores.masked_fill(~torch.cat((torch.ones(12, 3, dtype=torch.bool), seen), 1), float("-inf")).exp()
    sink = base.sinks.exp()[:, None, None] if hasattr(base, "sinks") else 0
    mixed = torch.einsum(
        "bhsl,blhd->bshd", scores / (scores.sum(-1, keepdim=True) + sink), v.repeat_interleave(groups, 2)
    )
    torch.testing.assert_close(attention(x, layout, rotary, None), base.o_proj(mixed.flatten(-2)))


def test_decoding_and_packed_documents_keep_the_prefix() -> None:
    model, tokens = tiny("mistral-tiny").double(), ids()
    apply(model, finetune(prefix={"length": 3}))
    whole, cache = moved(model)(tokens).logits, model.new_cache(2, 12)
    with torch.no_grad():
        steps = [model(part, cache=cache).logits for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:])]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    packed = model(tokens.flatten()[None], document_ids=torch.arange(2).repeat_interleave(12)[None]).logits
    torch.testing.assert_close(packed.view_as(whole), whole)
    loss_of(model).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"layers.{i}.mixer.{part}" for i in range(2) for part in ("keys", "values")}


@pytest.mark.parametrize("name", ["deepseek-v3-tiny", "jamba-tiny", "llama4-tiny", "glam-tiny"])
def test_prefixes_are_refused_where_attention_has_no_place_for_them(name: str) -> None:
    with pytest.raises(ValueError, match=r"^finetune.prefix: .*; use finetune.lora$"):
        apply(tiny(name), finetune(prefix={}))
