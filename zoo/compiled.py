"""The decode step as one compiled graph (``torch.compile`` with inductor), for the CPU.

With few or small weights a step is bound by what the host does for each of its hundreds of calls; compiled, there is
one. What would ask for another graph for another token or length is kept out of it: the cache is attended to at its
whole capacity, which is a dynamic size, behind a mask, and the position is a tensor. So is the number of prompts, from
two on; a single one has a graph of its own.

Shapes: B batch, K top-k, D model, F FFN, L capacity of the cache, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from zoo.cache import Cache, LayerCache, StateCache
from zoo.generation import decode_step
from zoo.layers.linear import Library, uses_onednn
from zoo.layers.sequence import SequenceLayout
from zoo.model import Decoder
from zoo.moe.clamped import ClampedExperts, clamped_swiglu
from zoo.moe.experts import DropoutExperts, Experts, GEGLUExperts
from zoo.moe.layer import MoE
from zoo.moe.router import RouterOutput

M = TypeVar("M", bound=nn.Module)

SCRATCH = 256
"""Capacity of the cache that the step is compiled with; any other runs the same graph."""
EXPERTS = (Experts, GEGLUExperts, DropoutExperts, ClampedExperts)
"""Kinds that ``_mix_chosen`` computes."""
LARGE: dict[Library, int] = {"onednn": 1 << 20, "mkl": 1 << 17}
"""Numbers in the weights of a large expert, by whose products ``decode_step`` has: one that several rows go through is
read for each of them here, and once there."""
READINGS = 1
"""So many of each large expert, in the mean, are faster than hundreds of calls."""
OPTIONS: dict[str, Any] = {"fullgraph": True, "isolate_recompiles": True, "options": {"cpp_wrapper": True}}
"""Of ``torch.compile``: one graph or an error, a model's apart from another's, and no Python between its loops."""


class CompiledStep:
    """``zoo.generation.decode_step`` of one model and of one prompt or of several, for ``step`` of ``generate``.

    It is compiled when it is made, which takes tens of seconds the first time and a few where the files are there that
    torch keeps on disk (``TORCHINDUCTOR_CACHE_DIR``). Weights are the model's own tensors: changed in place they count,
    after others are put in their place make the step anew.
    """

    def __init__(self, model: Decoder, *, several: bool = False) -> None:
        """Compile the step of ``model``.

        Args:
            several: for two prompts and more, padded or not; by default for one. The last one that is left of several
                is computed by ``decode_step``, as are too many for ``READINGS``.

        Raises:
            ValueError: the model is not on a CPU, has a layer that does not compile, or the C++ compiler fails.
        """
        _check(model)
        self._model = model
        self._several, self._most = several, most_prompts(model)
        self._graph_model = twin(model)
        self._graph = torch.compile(_step, **OPTIONS)
        self._marked: weakref.ref[Cache] | None = None
        rows = 1 + several
        try:
            with torch.inference_mode():
                self(model, torch.zeros(rows, 1, dtype=torch.int64), model.new_cache(rows, SCRATCH))
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"compile: the decode step of this model does not compile ({reason}); leave it out"
            ) from error

    def __call__(self, model: Decoder, tokens: Tensor, cache: Cache) -> Tensor:
        """tokens [B, 1] int64 → logits [B, V].

        Raises:
            ValueError: another model, a full cache, or one of several rows or with padding where it is for one prompt.
        """
        if model is not self._model:
            raise ValueError("compile: the step is of another model; make one of this")
        cache.check_room(tokens)
        if not self._several and (cache.batch_size != 1 or cache.valid is not None):
            raise ValueError(
                f"compile: the cache has {cache.batch_size} rows or padding; make the step with several=True, or give "
                "one prompt at a time"
            )
        if self._several and not 1 < cache.batch_size <= self._most:
            return decode_step(model, tokens, cache)
        slot, places = torch.tensor([cache.length]), _places(cache) if self._several else None
        positions = slot[None] if places is None else places[:, cache.length, None]
        rotary = model.rotary(positions, cache.length + 1, model.embed_tokens.weight.dtype)
        buffers = [layer.buffers for layer in cache.layers]
        if self._marked is None or self._marked() is not cache:
            self._mark([buffer for of_layer in buffers for buffer in of_layer], -2)
            self._marked = weakref.ref(cache)
        if places is not None:
            self._mark([places], -1)
            self._mark([tokens, positions, *rotary])
        logits: Tensor = self._graph(self._graph_model, tokens, slot, positions, places, rotary, buffers)
        cache.advance(1, None)
        return logits

    def _mark(self, tensors: Sequence[Tensor], slots: int | None = None) -> None:
        """Have the graph take any number of prompts, and of slots, which are the dimension ``slots``."""
        for tensor in tensors:
            if slots is not None:
                torch._dynamo.mark_dynamic(tensor, tensor.ndim + slots)
            if self._several:
                torch._dynamo.mark_dynamic(tensor, 0)


def most_prompts(model: Decoder) -> float:
    """How many prompts at a time the compiled step is the faster for; with more it leaves them to ``decode_step``."""
    moe = model.config.moe
    if moe is None:
        return math.inf
    numbers = (sum(w[0].numel() for w in layer.experts.parameters()) for layer in _moe_layers(model))
    return most_rows(max(numbers, default=0), moe.num_experts, moe.top_k)


def most_rows(numbers: int, num_experts: int, top_k: int) -> float:
    """The same of rows that go through a layer whose experts have so many numbers each."""
    large = numbers >= LARGE["onednn" if uses_onednn() else "mkl"]
    return READINGS * num_experts // top_k if large else math.inf


def _places(cache: Cache) -> Tensor:
    """[B, L] int64, the position of the token in each slot, which the next one fills; -1 for padding and free ones."""
    seen = torch.zeros(cache.batch_size, cache.max_length, dtype=torch.bool)
    seen[:, : cache.length] = True if cache.valid is None else cache.valid
    seen[:, cache.length] = True
    return seen.cumsum(1).sub_(1).masked_fill_(~seen, -1)


def _step(
    model: Decoder,
    tokens: Tensor,
    slot: Tensor,
    positions: Tensor,
    places: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    buffers: Sequence[Sequence[Tensor]],
) -> Tensor:
    """tokens and positions [B, 1] and slot [1] int64, buffers [B, …, L, size] of every layer → logits [B, V].

    Without ``places`` there is one token, whose position is its slot.
    """
    capacity = buffers[0][0].shape[-2]
    layout = _OneToken(len(tokens), positions, capacity - 1, None, tokens, places=places)
    x = model.embed_tokens(tokens)
    for block, of_layer in zip(model.layers, buffers, strict=True):
        x, _ = block(x, layout, rotary, _Slots(of_layer, slot))
    return model.logits(model.norm(x))[:, -1]


class _Slots(LayerCache):
    """Buffers of which one slot is written and all are read."""

    def __init__(self, buffers: Sequence[Tensor], slot: Tensor) -> None:
        super().__init__(buffers)
        self.slot = slot

    def append(self, past: int, *new: Tensor) -> tuple[Tensor, ...]:
        """See ``LayerCache``; views of all L slots."""
        for buffer, values in zip(self.buffers, new, strict=True):
            buffer.index_copy_(buffer.ndim - 2, self.slot, values)
        return self.buffers


@dataclass(frozen=True, eq=False)
class _OneToken(SequenceLayout):
    """One new token of every row somewhere in L slots; those behind it are not filled, and hidden by the mask."""

    chunk: int | None = None
    places: Tensor | None = None
    """[B, L] int64 as ``_places``; None: of a single row without padding, in which positions are slots."""

    def within(self, window: int | None) -> SequenceLayout:
        """See ``SequenceLayout``."""
        return replace(self, window=window)

    def in_chunks(self, size: int) -> SequenceLayout:
        """See ``SequenceLayout``."""
        return replace(self, chunk=size)

    @property
    def mask(self) -> Tensor:
        """[B, 1, 1, L] bool."""
        return self.visible

    @property
    def visible(self) -> Tensor:
        """[B, 1, 1, L] bool."""
        query = self.positions
        key = torch.arange(self.keys, device=query.device)[None] if self.places is None else self.places
        visible = key <= query if self.places is None else key >= 0
        if self.window is not None:
            visible = visible & (key > query - self.window)
        if self.chunk is not None:
            visible = visible & (key // self.chunk == query // self.chunk)
        return visible[:, None, None]


def _mix_chosen(experts: nn.Module, x: Tensor, routing: RouterOutput) -> Tensor:
    """x [B, D] → [B, D], each row's sum over its experts of weight · expert(x).

    Written as sums of products, which inductor makes one loop of that reads the chosen weights where they are.
    """
    assert isinstance(experts, Experts)
    chosen, weights = routing.experts, routing.weights.unsqueeze(-1)
    both = (experts.gate_up[chosen] * x[:, None, None, None]).sum(-1)
    if isinstance(experts, ClampedExperts):
        gate, up = (both + experts.gate_up_bias[chosen]).unbind(2)
        inner = clamped_swiglu(gate, up, experts.limit)
        out = (experts.down[chosen] * inner.unsqueeze(2)).sum(-1) + experts.down_bias[chosen]
    else:
        gate, up = both.unbind(2)
        out = (experts.down[chosen] * (experts.activation(gate) * up).unsqueeze(2)).sum(-1)
    return (out * weights).sum(1).to(x.dtype)


def _check(model: Decoder) -> None:
    device = model.embed_tokens.weight.device
    if device.type != "cpu":
        raise ValueError(f"compile: the model is on {device}, the step is for a CPU; use device cpu, or leave it out")
    if any(isinstance(layer, StateCache) for layer in model.new_cache(1, 1).layers):
        raise ValueError("compile: a recurrent layer does not compile; leave it out")
    for moe in _moe_layers(model):
        if type(moe.experts) not in EXPERTS or moe.dispatcher is not None:
            raise ValueError(f"compile: experts of kind {type(moe.experts).__name__} do not compile; leave it out")


def _moe_layers(module: nn.Module) -> list[MoE]:
    return [layer for layer in module.modules() if isinstance(layer, MoE)]


def twin(module: M) -> M:
    """The same modules with the same weights, whose experts compute few tokens as ``torch.compile`` takes them."""
    tensors = (*module.parameters(), *module.buffers())
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).eval()
    for moe in _moe_layers(copied):
        vars(moe)["mix"] = partial(_mix_chosen, moe.experts)
    return copied
