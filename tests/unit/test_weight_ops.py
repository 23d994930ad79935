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
from zoo.weights.ops import Op, Rename, Split, Stack, Transpose, source_shapes

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
        ends = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2))) for n in whole.shape]
        region = tuple(slice(*pair) for pair in ends)
        box = one.region_to_zoo(region, tuple(whole.shape), lambda name, box: source[box])
        assert torch.equal(box, whole[region])


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("name", model_names())
def test_map_fills_every_parameter_once(name: str, layout: Layout) -> None:
    spec = find_spec(name)
    model = dataclasses.replace(spec.model, num_layers=4)  # one more than any model has dense layers
    ops = get_family(spec.family).weight_map(model, layout)
    shapes = parameter_shapes(model)
    published = source_shapes(ops, shapes)
    assert sorted(target for op in ops for target in op.targets) == sorted(shapes)
    assert sum(torch.Size(s).numel() for s in published.values()) == sum(torch.Size(s).numel() for s in shapes.values())
