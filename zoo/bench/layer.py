"""One MoE layer, with router and shared experts: ours, litgpt's, transformers' with each way of computing experts.

Over many tokens the limit is a dense SwiGLU with the same active FLOPs; over few, reading the weights that they touch,
each once. Memory is what a call needs at its peak without the gradients of the weights, which every way has to make.
Recomputed, ours keeps no activations of the experts for the backward pass, as `parallel.recompute: experts` has it;
compiled, it is part of a graph, as in `zoo generate --compile`.

Shapes: T tokens, D model, F FFN, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from zoo.bench.memory import peak_bytes
from zoo.bench.peers import EXPERTS, GATHERED_BYTES, check_equal, exported, in_litgpt, in_transformers
from zoo.bench.rows import LIMIT, OURS, Options, Row
from zoo.bench.timing import interleaved, reading
from zoo.compiled import OPTIONS, most_rows, twin
from zoo.config import ModelSpec
from zoo.layers.ffn import SwiGLU
from zoo.model import Decoder, build
from zoo.moe.layer import MoE
from zoo.parallel.apply import replace_forward
from zoo.registry import find_spec
from zoo.training.memory import freed_memory_kept

MANY = 2048
FEW = (1, 8, 32)
INPUTS = 8
"""So many inputs take turns where few tokens are computed, lest their experts stay in the cache."""


@dataclass(frozen=True)
class Shape:
    """A layer as one family builds it."""

    family: str
    hidden_size: int
    width: int
    num_experts: int
    top_k: int
    shared: int = 0

    @property
    def matrices(self) -> int:
        """Numbers in the weights of an expert."""
        return 3 * self.hidden_size * self.width

    @property
    def active_width(self) -> int:
        """Inner width that a token goes through."""
        return (self.top_k + self.shared) * self.width

    def spec(self) -> ModelSpec:
        """A model of this one layer."""
        tiny = find_spec(f"{self.family}-tiny")
        assert tiny.model.moe is not None
        moe = replace(
            tiny.model.moe,
            num_experts=self.num_experts,
            top_k=self.top_k,
            moe_intermediate_size=self.width,
            num_shared_experts=self.shared,
            first_k_dense=0,
        )
        model = replace(
            tiny.model,
            hidden_size=self.hidden_size,
            intermediate_size=self.width,
            num_layers=1,
            vocab_size=256,
            moe=moe,
        )
        return replace(tiny, model=model)


@dataclass(frozen=True)
class Pass:
    """What is done with so many tokens."""

    tokens: int
    backward: bool = False
    recompute: bool = False
    """Whether ours computes activations of experts again in the backward pass."""
    compiled: bool = False
    """Whether ours is compiled as in the step of a token."""


@dataclass(frozen=True)
class Layer:
    """A way to compute a layer."""

    function: Callable[[Tensor], Tensor]
    """[1, T, D] → [1, T, D]"""
    module: nn.Module
    """Whose parameters get gradients."""

    def forward(self, x: Tensor) -> None:
        """Without what a backward pass would need."""
        with torch.no_grad():
            self.function(x)

    def forward_and_backward(self, x: Tensor) -> None:
        """With the gradients of x and all parameters, which are gone at the end."""
        x = x.detach().requires_grad_()
        out = self.function(x)
        out.backward(torch.ones_like(out))
        self.module.zero_grad()


SHAPES = {
    "coarse": Shape("mixtral", 512, 1792, 8, 2),
    "coarse-1024": Shape("mixtral", 1024, 3584, 8, 2),
    "fine-64": Shape("deepseek-v3", 512, 224, 64, 6, shared=2),
    "fine-128": Shape("qwen3-moe", 512, 128, 128, 8),
}
COST = {f"cost, {experts} experts": Shape("mixtral", 512, 512, experts, 2) for experts in (8, 16, 32, 64)}
"""Active parameters are the same in all."""


def rows(options: Options) -> Iterator[Row]:
    """Seconds of a call of every case that ``options`` asks for."""
    for name, shape in {**SHAPES, **COST}.items():
        cases = passes(name)
        if name in COST:
            cases = {case: of for case, of in cases.items() if of.backward}
        else:
            again = replace(cases[_trained(name)], recompute=True)
            cases[f"{name}, forward + backward, recomputed, T {MANY:,}"] = again
            if options.device == "cpu":
                most = most_rows(shape.matrices, shape.num_experts, shape.top_k)
                for tokens in (tokens for tokens in FEW if tokens <= most):  # as the step of a token is compiled
                    cases[f"{name}, forward, compiled, T {tokens}"] = Pass(tokens, compiled=True)
        wanted = {case: of for case, of in cases.items() if options.wants(case)}
        if wanted:
            ours, ways = layers(shape, options)
            with freed_memory_kept() if name in COST else nullcontext():  # as in training
                for case, of in wanted.items():
                    with _recomputed(ours) if of.recompute else nullcontext():
                        yield measured(case, shape, ours, ways, of, options)


def passes(name: str) -> dict[str, Pass]:
    """Case → what is done, of a layer of this name."""
    forward = {f"{name}, forward, T {tokens:,}": Pass(tokens) for tokens in (MANY, *FEW)}
    return {_trained(name): Pass(MANY, backward=True), **forward}


def _trained(name: str) -> str:
    return f"{name}, forward + backward, T {MANY:,}"


@contextmanager
def _recomputed(layer: MoE) -> Iterator[None]:
    """Within the block the experts of ``layer`` keep no activations."""
    experts = layer.experts
    replace_forward(experts, partial(experts.forward_again, experts.forward))
    try:
        yield
    finally:
        del vars(experts)["forward"]


def one_layer(shape: Shape, options: Options) -> tuple[MoE, Decoder]:
    """Ours, and the model that it is of."""
    model = build(shape.spec().model, dtype=options.dtype, device=options.device)
    (ours,) = [module for module in model.modules() if isinstance(module, MoE)]
    return ours, model


def layers(shape: Shape, options: Options) -> tuple[MoE, dict[str, Layer]]:
    """Ours, and every way to compute the same weights."""
    spec = shape.spec()
    ours, model = one_layer(shape, options)
    with exported(model, spec) as published:
        whole, lit = in_transformers(published, options), in_litgpt(published, spec, options)
    theirs = whole.get_submodule("model.layers.0.mlp")

    def forward(way: str, x: Tensor) -> Tensor:
        whole.set_experts_implementation(way)
        out: Tensor | tuple[Tensor, Any] = theirs(x)
        return out[0] if isinstance(out, tuple) else out

    peers = {f"transformers {way}": Layer(partial(forward, way), theirs) for way in EXPERTS}
    if lit is not None:
        of_lit = lit.get_submodule("transformer.h.0.mlp")
        peers["litgpt"] = Layer(of_lit, of_lit)
    return ours, {OURS: Layer(lambda x: ours(x)[0], ours), **peers}


def measured(case: str, shape: Shape, ours: MoE, ways: Mapping[str, Layer], of: Pass, options: Options) -> Row:
    """Seconds of ours, of every peer and of the limit on the same inputs, after their results were found equal."""
    tokens, backward = of.tokens, of.backward
    if of.compiled:
        ways = {**ways, OURS: Layer(_compiled(ours), ours)}
    generator = torch.Generator().manual_seed(0)
    few = tokens in FEW
    inputs = torch.randn((INPUTS if few else 1, 1, tokens, shape.hidden_size), generator=generator)
    inputs = inputs.to(options.device, options.dtype)
    if tokens * shape.top_k * shape.matrices * inputs.element_size() > GATHERED_BYTES:
        ways = {way: layer for way, layer in ways.items() if "batched_mm" not in way}
    expected = _results(ways[OURS], inputs[0], not of.compiled)
    for way, layer in ways.items():
        for mine, other in zip(expected, _results(layer, inputs[0], not of.compiled), strict=True):
            check_equal(case, way, mine, other, options.dtype)
    touched = _touched(ours, inputs, shape.matrices)
    calls = {way: _call(layer, inputs, backward) for way, layer in ways.items()}
    if few:
        limit = reading(touched * inputs.element_size(), _elements(ours) * inputs.element_size(), inputs.device)
    else:
        dense = SwiGLU(shape.hidden_size, shape.active_width).to(options.device, options.dtype)
        limit = _call(Layer(dense, dense), inputs, backward)
    warmups, repeat = (INPUTS, 2 * INPUTS) if few else (1, 1)
    seconds = interleaved({**calls, LIMIT: limit}, options.rounds, warmups=warmups, repeat=repeat)
    gradients = _elements(ours) * inputs.element_size() if backward else 0
    peaks = {way: peak_bytes(call, options.device) - gradients for way, call in calls.items()}
    notes = {
        "tokens": tokens,
        "experts": shape.num_experts,
        "touched_bytes": touched * inputs.element_size(),
        "flops": tokens * 6 * shape.hidden_size * shape.active_width * (3 if backward else 1),
    }
    return Row("layer", case, seconds, peaks, notes)


def _compiled(layer: MoE) -> Callable[[Tensor], Tensor]:
    graph_layer, graph = twin(layer), torch.compile(lambda layer, x: layer(x)[0], **OPTIONS)

    def forward(x: Tensor) -> Tensor:
        if x.shape[1] > 1:
            torch._dynamo.mark_dynamic(x, 1)  # the step has one graph for any number of prompts
        out: Tensor = graph(graph_layer, x)
        return out

    return forward


def _results(layer: Layer, x: Tensor, backward: bool) -> tuple[Tensor, ...]:
    """Output, and with ``backward`` the gradient of x."""
    if not backward:
        with torch.no_grad():
            return (layer.function(x),)
    x = x.detach().requires_grad_()
    out = layer.function(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    return out, gradient


def _call(layer: Layer, inputs: Tensor, backward: bool) -> Callable[[], None]:
    """``layer`` on one input after the other."""
    turns, run = cycle(inputs), layer.forward_and_backward if backward else layer.forward
    return lambda: run(next(turns))


def _touched(layer: MoE, inputs: Tensor, matrices: int) -> int:
    """Numbers of the weights that a call reads, in the mean over ``inputs``."""
    with torch.no_grad():
        used = [int(layer(x)[1].experts.unique().numel()) for x in inputs]
    always = _elements(layer) - sum(weight.numel() for weight in layer.experts.parameters())
    return always + matrices * sum(used) // len(used)


def _elements(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())
