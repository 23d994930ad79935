"""Reversible operations: there and back, for any sizes; and every family's map against the decoder's own names."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zoo.families import get_family
from zoo.families.base import Layout
from zoo.registry import find_spec, model_names
from zoo.weights.convert import parameter_shapes
from zoo.weights.ops import Copies, Op, Rename, Split, Stack, source_shapes
from zoo.weights.rearrange import Chain, Cut, Transpose

sizes = st.integers(1, 4)


def there_and_back(op: Op, sources: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run ``op`` both ways; checks that both see every name once. Returns the targets."""
    targets = dict(op.to_zoo(sources.__getitem__))
    assert tuple(targets) == op.targets
    back = dict(op.to_published(targets.__getitem__))
    assert tuple(back) == op.sources
    assert all(torch.equal(back[name], tensor) for name, tensor in sources.items())
    shape = tuple(targets[op.targets[0]].shape)
    assert all(op.source_shape(shape) == tuple(tensor.shape) for tensor in sources.values())
    return targets


@given(rows=sizes, columns=sizes)
def test_rename(rows: int, columns: int) -> None:
    source = torch.randn(rows, columns)
    assert there_and_back(Rename("a", "b"), {"a": source})["b"] is source


@given(experts=sizes, rows=sizes, columns=sizes)
def test_stack(experts: int, rows: int, columns: int) -> None:
    names = tuple(f"{e}.{part}" for e in range(experts) for part in ("gate", "up"))
    sources = {name: torch.randn(rows, columns) for name in names}
    stacked = there_and_back(Stack(names, "all", leading=(experts, 2)), sources)["all"]
    for e in range(experts):
        assert torch.equal(stacked[e, 0], sources[f"{e}.gate"])
        assert torch.equal(stacked[e, 1], sources[f"{e}.up"])


@given(experts=sizes, rows=sizes, columns=sizes)
def test_split(experts: int, rows: int, columns: int) -> None:
    source = torch.randn(experts, 2 * rows, columns)
    split = there_and_back(Split("a", "b", dim=1, parts=2), {"a": source})["b"]
    assert torch.equal(split[:, 0], source[:, :rows])
    assert torch.equal(split[:, 1], source[:, rows:])


@given(experts=sizes, rows=sizes, columns=sizes, data=st.data())
def test_transpose(experts: int, rows: int, columns: int, data: st.DataObject) -> None:
    source = torch.randn(experts, columns, 2 * rows)
    op = Transpose("a", "b", (0, 3, 2, 1), interleaved=2)
    gate_up = there_and_back(op, {"a": source})["b"]
    assert torch.equal(gate_up[:, 0], source[..., ::2].mT)
    assert torch.equal(gate_up[:, 1], source[..., 1::2].mT)
    plain = Transpose("a", "b", (0, 2, 1))
    down = there_and_back(plain, {"a": source})["b"]
    assert torch.equal(down, source.mT)
    for whole, one in ((gate_up, op), (down, plain)):
        region = draw_region(data, whole)
        box = one.region_to_zoo("b", region, tuple(whole.shape), lambda name, box: source[box])
        assert torch.equal(box, whole[region])


@given(rows=st.lists(sizes, min_size=1, max_size=3), columns=sizes, data=st.data())
def test_cut(rows: list[int], columns: int, data: st.DataObject) -> None:
    source, names = torch.randn(sum(rows), columns), tuple("bcd"[: len(rows)])
    op = Cut("a", names, tuple(rows))
    cut = there_and_back(op, {"a": source})
    assert torch.equal(torch.cat(list(cut.values())), source)
    name = data.draw(st.sampled_from(names))
    region = draw_region(data, cut[name])
    box = op.region_to_zoo(name, region, tuple(cut[name].shape), lambda name, box: source[box])
    assert torch.equal(box, cut[name][region])


@given(experts=sizes, rows=sizes, columns=sizes, data=st.data())
def test_row_17_dbrx_experts(experts: int, rows: int, columns: int, data: st.DataObject) -> None:
    """w1 and v1 [E·F, D] are gate and up, each applied transposed as usual; w2 [E·F, D] is applied as it lies."""
    sources = {name: torch.randn(experts * rows, columns) for name in ("w1", "v1", "w2")}
    gate_up = Chain(
        (
            Stack(("w1", "v1"), "all", leading=(2,)),
            Split("all", "split", dim=1, parts=experts),
            Transpose("split", "gate_up", (1, 0, 2, 3)),
        )
    )
    down = Chain((Split("w2", "split", dim=0, parts=experts), Transpose("split", "down", (0, 2, 1))))
    ours = there_and_back(gate_up, {name: sources[name] for name in ("w1", "v1")})
    ours |= there_and_back(down, {"w2": sources["w2"]})
    for e in range(experts):
        mine = slice(e * rows, (e + 1) * rows)
        assert torch.equal(ours["gate_up"][e, 0], sources["w1"][mine])
        assert torch.equal(ours["gate_up"][e, 1], sources["v1"][mine])
        assert torch.equal(ours["down"][e], sources["w2"][mine].T)
    for op, whole in ((gate_up, ours["gate_up"]), (down, ours["down"])):
        region = draw_region(data, whole)
        read = []

        def read_box(name: str, box: tuple[slice, ...], read: list[int] = read) -> Tensor:
            read.append(sources[name][box].numel())
            return sources[name][box]

        part = op.region_to_zoo(op.targets[0], region, tuple(whole.shape), read_box)
        assert torch.equal(part, whole[region])
        assert sum(read) == part.numel()


def draw_region(data: st.DataObject, whole: Tensor) -> tuple[slice, ...]:
    """Any box of ``whole`` that is not empty."""
    starts = [data.draw(st.integers(0, n - 1)) for n in whole.shape]
    return tuple(slice(a, data.draw(st.integers(a + 1, n))) for a, n in zip(starts, whole.shape, strict=True))


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("name", model_names())
def test_map_fills_every_parameter_once(name: str, layout: Layout) -> None:
    spec = find_spec(name)
    model = dataclasses.replace(spec.model, num_layers=4)  # one more than any model has dense layers
    ops = get_family(spec.family).weight_map(model, layout)
    shapes = parameter_shapes(model)
    published = source_shapes(ops, shapes)
    assert sorted(target for op in ops for target in op.targets) == sorted(shapes)
    for copy in [name for op in ops if isinstance(op, Copies) for name in op.sources[1:]]:
        del published[copy]
    assert sum(torch.Size(s).numel() for s in published.values()) == sum(torch.Size(s).numel() for s in shapes.values())
