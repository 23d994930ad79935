"""The ways of computing experts, each beside the one that ``zoo.moe.ways`` takes by itself.

The default is right where no other way is clearly above it: ratios below 1 here are ways that would have been faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import get_args

import torch
from torch import Tensor

from zoo.bench.layer import INPUTS, MANY, SHAPES, Layer, Pass, one_layer, passes
from zoo.bench.peers import check_equal
from zoo.bench.rows import OURS, Options, Row
from zoo.bench.timing import interleaved
from zoo.moe.layer import MoE
from zoo.moe.ways import Way, computed_as


def rows(options: Options) -> Iterator[Row]:
    """Seconds of a call of every case that ``options`` asks for."""
    for name, shape in SHAPES.items():
        wanted = {case: of for case, of in passes(name).items() if options.wants(case)}
        if wanted:
            layer, _ = one_layer(shape, options)
            for case, of in wanted.items():
                yield _row(case, layer, shape.hidden_size, of, options)


def _row(case: str, moe: MoE, hidden_size: int, of: Pass, options: Options) -> Row:
    generator = torch.Generator().manual_seed(0)
    few = of.tokens < MANY
    inputs = torch.randn((INPUTS if few else 1, 1, of.tokens, hidden_size), generator=generator)
    inputs = inputs.to(options.device, options.dtype)
    layer = Layer(lambda x: moe(x)[0], moe)
    call = layer.forward_and_backward if of.backward else layer.forward
    calls: dict[str, Callable[[], None]] = {OURS: _turns(call, inputs)}
    with torch.no_grad():
        expected = moe(inputs[0])[0]
    for way in get_args(Way):
        try:
            with computed_as(way):
                call(inputs[0])
                with torch.no_grad():
                    check_equal(case, way, moe(inputs[0])[0], expected, options.dtype)
        except ValueError:  # it cannot compute this
            continue
        calls[way] = _turns(_as(way, call), inputs)
    warmups, repeat = (INPUTS, 2 * INPUTS) if few else (1, 1)
    return Row("experts", case, interleaved(calls, options.rounds, warmups=warmups, repeat=repeat))


def _as(way: Way, call: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def computed(x: Tensor) -> None:
        with computed_as(way):
            call(x)

    return computed


def _turns(call: Callable[[Tensor], None], inputs: Tensor) -> Callable[[], None]:
    turns = cycle(inputs)
    return lambda: call(next(turns))
