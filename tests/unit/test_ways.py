"""Which way experts are computed: every one equal to the loop, the one asked for taken, and none that cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from zoo.model import Decoder, build
from zoo.moe.clamped import WAYS as CLAMPED
from zoo.moe.experts import OF_TOKENS, WAYS, Experts
from zoo.moe.layer import MoE
from zoo.moe.ungated import WAYS as UNGATED
from zoo.moe.ways import TABLE, VARIABLE, Way, computed_as, ways_of_rows
from zoo.registry import find_spec

KINDS = ("mixtral-tiny", "deepseek-v3-tiny", "grok1-tiny", "gpt-oss-tiny", "glam-tiny")


def model(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    return build(find_spec(name).model, dtype=dtype)


def layer(of: Decoder) -> MoE:
    return next(module for module in of.modules() if isinstance(module, MoE))


def result(moe: MoE, x: Tensor, way: Way | None, grad: bool) -> list[Tensor]:
    """Output and, with ``grad``, every gradient."""
    moe.zero_grad()
    with torch.set_grad_enabled(grad):
        if way is None:
            out, _ = moe(x)
        else:
            with computed_as(way):
                out, _ = moe(x)
    if not grad:
        return [out]
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad for p in moe.parameters() if p.grad is not None)]


def test_every_way_has_a_function_and_is_named_in_the_table() -> None:
    assert WAYS.keys() | OF_TOKENS.keys() == set(get_args(Way))
    assert {rule.way for rule in TABLE} | {"loop"} == set(get_args(Way))
    assert CLAMPED.keys() == UNGATED.keys() == WAYS.keys()
    assert TABLE[-1].device is None and TABLE[-1].dtypes is None and not TABLE[-1].fine, "the last must take all"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_all_ways_compute_what_the_loop_does(name: str, tokens: int, grad: bool) -> None:
    moe = layer(model(name)).eval()
    torch.manual_seed(tokens)
    x = torch.randn(1, tokens, find_spec(name).model.hidden_size)
    expected = result(moe, x, "loop", grad)
    computed = {None: result(moe, x, None, grad)}
    for way in get_args(Way):
        try:
            computed[way] = result(moe, x, way, grad)
        except ValueError:
            continue
    gated = name not in ("gpt-oss-tiny", "glam-tiny")
    able = {"loop", "split", "grouped", *(("blocked",) if gated else ())}
    few = gated and not grad and tokens <= moe.router.config.num_experts
    assert computed.keys() == {None, *able, *(("few",) if few else ()), *(("single",) if few and tokens == 1 else ())}
    for got in computed.values():
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("size", [4, 6, 8, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sizes_that_grouped_products_do_not_take_go_another_way(size: int, dtype: torch.dtype) -> None:
    tiny = find_spec("mixtral-tiny").model
    assert tiny.moe is not None
    odd = replace(tiny, hidden_size=2 * size, num_layers=1, moe=replace(tiny.moe, moe_intermediate_size=size))
    moe = layer(build(odd, dtype=dtype))
    for tokens in (3, 40):
        x = torch.randn(1, tokens, 2 * size, dtype=dtype)
        for grad in (False, True):
            for ours, theirs in zip(result(moe, x, None, grad), result(moe, x, "loop", grad), strict=True):
                assert (ours - theirs).norm() <= 64 * torch.finfo(dtype).eps * theirs.norm()
    assert isinstance(moe.experts, Experts)
    grouped = dtype != torch.float64 and size * dtype.itemsize % 16 == 0
    able = {way: able() for way, able in ways_of_rows(x[0], moe.experts.down).items()}
    assert able == {"loop": True, "split": True, "grouped": grouped}


@pytest.mark.parametrize(
    ("way", "tokens", "dtype"),
    [
        ("blocked", 4, torch.bfloat16),
        ("few", 4, torch.bfloat16),
        ("single", 2, torch.float32),
        ("few", 40, torch.float32),
    ],
)
def test_a_way_that_cannot_compute_this_is_refused_by_name(way: Way, tokens: int, dtype: torch.dtype) -> None:
    moe = layer(model("mixtral-tiny", dtype))
    x = torch.randn(1, tokens, 128).to(dtype)
    with torch.no_grad(), computed_as(way), pytest.raises(ValueError, match=f"'{way}'.*{tokens} rows of {dtype}"):
        moe(x)


def test_the_innermost_wins_and_ends_with_its_block() -> None:
    experts, x = layer(model("mixtral-tiny")).experts, torch.randn(5, 128)
    assert isinstance(experts, Experts)
    before = experts.way(x)
    with computed_as("split"):
        with computed_as("loop"):
            assert experts.way(x) == "loop"
        assert experts.way(x) == "split"
    assert experts.way(x) == before != "split"


@pytest.mark.parametrize("asked", ["loop", "fastest"])
def test_a_whole_command_takes_the_way_of_the_environment(asked: str) -> None:
    code = (
        "import torch; from zoo.model import build; from zoo.registry import find_spec\n"
        "model = build(find_spec('mixtral-tiny').model)\n"
        "print(model.layers[0].ffn.experts.way(torch.randn(5, 128)))"
    )
    environment = {**os.environ, VARIABLE: asked}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if asked == "loop":
        assert done.stdout.strip() == "loop"
    else:
        assert done.returncode != 0
        assert VARIABLE in done.stderr and "'fastest'" in done.stderr and "no such way" in done.stderr
