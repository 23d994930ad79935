"""Products of every library and shape: equal to those in fp64, with every gradient, and chosen as asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.generation import generate
from zoo.layers.linear import (
    ROUND,
    SPARE,
    VARIABLE,
    Library,
    Linear,
    add_product,
    libraries,
    linear,
    product,
    product_by,
    products,
    products_by,
    rows_of_products,
)
from zoo.layers.linear_nll import linear_nll, whole_nll
from zoo.model import build
from zoo.moe.ways import Way, computed_as
from zoo.registry import find_spec

LIBRARIES = libraries()
CPU = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
SHAPES = [(1, 96, 64), (1, 256, 512), (1, 640, 512), (3, 256, 256), (4, 1792, 128), (12, 256, 512), (200, 64, 130)]
"""n, I, O: one of each way that ``zoo.layers.linear`` takes with oneDNN, and its neighbours."""


def close(got: Tensor, exact: Tensor) -> None:
    """Up to the rounding of some hundred fp32 sums of numbers around 1."""
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear_and_its_gradients_are_those_of_fp64(library: Library, shape: tuple[int, int, int], bias: bool) -> None:
    n, inputs, outputs = shape
    leaves = [torch.randn(1, n, inputs), torch.randn(outputs, inputs), *([torch.randn(outputs)] if bias else [])]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    given_gradient = torch.randn(1, n, outputs)
    F.linear(*exact).backward(given_gradient.double())
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with products_by(library):
        out = linear(*leaves)
        out.backward(given_gradient)
        with torch.no_grad():
            close(linear(*leaves), F.linear(*exact).detach())
    close(out.detach(), F.linear(*exact).detach())
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and reference.grad is not None
        close(leaf.grad, reference.grad)


@pytest.mark.parametrize("library", LIBRARIES)
def test_second_derivatives(library: Library) -> None:
    """Gradient of |∂ sum(linear²) / ∂x|²: products of products."""
    x, weight = torch.randn(64, 128) / 8, torch.randn(96, 128) / 8
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        with products_by(library if dtype == torch.float32 else "mkl"):
            (first,) = torch.autograd.grad(linear(*leaves).square().sum(), leaves[0], create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), leaves))
    for got, exact in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_nothing_is_kept_for_what_is_frozen(library: Library, frozen: str) -> None:
    x, weight = torch.randn(64, 128), torch.randn(256, 128)
    (weight if frozen == "x" else x).requires_grad_()
    with products_by(library):
        out = linear(x, weight)
    kept = [t for t in getattr(out.grad_fn, "saved_tensors", ()) if t is not None]
    assert len(kept) == (library == "onednn"), "torch's own layer keeps its tensors where Python does not see them"
    assert all(t.data_ptr() == (x if frozen == "x" else weight).data_ptr() for t in kept)
    out.sum().backward()
    assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LIBRARIES),
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(1, 700),
    st.sampled_from(["rows", "columns", "cut", "cut columns", "one repeated"]),
    st.sampled_from(["rows", "columns", "cut", "cut columns"]),
)
def test_products_of_any_strides(
    library: Library, n: int, inputs: int, outputs: int, x_strides: str, weight_strides: str
) -> None:
    x, weight = strided(n, inputs, x_strides), strided(outputs, inputs, weight_strides)
    exact = x.double() @ weight.double().t()
    out, total = torch.empty(n, outputs + 3)[:, 1:-2], torch.ones(n, outputs)
    with products_by(library):
        product(x, weight, out)
        add_product(total, x, weight)
        close(product(x, weight), exact)
    close(out, exact)
    close(total, exact + 1)


def strided(rows: int, columns: int, strides: str) -> Tensor:
    """[rows, columns] of what lies in memory as named."""
    if strides == "one repeated":
        return torch.randn(1, columns).expand(rows, columns)
    wider = 5 if strides.startswith("cut") else 0
    if strides.endswith("columns"):
        return torch.randn(columns, rows + wider)[:, :rows].t()
    return torch.randn(rows, columns + wider)[:, :columns]


@pytest.mark.skipif("onednn" not in LIBRARIES, reason="oneDNN is not there, or rounds to bf16")
def test_products_in_many_threads_leave_torchs_setting() -> None:
    """Each product is right while others begin and end, and afterwards torch's own are as they were set."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    x, weight = torch.randn(64, 96), torch.randn(512, 96)
    exact = x.double() @ weight.double().t()

    def some(_: int) -> None:
        with products_by("onednn"):
            for _ in range(50):
                close(product(x, weight), exact)

    for setting in ("ieee", "none"):
        matmul.fp32_precision = setting
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(some, range(4)))
        assert matmul.fp32_precision == setting


@pytest.mark.skipif("onednn" not in LIBRARIES, reason="oneDNN is not there, or rounds to bf16")
def test_a_product_that_fails_leaves_torchs_setting() -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    with products_by("onednn"), pytest.raises(RuntimeError, match="cannot be multiplied"):
        product(torch.randn(64, 96), torch.randn(512, 95))
    assert matmul.fp32_precision == before


@pytest.mark.skipif("onednn" not in LIBRARIES, reason="oneDNN is not there, or rounds to bf16")
@pytest.mark.parametrize(("n", "inputs", "outputs"), [(2, 512, 500), (16, 512, 512), (100, 300, 70), (128, 512, 256)])
def test_products_by_onednn_are_of_whole_fp32_numbers(n: int, inputs: int, outputs: int) -> None:
    """Numbers of 24 bits, each product with a single one of another matrix: no rounding, of any kind."""
    x, chosen = torch.randn(n, inputs), torch.randperm(inputs)[:outputs]
    columns = torch.nn.functional.one_hot(chosen, inputs).float()
    for left, right in ((x, columns), (columns, x)):
        by = product_by("onednn", left, right)
        assert torch.equal(by if left is x else by.t(), x[:, chosen])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("amx_bf16" not in CPU, reason="a CPU without AMX")
