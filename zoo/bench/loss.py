"""Cross-entropy of a linear output head, from hidden states to the gradients of both.

The peer is transformers' loss on the logits of ``F.linear``; ``F.cross_entropy`` on the same shows what is the loss
function's own. The limit is the three matrix products alone: logits, and both gradients. Memory is the peak of one
forward and backward pass beyond hidden states and weight (``zoo.bench.memory``); the gradients are part of it.

Shapes: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.bench.memory import peak_bytes
from zoo.bench.peers import check_equal
from zoo.bench.rows import LIMIT, OURS, Options, Row
from zoo.bench.timing import interleaved
from zoo.layers.linear_nll import chunk_tokens, linear_nll

TRANSFORMERS, PLAIN = "transformers", "cross_entropy"
MeanLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [T, D], weight [V, D], labels [T]) → mean over the tokens."""


@dataclass(frozen=True)
class Case:
    """Sizes of a head and of what goes into it."""

    vocab_size: int
    hidden_size: int
    tokens: int = 2048

    @property
    def name(self) -> str:
        """As it is printed."""
        return f"vocabulary {self.vocab_size:,}, d {self.hidden_size}, T {self.tokens}"


CASES = (Case(320, 128), Case(2048, 256), Case(32_768, 512), Case(131_072, 512))


def rows(options: Options) -> Iterator[Row]:
    """Seconds of the loss and its gradients at every vocabulary that ``options`` asks for."""
    for case in CASES:
        if options.wants(case.name):
            yield measured(case, options)


def measured(case: Case, options: Options) -> Row:
    """One row, after the losses and gradients of all were found to be equal."""
    generator = torch.Generator().manual_seed(0)
    make = partial(torch.randn, generator=generator)
    hidden = make(case.tokens, case.hidden_size).to(options.device, options.dtype).requires_grad_()
    weight = (0.05 * make(case.vocab_size, case.hidden_size)).to(options.device, options.dtype).requires_grad_()
    labels = torch.randint(case.vocab_size, (case.tokens,), generator=generator).to(options.device)
    losses: dict[str, MeanLoss] = {OURS: _ours, TRANSFORMERS: _transformers, PLAIN: _plain}
    _check(case, losses, hidden, weight, labels)
    ways: dict[str, Callable[[], object]] = {
        name: partial(_step, loss, hidden, weight, labels) for name, loss in losses.items()
    }
    peaks = {name: peak_bytes(way, options.device) for name, way in ways.items()}
    hidden.grad = weight.grad = None
    ways[LIMIT] = partial(_products, hidden.detach(), weight.detach())
    seconds = interleaved(ways, options.rounds, repeat=5 if case.vocab_size < 10_000 else 1)
    notes = {
        "chunk_tokens": min(case.tokens, chunk_tokens(case.vocab_size, torch.device(options.device).type)),
        "gradient_bytes": (hidden.numel() + weight.numel()) * hidden.element_size(),
    }
    return Row("loss", case.name, seconds, peaks, notes)


def _check(case: Case, losses: dict[str, MeanLoss], hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Raise where a way has another loss or other gradients than ours."""
    expected: list[Tensor] = []
    for name, loss in losses.items():
        value = loss(hidden, weight, labels)
        found = [value.detach(), *torch.autograd.grad(value, (hidden, weight))]
        expected = expected or found
        for ours, theirs in zip(expected, found, strict=True):
            check_equal(case.name, name, ours, theirs, hidden.dtype)


def _step(loss: MeanLoss, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    hidden.grad = weight.grad = None
    loss(hidden, weight, labels).backward()


def _ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_nll(hidden, weight, labels) / len(labels)


def _transformers(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = F.linear(hidden, weight)
    loss: Tensor = ForCausalLMLoss(logits[None], None, len(weight), shift_labels=labels[None])
    return loss


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def _products(hidden: Tensor, weight: Tensor) -> None:
    logits = hidden @ weight.t()
    _ = logits @ weight, logits.t() @ hidden
