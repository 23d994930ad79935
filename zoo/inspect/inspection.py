"""One look at the routers of a model: passes over a text, and what was measured as plain values for a report.

Shapes: B batch, S sequence, T = B·S tokens, D model, L MoE layers, E experts, K top-k, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.inspect.measures import chosen_experts
from zoo.inspect.metrics import AgreementMetric, RoutingMetric, TokenExpertMetric, WindowMetric
from zoo.inspect.similarity import shared_share
from zoo.inspect.specialisation import MINIMUM
from zoo.inspect.text import Text
from zoo.model import Block, Decoder
from zoo.moe.layer import MoE
from zoo.moe.router import RouterOutput
from zoo.training.data.packing import PADDING_DOCUMENT

SAMPLE = 256
"""Tokens, spread over all data, that every expert computes to tell how alike their outputs are."""

MOST_TYPES = 500
"""Token types that are tested: the most frequent ones."""


@dataclass(frozen=True)
class Settings:
    """How to look.

    Args:
        sequence_length: S.
        batch_size: B.
        noise: size of what is added to every embedding, relative to its own.
        seed: of the noise and of permutations.

    Raises:
        ValueError: a number below its least.
    """

    sequence_length: int = 128
    batch_size: int = 16
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for field, least in (("sequence_length", 2), ("batch_size", 1), ("noise", 0), ("seed", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} = {getattr(self, field)}: give {least} or more")


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of all sets of data."""

    input_ids: Tensor
    """[W, S]"""
    document_ids: Tensor
    """[W, S]"""
    labels: Tensor
    """[W], the set of data that each is of."""

    @classmethod
    def of(cls, texts: Sequence[Text], length: int) -> Windows:
        """All windows of ``texts``, one set after the other."""
        cut = [text.windows(length) for text in texts]
        labels = [torch.full((len(ids),), number) for number, (ids, _) in enumerate(cut)]
        return cls(torch.cat([ids for ids, _ in cut]), torch.cat([docs for _, docs in cut]), torch.cat(labels))

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """``input_ids`` and ``document_ids`` of ``size`` windows at a time."""
        for ids, documents in zip(self.input_ids.split(size), self.document_ids.split(size), strict=True):
            yield ids.to(device), documents.to(device)

    def frequent_types(self) -> tuple[Tensor, Tensor]:
        """Ids in ascending order of the types with ``MINIMUM`` occurrences, at most ``MOST_TYPES``; how many each."""
        types, occurrences = self.input_ids[self.document_ids != PADDING_DOCUMENT].unique(return_counts=True)
        most = occurrences.argsort(descending=True, stable=True)[:MOST_TYPES].sort().values
        most = most[occurrences[most] >= MINIMUM]
        return types[most], occurrences[most]


@dataclass(frozen=True, eq=False)
class Observed:
    """What a pass over the windows has shown."""

    routing: RoutingMetric
    windows: WindowMetric
    types: TokenExpertMetric
    experts: list[list[Tensor]]
    """By batch and layer: ``chosen_experts`` [tokens, K] of all tokens but padding."""
    samples: list[Tensor]
    """By layer: inputs [about SAMPLE, D] of the MoE layer."""
    shared: list[MeanMetric]
    """By layer: the shared experts' part of the output norm; empty without shared experts."""
    limited: bool
    """Whether experts may leave out tokens."""


def moe_layers(model: Decoder) -> list[MoE]:
    """The MoE layers of the decoder itself, without those of MTP modules."""
    blocks = [cast(Block, block).ffn for block in model.layers]
    return [ffn for ffn in blocks if isinstance(ffn, MoE)]


def check_sparse(model: Decoder, name: str) -> None:
    """Refuse a model without experts.

    Raises:
        ValueError: naming it.
    """
    if not moe_layers(model):
        raise ValueError(f"{name}: a dense model has no routers to look at; give one with experts (`zoo list`)")