def test_where_onednn_may_round_with_amx_it_is_not_there() -> None:
    found = python("import zoo.layers.linear as l; print(l.libraries())", {"ONEDNN_MAX_CPU_ISA": "DEFAULT"})
    assert found.stdout == "('mkl',)\n", found.stderr


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rows", [1, 5, 48])
def test_products_together_are_each_its_own(library: Library, count: int, rows: int) -> None:
    """Forward, and as for the gradients of the factors; into the middle of a larger stack."""
    x, weights = torch.randn(6, rows, 160), torch.randn(6, 200, 160)
    gradient, stack = torch.randn(6, rows, 200), torch.zeros(8, 200, 160)
    out, back = torch.empty(6, rows, 200), torch.empty(6, rows, 160)
    with products_by(library), threads(count):
        products(x, weights, out)
        products(gradient, weights.mT, back)
        products(gradient.mT, x.mT, stack[1:-1])
    close(out, x.double() @ weights.double().mT)
    close(back, gradient.double() @ weights.double())
    close(stack[1:-1], gradient.double().mT @ x.double())
    assert not stack[0].any() and not stack[-1].any()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(LIBRARIES), st.lists(st.integers(0, 300), max_size=40), st.integers(1, 2000))
def test_rows_that_are_added_are_few(library: Library, counts: list[int], limit: int) -> None:
    with products_by(library):
        wanted = rows_of_products(counts, torch.empty(256, 128), limit)
    assert len(wanted) == len(counts)
    for count, rows in zip(counts, wanted, strict=True):
        assert rows == count if count <= ROUND or library == "mkl" else rows >= count and rows % ROUND == 0
    rounded = sum(count + (-count % ROUND if count > ROUND else 0) for count in counts)
    assert sum(wanted) <= (1 + SPARE) * rounded


@pytest.mark.parametrize("library", LIBRARIES)
def test_other_dtypes_autocast_and_single_vectors_are_left_to_torch(library: Library) -> None:
    x, weight = torch.randn(64, 128), torch.randn(256, 128)
    with products_by(library):
        assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
        assert torch.equal(linear(x.bfloat16(), weight.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16()))
        assert torch.equal(linear(x[0], weight), F.linear(x[0], weight))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16


def test_a_layer_begins_as_torchs() -> None:
    layers = []
    for kind in (Linear, nn.Linear):
        torch.manual_seed(0)
        layers.append(kind(3, 4))
    for ours, theirs in zip(*(layer.parameters() for layer in layers), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(len(LIBRARIES) == 1, reason="torch has no oneDNN here")
@pytest.mark.parametrize("way", [None, "split"])
@pytest.mark.parametrize("name", ["mixtral-tiny", "deepseek-v3-tiny"])
def test_a_model_is_the_same_with_either(name: str, way: Way | None) -> None:
    """Loss and every gradient over some tokens; then the tokens of a batch that it continues."""
    model = build(find_spec(name).model)
    ids = torch.randint(model.config.vocab_size, (2, 48))
    found: list[list[Tensor]] = []
    for library in LIBRARIES:
        model.zero_grad()
        with products_by(library):
            hidden = model(ids).hidden if way is None else _as(way, model, ids)
            hidden.square().mean().backward()
            tokens = torch.tensor(generate(model.eval(), [[1, 2, 3], [4]], max_new_tokens=6))
        model.train()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([hidden.detach(), *gradients, tokens])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def _as(way: Way, model: torch.nn.Module, ids: Tensor) -> Tensor:
    with computed_as(way):
        hidden: Tensor = model(ids).hidden
        return hidden


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_loss_in_chunks(library: Library) -> None:
    hidden, weight = torch.randn(300, 64, requires_grad=True), torch.randn(5000, 64, requires_grad=True)
    labels = torch.randint(5000, (300,))
    expected = whole_nll(hidden.double(), weight.double(), labels)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    with products_by(library):
        got = linear_nll(hidden, weight, labels)
        found = torch.autograd.grad(got, (hidden, weight))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    for one, exact in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-3, atol=1e-4)


def test_a_module_is_torchs_but_for_the_product() -> None:
    ours, theirs = Linear(7, 5), torch.nn.Linear(7, 5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 7)
    torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours, torch.nn.Linear)


def asked(value: str) -> subprocess.CompletedProcess[str]:
    code = "import torch, zoo.layers.linear as l; l.linear(torch.ones(9, 9), torch.ones(9, 9)); print(l.uses_onednn())"
    return python(code, {VARIABLE: value})


def python(code: str, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | (variables or {})
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.mark.skipif("onednn" not in LIBRARIES, reason="oneDNN is not there, or rounds to bf16")
@pytest.mark.parametrize(
    "where", ["torch.autocast('cpu', torch.bfloat16)", "torch.inference_mode()", "torch.device('meta')"]
)
def test_what_onednn_is_found_to_keep_depends_on_nothing_around(where: str) -> None:
    code = "import torch, zoo.layers.linear as l\ntorch.set_default_dtype(torch.bfloat16)\n"
    found = python(code + f"with torch.{where}: print(l.libraries())")
    assert found.stdout == f"{LIBRARIES}\n", found.stderr


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_variable_asks_for_a_library(library: Library) -> None:
    assert asked(library).stdout == f"{library == 'onednn'}\n"


def test_the_variable_names_what_there_is() -> None:
    failed = asked("blis")
    assert failed.returncode
    assert f"{VARIABLE}='blis': no such library here; give mkl" in failed.stderr
