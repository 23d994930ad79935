"""The decode step of one prompt as one compiled graph (``torch.compile`` with inductor), for the CPU.

With few or small weights a step is bound by what the host does for each of its hundreds of calls; compiled, there is
one. What would ask for another graph for another token or length is kept out of it: the cache is attended to at its
whole capacity, which is a dynamic size, behind a mask, and the position is a tensor.

Shapes: K top-k, D model, F FFN, L capacity of the cache, V vocabulary.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from zoo.cache import Cache, LayerCache, StateCache
from zoo.layers.sequence import SequenceLayout
from zoo.model import Decoder
from zoo.moe.clamped import ClampedExperts, clamped_swiglu
from zoo.moe.experts import DropoutExperts, Experts, GEGLUExperts
from zoo.moe.layer import MoE
from zoo.moe.router import RouterOutput

SCRATCH = 256
"""Capacity of the cache that the step is compiled with; any other runs the same graph."""
EXPERTS = (Experts, GEGLUExperts, DropoutExperts, ClampedExperts)
"""Kinds that ``_mix_chosen`` computes."""
OPTIONS: dict[str, Any] = {"fullgraph": True, "isolate_recompiles": True, "options": {"cpp_wrapper": True}}
"""Of ``torch.compile``: one graph or an error, a model's apart from another's, and no Python between its loops."""


class CompiledStep:
    """``zoo.generation.decode_step`` of one model and one prompt, for ``step`` of ``generate``.

    It is compiled when it is made, which takes tens of seconds the first time and a few where the files are there that
    torch keeps on disk (``TORCHINDUCTOR_CACHE_DIR``). Weights are the model's own tensors: changed in place they count,
    after others are put in their place make the step anew.
    """

    def __init__(self, model: Decoder) -> None:
        """Compile the step of ``model``.

        Raises:
            ValueError: the model is not on a CPU, has a layer that does not compile, or the C++ compiler fails.
        """
        _check(model)
        self._model = model
        self._graph_model = _twin(model)
        self._graph = torch.compile(_step, **OPTIONS)
        self._marked: weakref.ref[Cache] | None = None
        try:
            with torch.inference_mode():
                self(model, torch.zeros(1, 1, dtype=torch.int64), model.new_cache(1, SCRATCH))
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"compile: the decode step of this model does not compile ({reason}); leave it out"
            ) from error

    def __call__(self, model: Decoder, tokens: Tensor, cache: Cache) -> Tensor:
        """tokens [1, 1] int64 → logits [1, V].

        Raises:
            ValueError: another model, a full cache, or one of several rows or with padding.
        """
        if model is not self._model:
            raise ValueError("compile: the step is of another model; make one of this")
        cache.check_room(tokens)
        if cache.batch_size != 1 or cache.valid is not None:
            raise ValueError(f"compile: the cache has {cache.batch_size} rows or padding; give one prompt at a time")
        buffers = [layer.buffers for layer in cache.layers]
        if self._marked is None or self._marked() is not cache:
            for buffer in (buffer for of_layer in buffers for buffer in of_layer):
                torch._dynamo.mark_dynamic(buffer, buffer.ndim - 2)
            self._marked = weakref.ref(cache)
        position = torch.tensor([cache.length])
        rotary = model.rotary(position[None], cache.length + 1, model.embed_tokens.weight.dtype)
        logits: Tensor = self._graph(self._graph_model, tokens, position, rotary, buffers)
        cache.advance(1, None)
        return logits


def _step(
    model: Decoder,
    token: Tensor,
    position: Tensor,
    rotary: tuple[Tensor, Tensor],
    buffers: Sequence[Sequence[Tensor]],
) -> Tensor:
    """token [1, 1] and position [1] int64, buffers [1, …, L, size] of every layer → logits [1, V]."""
    capacity = buffers[0][0].shape[-2]
    layout = _OneToken(1, position[None], capacity - 1, None, token)
    x = model.embed_tokens(token)
    for block, of_layer in zip(model.layers, buffers, strict=True):
        x, _ = block(x, layout, rotary, _Slots(of_layer, position))
    return model.logits(model.norm(x))[:, -1]


class _Slots(LayerCache):
    """Buffers of which one slot is written and all are read."""

    def __init__(self, buffers: Sequence[Tensor], position: Tensor) -> None:
        super().__init__(buffers)
        self.position = position

    def append(self, past: int, *new: Tensor) -> tuple[Tensor, ...]:
        """See ``LayerCache``; views of all L slots."""
        for buffer, values in zip(self.buffers, new, strict=True):
            buffer.index_copy_(buffer.ndim - 2, self.position, values)
        return self.buffers


@dataclass(frozen=True, eq=False)
class _OneToken(SequenceLayout):
    """One new token somewhere in L slots; those behind it are not filled, and hidden by the mask."""

    chunk: int | None = None

    def within(self, window: int | None) -> SequenceLayout:
        """See ``SequenceLayout``."""
        return _OneToken(1, self.positions, self.past, None, self.input_ids, window, self.chunk)

    def in_chunks(self, size: int) -> SequenceLayout:
        """See ``SequenceLayout``."""
        return _OneToken(1, self.positions, self.past, None, self.input_ids, self.window, size)

    @property
    def mask(self) -> Tensor:
        """[1, 1, 1, L] bool."""
        return self.visible

    @property
    def visible(self) -> Tensor:
        """[1, 1, 1, L] bool."""
        key, query = torch.arange(self.keys, device=self.positions.device), self.positions[0]
        visible = key <= query
        if self.window is not None:
            visible = visible & (key > query - self.window)
        if self.chunk is not None:
            visible = visible & (key // self.chunk == query // self.chunk)
        return visible[None, None, None]


def _mix_chosen(experts: nn.Module, x: Tensor, routing: RouterOutput) -> Tensor:
    """x [1, D] → [1, D], its sum over its experts of weight · expert(x).

    Written as sums of products, which inductor makes one loop of that reads the chosen weights where they are.
    """
    assert isinstance(experts, Experts)
    chosen, weights = routing.experts[0], routing.weights.mT
    both = (experts.gate_up[chosen] * x[0]).sum(-1)
    if isinstance(experts, ClampedExperts):
        gate, up = (both + experts.gate_up_bias[chosen]).unbind(1)
        inner = clamped_swiglu(gate, up, experts.limit)
        out = (experts.down[chosen] * inner.unsqueeze(1)).sum(-1) + experts.down_bias[chosen]
    else:
        gate, up = both.unbind(1)
        out = (experts.down[chosen] * (experts.activation(gate) * up).unsqueeze(1)).sum(-1)
    return (out * weights).sum(0, keepdim=True).to(x.dtype)


def _check(model: Decoder) -> None:
    device = model.embed_tokens.weight.device
    if device.type != "cpu":
        raise ValueError(f"compile: the model is on {device}, the step is for a CPU; use device cpu, or leave it out")
    if any(isinstance(layer, StateCache) for layer in model.new_cache(1, 1).layers):
        raise ValueError("compile: a recurrent layer does not compile; leave it out")
    for moe in _moe_layers(model):
        if type(moe.experts) not in EXPERTS or moe.dispatcher is not None:
            raise ValueError(f"compile: experts of kind {type(moe.experts).__name__} do not compile; leave it out")


def _moe_layers(model: Decoder) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def _twin(model: Decoder) -> Decoder:
    """The same modules with the same weights, whose experts compute a single token."""
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
    for moe in _moe_layers(twin):
        vars(moe)["mix"] = partial(_mix_chosen, moe.experts)
    return twin
