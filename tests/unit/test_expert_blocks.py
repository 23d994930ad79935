"""Experts computed in blocks of tokens against the readable loop, in values and every gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.layers.ffn import Activation
from zoo.layers.linear import LARGE, SOME_ROWS, Library, libraries, products_by
from zoo.model import build
from zoo.moe.blocked import blocks_of, mix_blocked, mix_one
from zoo.moe.dispatch import LocalDispatcher
from zoo.moe.experts import Experts, GEGLUExperts, experts_loop
from zoo.moe.layer import MoE
from zoo.moe.router import RouterOutput
from zoo.registry import find_spec

D, FFN = 16, 12


def routed(tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, RouterOutput]:
    """x and routing that leaves some experts idle more often than not."""
    scores = torch.rand(tokens, num_experts, dtype=torch.float64) * torch.linspace(0, 1, num_experts) ** 4
    weights = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    return x, RouterOutput(scores, scores, weights, scores.topk(top_k).indices)


def parameters(num_experts: int) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(num_experts, 2, FFN, D, dtype=torch.float64, requires_grad=True)
    return gate_up, torch.randn(num_experts, D, FFN, dtype=torch.float64, requires_grad=True)


def by_the_loop(x: Tensor, routing: RouterOutput, gate_up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    dispatcher = LocalDispatcher()
    rows, counts, state = dispatcher.dispatch(x, routing)
    return dispatcher.combine(experts_loop(rows, counts, gate_up, down, activation), state)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([1, 7, 512]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_values_and_gradients_equal_the_loop(
    tokens: int, num_experts: int, top_k: int, block_rows: int, geglu: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    experts = GEGLUExperts if geglu else Experts
    x, routing = routed(tokens, num_experts, min(top_k, num_experts))
    weights = parameters(num_experts)
    leaves = (x, routing.weights, *weights)
    out = mix_blocked(x, routing, *weights, experts.activation, block_rows)
    expected = by_the_loop(x, routing, *weights, experts.activation)
    grad = torch.randn_like(out)
    got, want = (torch.autograd.grad(y, leaves, grad) for y in (out, expected))
    for ours, theirs in zip((out, *got), (expected, *want), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(mix_blocked(x, routing, *weights, experts.activation, block_rows), out)


@pytest.mark.parametrize("experts", [Experts, GEGLUExperts])
def test_one_token_is_computed_without_sorting(experts: type[Experts]) -> None:
    torch.manual_seed(0)
    x, routing = routed(1, 9, 4)
    weights = parameters(9)
    with torch.no_grad():
        out = mix_one(x, routing, *weights, experts.activation)
    torch.testing.assert_close(out, by_the_loop(x, routing, *weights, experts.activation), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_one_token_in_bf16_is_summed_in_fp32(top_k: int) -> None:
    torch.manual_seed(top_k)
    exact_x, exact = routed(1, 9, top_k)
    exact_weights = parameters(9)
    expected = by_the_loop(exact_x, exact, *exact_weights, Experts.activation)
    x, gate_up, down = (tensor.detach().bfloat16() for tensor in (exact_x, *exact_weights))
    weights = exact.weights.detach().float()
    with torch.no_grad():

        def mixed(weights: Tensor, experts: Tensor) -> Tensor:
            return mix_one(x, RouterOutput(weights, weights, weights, experts), gate_up, down, Experts.activation)

        out = mixed(weights, exact.experts)
        each = [mixed(torch.ones(1, 1), expert[None]) for expert in exact.experts.T]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, (weights @ torch.cat(each).float()).bfloat16())
    assert (out - expected).norm() <= 4 * torch.finfo(torch.bfloat16).eps * expected.norm()


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_products_that_are_made_transposed_are_the_same() -> None:
    torch.manual_seed(0)
    width, size = 480, 960
    assert 2 * width * size >= LARGE
    shapes = ((12, size), (2, 2, width, size), (2, size, width))
    x, gate_up, down = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    experts = torch.tensor([[0]] * 9 + [[1]] * 3)  # of many enough rows, and of too few
    assert 9 in SOME_ROWS and 3 not in SOME_ROWS
    scores = torch.rand(12, 2, dtype=torch.float64)
    routing = RouterOutput(scores, scores, scores[:, :1], experts)
    outs = (way(x, routing, gate_up, down, Experts.activation) for way in (mix_blocked, by_the_loop))
    found, expected = ((out, *torch.autograd.grad(out.sum(), (x, gate_up, down))) for out in outs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 12))
def test_blocks_hold_every_row_once_and_whole_experts(counts: list[int], limit: int) -> None:
    blocks = blocks_of(counts, limit)
    assert [e for block in blocks for e in block.experts] == [e for e, count in enumerate(counts) if count]
    assert [size for block in blocks for size in block.sizes] == [count for count in counts if count]
    assert [row for block in blocks for row in range(99)[block.rows]] == list(range(sum(counts)))
    assert all(len(block) == sum(block.sizes) for block in blocks)
    assert all(len(block) <= limit or len(block.experts) == 1 for block in blocks)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(libraries()),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(0, 1000),
)
def test_spare_rows_change_nothing(
    library: Library, tokens: int, num_experts: int, top_k: int, multiple: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x, routing = routed(tokens, num_experts, min(top_k, num_experts))
    weights = parameters(num_experts)
    leaves = (x, routing.weights, *weights)
    with pytest.MonkeyPatch.context() as patch, products_by(library):
        results = []
        for _ in range(2):
            out = mix_blocked(x, routing, *weights, block_rows=7)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
            patch.setattr("zoo.moe.blocked.rows_of_products", lambda counts, *_: [n + -n % multiple for n in counts])
    for plain, spare in zip(*results, strict=True):
        torch.testing.assert_close(spare, plain, rtol=1e-10, atol=1e-10)  # sums of numbers up to some hundreds


def test_with_spare_rows_what_is_not_finite_stays_with_its_token_and_expert() -> None:
    """The second of three tokens overflows, and goes to the middle of three experts alone."""
    gate_up, down = parameters(3)
    experts = torch.tensor([[0], [1], [2]])
    weights, scores = torch.rand(3, 1, dtype=torch.float64), torch.rand(3, 3, dtype=torch.float64)
    x = torch.randn(3, D, dtype=torch.float64)
    x[1] = 1e300
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.moe.blocked.rows_of_products", lambda counts, *_: [n + 3 for n in counts])
        out = mix_blocked(x, RouterOutput(scores, scores, weights, experts), gate_up, down)
    gradients = torch.autograd.grad(out.sum(), (gate_up, down))
    for found in (out, *gradients):
        assert [bool(part.isfinite().all()) for part in found] == [True, False, True]


def layer(name: str = "mixtral-tiny", dtype: torch.dtype = torch.float32) -> MoE:
    tiny = find_spec(name).model
    config = dataclasses.replace(tiny, num_layers=1, vocab_size=64)
    (moe,) = [module for module in build(config, dtype=dtype).modules() if isinstance(module, MoE)]
    return moe


def both_ways(moe: MoE, x: Tensor) -> list[list[Tensor]]:
    """Output and gradients: as tokens, and as sorted rows."""
    results = []
    for dispatcher in (None, LocalDispatcher()):
        moe.dispatcher = dispatcher
        moe.zero_grad()
        out, _ = moe(x)
        out.float().square().sum().backward()
        results.append([out, *(parameter.grad for parameter in moe.parameters())])
    return results


def test_a_layer_computes_tokens_and_rows_alike() -> None:
    moe = layer()
    x = torch.randn(2, 9, moe.experts.down.shape[1])
    assert moe.experts.mixes(x)
    for tokens, rows in zip(*both_ways(moe, x), strict=True):
        torch.testing.assert_close(tokens, rows, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16", "autocast"])
def test_half_precision_keeps_to_rows(mixed: bool) -> None:
    moe = layer(dtype=torch.float32 if mixed else torch.bfloat16)
    x = torch.randn(2, 9, moe.experts.down.shape[1]).to(torch.float32 if mixed else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        assert not moe.experts.mixes(x)
        for tokens, rows in zip(*both_ways(moe, x), strict=True):
            assert torch.equal(tokens, rows)


@pytest.mark.parametrize("block_rows", [None, 4])
def test_recomputed_it_is_the_same(block_rows: int | None) -> None:
    torch.manual_seed(0)
    x, routing = routed(20, 6, 3)
    weights = parameters(6)
    leaves = (x, routing.weights, *weights)

    def mix(x: Tensor, routing: RouterOutput, keep: bool = True) -> Tensor:
        return mix_blocked(x, routing, *weights, block_rows=block_rows, keep=keep)

    losses = (mix(x, routing), checkpoint(mix, x, routing, use_reentrant=False), mix(x, routing, keep=False))
    kept, *others = [torch.autograd.grad(loss.square().sum(), leaves) for loss in losses]
    for other in others:
        for plain, again in zip(kept, other, strict=True):
            assert torch.equal(plain, again)


def test_without_pre_activations_kept_little_is() -> None:
    x, routing = routed(20, 6, 3)
    weights = parameters(6)
    known = {t.data_ptr() for t in (x, routing.weights, *weights)}
    kept = []
    for keep in (True, False):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            mix_blocked(x, routing, *weights, keep=keep)
        kept.append(sum(t.numel() for t in saved if t.is_floating_point() and t.data_ptr() not in known))
    pre_activations = 20 * 3 * 2 * weights[1].shape[2]
    assert kept[0] - kept[1] == pre_activations and kept[1] <= 20 * 3


def test_the_gradient_can_be_taken_twice_from_one_graph() -> None:
    x, routing = routed(20, 6, 3)
    weights = parameters(6)
    loss = mix_blocked(x, routing, *weights).square().sum()
    first, second = (torch.autograd.grad(loss, (x, *weights), retain_graph=True) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_an_idle_expert_is_never_read_and_has_no_gradient() -> None:
    gate_up, down = parameters(3)
    gate_up.data[1] = down.data[1] = float("nan")
    experts = torch.tensor([[0, 2], [2, 0]])
    weights, scores = torch.rand(2, 2, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    routing = RouterOutput(scores, scores, weights, experts)
    out = mix_blocked(torch.randn(2, D, dtype=torch.float64), routing, gate_up, down)
    assert out.isfinite().all()
    for gradient in torch.autograd.grad(out.sum(), (gate_up, down)):
        assert not gradient[1].any() and gradient[0].any() and gradient[2].any()


def test_only_first_derivatives_are_given() -> None:
    x, routing = routed(5, 3, 2)
    weights = parameters(3)
    loss = mix_blocked(x, routing, *weights).square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