@torch.inference_mode()
def observe(
    model: Decoder, windows: Windows, settings: Settings, types: Tensor, advance: Callable[[], None]
) -> Observed:
    """One pass with everything that is measured of one model alone.

    Args:
        types: ids of the token types to count, of ``Windows.frequent_types``.
        advance: called after each batch.
    """
    moe, device = model.config.moe, _device(model)
    layers = moe_layers(model)
    assert moe is not None
    routing = RoutingMetric(len(layers), moe.num_experts).to(device)
    of_windows = WindowMetric().to(device)
    of_types = TokenExpertMetric(len(layers), moe.num_experts, types).to(device)
    experts: list[list[Tensor]] = []
    samples: list[list[Tensor]] = [[] for _ in layers]
    shared = [MeanMetric().to(device) for layer in layers if layer.shared_experts is not None]
    for metric in shared:
        metric.set_dtype(torch.float64)
    batches = -(-len(windows.input_ids) // settings.batch_size)
    limited = False
    for ids, documents in windows.batches(settings.batch_size, device):
        keep = documents != PADDING_DOCUMENT
        tokens = keep.flatten().nonzero().flatten()
        spread = tokens[:: max(1, len(tokens) * batches // SAMPLE)]

        def look(layer: int, module: MoE, x: Tensor, out: Tensor, spread: Tensor = spread, keep: Tensor = keep) -> None:
            samples[layer].append(x.flatten(0, 1)[spread])
            if module.shared_experts is not None:
                shared[layer].update(shared_share(module, x, out)[keep.flatten()])

        with _watching(layers, look):
            outputs = _route(model, ids, documents)
        limited = limited or any(output.kept is not None for output in outputs)
        routing.update(outputs, keep)
        of_windows.update(outputs, keep)
        of_types.update(outputs, ids, keep)
        experts.append(_chosen(outputs, keep))
        advance()
    return Observed(routing, of_windows, of_types, experts, [torch.cat(parts) for parts in samples], shared, limited)


@torch.inference_mode()
def agreement(
    model: Decoder,
    windows: Windows,
    settings: Settings,
    before: Sequence[Sequence[Tensor]],
    noise: float,
    advance: Callable[[], None],
) -> AgreementMetric:
    """A pass that compares the experts of every token with those that it had in another pass.

    Args:
        before: ``Observed.experts``.
        noise: relative size of what is added to the embeddings; 0 adds nothing.
    """
    device = _device(model)
    metric = AgreementMetric(len(moe_layers(model)))
    with _noisy(model.embed_tokens, noise, settings.seed):
        for known, (ids, documents) in zip(before, windows.batches(settings.batch_size, device), strict=True):
            metric.update(known, _chosen(_route(model, ids, documents), documents != PADDING_DOCUMENT))
            advance()
    return metric


def check_comparable(model: Decoder, other: Decoder, name: str) -> None:
    """Refuse another checkpoint whose experts have no counterparts.

    Raises:
        ValueError: other numbers of MoE layers, of experts, or of token ids.
    """
    for what, one, two in (
        ("MoE layers", len(moe_layers(model)), len(moe_layers(other))),
        ("experts", _experts(model), _experts(other)),
        ("token ids", model.config.vocab_size, other.config.vocab_size),
    ):
        if one != two:
            raise ValueError(
                f"{name}: it has {two} {what}, the model {one}; give a checkpoint of the same architecture"
            )


def _experts(model: Decoder) -> int:
    return model.config.moe.num_experts if model.config.moe else 0


def _route(model: Decoder, ids: Tensor, documents: Tensor) -> tuple[RouterOutput, ...]:
    output = model(ids, document_ids=documents, logits_to_keep=None)
    routing: tuple[RouterOutput, ...] = output.router_outputs
    return routing


def _chosen(outputs: Sequence[RouterOutput], keep: Tensor) -> list[Tensor]:
    """``chosen_experts`` [tokens, K] int16 of each layer, on the CPU: all of a text's are kept for comparisons."""
    return [chosen_experts(output)[keep.flatten()].short().cpu() for output in outputs]


def _device(model: Decoder) -> torch.device:
    return model.embed_tokens.weight.device


@contextmanager
def _watching(layers: Sequence[MoE], look: Callable[[int, MoE, Tensor, Tensor], None]) -> Iterator[None]:
    """Have ``look`` told layer, module, input and output of each MoE layer that runs in the block."""

    def hook(number: int) -> Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, Any]], None]:
        def tell(module: nn.Module, inputs: tuple[Tensor, ...], result: tuple[Tensor, Any]) -> None:
            look(number, cast(MoE, module), inputs[0], result[0])

        return tell

    handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _noisy(embedding: nn.Module, relative: float, seed: int) -> Iterator[None]:
    """Add to every embedding a vector of random direction and ``relative`` times its norm, in the block."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        noise = torch.randn(out.shape, generator=generator).to(out)
        return out + relative * noise * (out.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))

    handle = embedding.register_forward_hook(disturb) if relative else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def against_checkpoints(
    model: Decoder,
    others: Mapping[str, Callable[[], Decoder]],
    windows: Windows,
    settings: Settings,
    before: Sequence[Sequence[Tensor]],
    advance: Callable[[], None],
) -> dict[str, AgreementMetric]:
    """``agreement`` with other checkpoints, one loaded at a time.

    Raises:
        ValueError: one is of another architecture.
    """
    result = {}
    for name, load in others.items():
        other = load()
        check_sparse(other, name)
        check_comparable(model, other, name)
        result[name] = agreement(other, windows, settings, before, 0.0, advance)
    return result
