"""The MoE layer and its expert implementations against the readable loop; rows 24 and 28 of the correctness table."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from zoo.model import Decoder, build
from zoo.moe.clamped import clamped_grouped, clamped_loop, clamped_split, clamped_swiglu
from zoo.moe.dispatch import LocalDispatcher, weighted_sum
from zoo.moe.experts import GEGLUExperts, experts_grouped, experts_loop, experts_split
from zoo.moe.layer import MoE
from zoo.moe.router import RouterOutput
from zoo.registry import find_spec

D, FFN = 16, 24


def parameters(num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(num_experts, 2, FFN, D, dtype=dtype, requires_grad=True)
    return gate_up, torch.randn(num_experts, D, FFN, dtype=dtype, requires_grad=True)


def forward_and_gradients(
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], *args: Tensor, seed_grad: Tensor
) -> list[Tensor]:
    rows, counts, gate_up, down = args
    rows = rows.detach().requires_grad_()
    out = function(rows, counts, gate_up, down)
    return [out, *torch.autograd.grad(out, (rows, gate_up, down), seed_grad)]


COUNTS = [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 2], [2, 3, 4, 5]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [(experts_split, torch.float64), (experts_grouped, torch.float32)],
    ids=["split", "grouped"],
)
def test_every_implementation_equals_the_loop(
    implementation: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype, counts: list[int]
) -> None:
    torch.manual_seed(0)
    gate_up, down = parameters(len(counts), dtype)
    rows, grad = torch.randn(2, sum(counts), D, dtype=dtype)
    args = (rows, torch.tensor(counts), gate_up, down)
    expected = forward_and_gradients(experts_loop, *args, seed_grad=grad)
    result = forward_and_gradients(implementation, *args, seed_grad=grad)
    for got, want in zip(result, expected, strict=True):
        scale = want.abs().max().clamp(min=1)
        assert (got - want).abs().max() / scale < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [(clamped_split, torch.float64), (clamped_grouped, torch.float32)],
    ids=["split", "grouped"],
)
def test_every_implementation_of_clamped_experts_equals_the_loop(
    implementation: Callable[..., Tensor], dtype: torch.dtype, counts: list[int]
) -> None:
    torch.manual_seed(0)
    weights = *parameters(len(counts), dtype), *biases(len(counts), dtype)
    rows, grad = torch.randn(2, sum(counts), D, dtype=dtype)
    rows.requires_grad_()
    expected, result = (
        [out, *torch.autograd.grad(out, (rows, *weights), grad)]
        for out in (way(rows, torch.tensor(counts), *weights, 1.0) for way in (clamped_loop, implementation))
    )
    for got, want in zip(result, expected, strict=True):
        scale = want.abs().max().clamp(min=1)
        assert (got - want).abs().max() / scale < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("implementation", [experts_split, experts_grouped])
def test_every_implementation_takes_the_gate_of_geglu(implementation: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    gate_up, down = parameters(1, torch.float32)
    rows = torch.randn(5, D)
    gate, up = rows @ gate_up[0, 0].T, rows @ gate_up[0, 1].T
    expected = (0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up) @ down[0].T
    for way in (experts_loop, implementation):
        torch.testing.assert_close(way(rows, torch.tensor([5]), gate_up, down, GEGLUExperts.activation), expected)


def biases(num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(num_experts, 2, FFN, dtype=dtype, requires_grad=True)
    return gate_up, torch.randn(num_experts, D, dtype=dtype, requires_grad=True)


def test_clamped_swiglu_by_hand() -> None:
    gate, up = torch.tensor([9.0, -9.0, 1.0]), torch.tensor([9.0, -9.0, 0.5])
    expected = [7 / (1 + math.exp(-1.702 * 7)) * 8, -9 / (1 + math.exp(1.702 * 9)) * -6, 1.5 / (1 + math.exp(-1.702))]
    torch.testing.assert_close(clamped_swiglu(gate, up, 7.0), torch.tensor(expected))


def test_row_24_an_idle_expert_is_never_read() -> None:
    gate_up, down = parameters(3, torch.float32)
    gate_up.data[1] = down.data[1] = float("nan")
    rows, counts = torch.randn(4, D), torch.tensor([3, 0, 1])
    for out in (experts_split, experts_grouped):
        assert out(rows, counts, gate_up, down).isfinite().all()
    gate_up_bias, down_bias = biases(3, torch.float32)
    gate_up_bias.data[1] = down_bias.data[1] = float("nan")
    for clamped in (clamped_split, clamped_grouped):
        assert clamped(rows, counts, gate_up, down, gate_up_bias, down_bias, 7.0).isfinite().all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 1000))
def test_dispatch_then_combine_is_the_weighted_sum(tokens: int, top_k: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(tokens, 5, dtype=torch.float64)
    weights = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    routing = RouterOutput(scores, scores, weights, scores.topk(top_k).indices)
    dispatcher = LocalDispatcher()
    rows, counts, state = dispatcher.dispatch(x, routing)
    assert counts.tolist() == [int((routing.experts == e).sum()) for e in range(5)]
    expert_of_row = torch.repeat_interleave(torch.arange(5), counts)
    scale = torch.arange(1.0, 6.0, dtype=torch.float64)
    out = dispatcher.combine(rows * scale[expert_of_row, None], state)
    expected = x * (weights * scale[routing.experts]).sum(-1, keepdim=True)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(x)
    for got, want in zip(
        torch.autograd.grad(out, (x, weights), grad), torch.autograd.grad(expected, (x, weights), grad), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_the_weighted_sum_is_rounded_once_under_autocast() -> None:
    weights, rows = torch.rand(5, 3), torch.randn(5, 3, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = weighted_sum(weights, rows)
    assert torch.equal(out, (weights.unsqueeze(-1) * rows.float()).sum(1).bfloat16())


def config(**moe: object) -> ModelConfig:
    given_moe = {
        "num_experts": 6,
        "top_k": 2,
        "moe_intermediate_size": FFN,
        "score_func": "softmax",
        "norm_topk_prob": True,
        **moe,
    }
    return ModelConfig(
        vocab_size=32,
        hidden_size=D,
        num_layers=2,
        intermediate_size=32,
        max_position_embeddings=64,
        norm_eps=1e-6,
        rope=RopeConfig(theta=1e4),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        moe=MoEConfig(**given_moe),  # type: ignore[arg-type]
        initializer_range=0.2,
    )


@pytest.mark.parametrize("gate", [False, True])
def test_row_11_layer_equals_its_equation_token_by_token_with_and_without_gate(gate: bool) -> None:
    model = build(config(num_shared_experts=2, shared_expert_gate=gate), dtype=torch.float64)
    layer = model.layers[0].ffn
    assert isinstance(layer, MoE)
    x = torch.randn(2, 3, D, dtype=torch.float64)
    out, routing = layer(x)
    for t, token in enumerate(x.flatten(0, 1)):
        expected = torch.zeros(D, dtype=torch.float64)
        probs = (layer.router.weight @ token).softmax(-1)
        best = probs.topk(2)
        for weight, e in zip(best.values / best.values.sum(), best.indices, strict=True):
            hidden = F.silu(layer.experts.gate_up[e, 0] @ token) * (layer.experts.gate_up[e, 1] @ token)
            expected += weight * (layer.experts.down[e] @ hidden)
        shared = layer.shared_experts
        assert shared is not None
        y = shared.down_proj.weight @ (F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token))
        if layer.shared_expert_gate is not None:
            y = y * (layer.shared_expert_gate.weight @ token).sigmoid()
        torch.testing.assert_close(out.flatten(0, 1)[t], expected + y)
    assert routing.experts.shape == (6, 2)


def test_row_11_qwen_models_differ_in_gate_norm_and_shared_experts() -> None:
    with torch.device("meta"):
        gated, plain = (Decoder(find_spec(name).model).layers[0] for name in ("qwen2-moe-tiny", "qwen3-moe-tiny"))
    assert gated.ffn.shared_expert_gate.weight.shape == (1, 128) and gated.ffn.shared_experts is not None
    assert not gated.ffn.router.config.norm_topk_prob and not list(gated.mixer.q_norm.parameters())
    assert plain.ffn.shared_expert_gate is None and plain.ffn.shared_experts is None
    assert plain.ffn.router.config.norm_topk_prob and plain.mixer.q_norm.weight.shape == (plain.mixer.head_dim,)


def test_whole_layer_gradient_by_finite_differences() -> None:
    layer = build(config(num_shared_experts=1, shared_expert_gate=True), dtype=torch.float64).layers[0].ffn
    names = [n for n, _ in layer.named_parameters()]
    x = torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]
        return out

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


def test_row_28_each_expert_is_drawn_like_a_dense_matrix() -> None:
    model = build(config(num_experts=16), seed=3)
    experts = model.layers[0].ffn.experts
    for stacked in (experts.gate_up, experts.down):
        assert stacked.std(dim=tuple(range(1, stacked.dim()))).sub(0.2).abs().max() < 0.03
    assert not torch.equal(experts.down[0], experts.down[1])


def test_initialisation_depends_on_name_and_seed_only() -> None:
    narrow, wide = build(config(num_experts=2)), build(config(num_experts=6))
    assert torch.equal(narrow.layers[1].ffn.experts.down, wide.layers[1].ffn.experts.down[:2])
    assert torch.equal(narrow.lm_head.weight, wide.lm_head.weight)
    assert not torch.equal(build(config(), seed=1).lm_head.weight, wide.lm_head.weight)
    assert torch.equal(build(config(), dtype=torch.bfloat16).lm_head.weight, wide.lm_head.weight.bfloat16())
    with torch.device("meta"):  # as Lightning makes the device that it trains on the default
        elsewhere = build(config())
    assert all(map(torch.equal, elsewhere.state_dict().values(), wide.state_dict().values()))


def test_row_20_the_weight_multiplies_the_input_of_the_expert() -> None:
    moe = MoEConfig(
        num_experts=3,
        top_k=1,
        moe_intermediate_size=FFN,
        score_func="sigmoid",
        norm_topk_prob=False,
        num_shared_experts=1,
        scaled_input=True,
    )
    config = ModelConfig(
        vocab_size=8,
        hidden_size=D,
        num_layers=1,
        intermediate_size=FFN,
        max_position_embeddings=8,
        norm_eps=1e-6,
        rope=RopeConfig(theta=10000.0),
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
        moe=moe,
        initializer_range=0.5,
    )
    layer = build(config, dtype=torch.float64).layers[0].ffn
    x = torch.randn(1, 7, D, dtype=torch.float64)
    out, routing = layer(x)
    best = (x[0] @ layer.router.weight.T).sigmoid().max(-1)
    assert routing.experts.flatten().tolist() == best.indices.tolist()
    for t in range(7):
        score, e = best.values[t], best.indices[t]
        gate, up = layer.experts.gate_up[e] @ (score * x[0, t])
        expected = layer.experts.down[e] @ (F.silu(gate) * up) + layer.shared_experts(x[0, t])
        torch.testing.assert_close(out[0, t], expected)
