"""The terms of the training loss of one micro-batch, as sums that can be added over micro-batches and over ranks.

Shapes: B batch, S sequence, D model, E experts, L MoE layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zoo.layers.sequence import positions_in_runs
from zoo.model import Decoder, DecoderOutput
from zoo.moe.balance import load_balance_loss, z_loss
from zoo.moe.stats import expert_counts
from zoo.parallel.strategy import MoEParallelStrategy
from zoo.training.data.packing import IGNORED, PADDING_DOCUMENT

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""(hidden [B, S, D], labels [B, S], -100 to ignore) → sum of −ln p in nats, fp32 scalar."""
Scope = Literal["micro_batch", "sequence"]


@dataclass
class StepSums:
    """Sums over the micro-batches of one optimizer step. The losses are weighted with the micro-batch's labels."""

    labels: Tensor
    nll: Tensor
    mtp_nll: Tensor
    """Mean over MTP modules of the sums of theirs; 0 where none ran."""
    load_balance: Tensor
    z: Tensor
    expert_counts: Tensor
    """[L, E] assignments; L = 0 in a dense model."""

    def __add__(self, other: StepSums) -> StepSums:
        return StepSums(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def map(self, function: Callable[[Tensor], Tensor]) -> StepSums:
        """``function`` of every sum."""
        return StepSums(*(function(getattr(self, f.name)) for f in dataclasses.fields(self)))


def mtp_nll(nll: TokenLoss, hidden: Sequence[Tensor], labels: Tensor, document_ids: Tensor) -> Tensor:
    """Mean over MTP modules k = 1, 2, … of their sums of −ln p (DeepSeek-V3, arXiv 2412.19437, equations 24 and 25).

    The target at position i is token i + k + 1, where that is a label (at position i + k) and of the same document.

    Args:
        nll: ``Decoder.nll``.
        hidden: of each module, [B, S, D].
        labels: [B, S], the next token, -100 to ignore.
        document_ids: [B, S]; neighbours of equal id are one document.

    Returns:
        Nats, fp32 scalar; without modules 0. Divided by the number of labels (the paper's T), it is their loss.
    """
    positions = positions_in_runs(document_ids)
    total = labels.new_zeros((), dtype=torch.float32)
    for k, of_module in enumerate(hidden, start=1):
        targets = torch.full_like(labels, IGNORED)
        within = positions[:, k:] - positions[:, :-k] == k
        targets[:, :-k] = labels[:, k:].where(within, IGNORED)
        total = total + nll(of_module, targets)
    return total / max(len(hidden), 1)


def label_count(labels: Tensor) -> Tensor:
    """Number of labels that a loss is taken from, fp32."""
    return (labels != IGNORED).sum().float()


def micro_batch_sums(
    model: Decoder,
    output: DecoderOutput,
    batch: Mapping[str, Tensor],
    scope: Scope,
    parallel: MoEParallelStrategy | None,
) -> StepSums:
    """The terms of the loss, with gradient, and the expert counts of one micro-batch.

    Args:
        model: Whose loss it is.
        output: Of the model, for ``batch``; its logits are not used.
        batch: ``labels`` and ``document_ids``, each [B, S].
        scope: Whether the load fractions of the balance loss are taken over the micro-batch or over each sequence.
        parallel: What spreads the micro-batch over ranks, if it is spread: its terms are this rank's share then.
    """
    nll, count = model.nll(output.hidden, batch["labels"]), label_count(batch["labels"])
    ahead = mtp_nll(model.nll, output.mtp_hidden, batch["labels"], batch["document_ids"])
    routing = output.router_outputs
    if not routing:
        zero = nll.new_zeros(())
        return StepSums(count, nll, ahead, zero, zero, count.new_zeros(0, 0))
    tokens = batch["document_ids"] != PADDING_DOCUMENT
    counts = torch.stack([expert_counts(r, tokens) for r in routing])
    whole_counts: Sequence[Tensor] | None = None
    per_token, per_balance = count, count
    if parallel is not None:
        per_token, per_sequence = _shares(count, tokens, parallel)
        if scope == "sequence":
            per_balance = per_sequence
        else:
            per_balance, whole_counts = per_token, list(parallel.sum_over_data(counts))
    return StepSums(
        labels=count,
        nll=nll,
        mtp_nll=ahead,
        load_balance=per_balance * load_balance_loss(routing, tokens, scope, counts=whole_counts),
        z=per_token * z_loss(routing, tokens),
        expert_counts=counts,
    )


def _shares(labels: Tensor, tokens: Tensor, parallel: MoEParallelStrategy) -> tuple[Tensor, Tensor]:
    """Weights of a mean over this rank's tokens, and of one over its sequences.

    A micro-batch is the rows of all data ranks, as one process would see it: its labels weigh its mean, of which this
    rank's is a part by its share of the tokens (or sequences).
    """
    mine = torch.stack((labels, tokens.sum().float(), tokens.any(dim=1).sum().float()))
    whole = parallel.sum_over_data(mine)
    share = mine / whole.clamp(min=1)
    return whole[0] * share[1], whole[0] * share[2]
