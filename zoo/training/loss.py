"""The training loss: its terms as sums that can be added over micro-batches and over ranks, and their weights.

Shapes: B batch, S sequence, D model, E experts, L MoE layers, K top-k, G devices that the experts are grouped by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from zoo.config import ModelConfig
from zoo.layers.sequence import positions_in_runs
from zoo.model import Decoder, DecoderOutput
from zoo.moe.balance import (
    TokenGroups,
    communication_balance_loss,
    device_balance_loss,
    load_balance_loss,
    sent_tokens,
    z_loss,
)
from zoo.moe.router import RouterOutput
from zoo.moe.stats import dropped_fraction, expert_counts
from zoo.parallel.strategy import MoEParallelStrategy
from zoo.training.data.packing import IGNORED, PADDING_DOCUMENT
from zoo.training.ramp import Weight, check_weight, weight_at

TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""(hidden [B, S, D], labels [B, S], -100 to ignore) → sum of −ln p in nats, fp32 scalar."""
Scope = Literal["micro_batch", "sequence", "global_batch"]


@dataclass
class StepSums:
    """Sums over the micro-batches of one optimizer step. The losses are weighted with the micro-batch's labels."""

    labels: Tensor
    nll: Tensor
    mtp_nll: Tensor
    """Mean over MTP modules of the sums of theirs; 0 where none ran."""
    load_balance: Tensor
    device_balance: Tensor
    communication_balance: Tensor
    z: Tensor
    expert_counts: Tensor
    """[L, E] assignments; L = 0 in a dense model."""
    dropped: Tensor
    """Assignments of all layers that found no place in their expert."""
    sent: Tensor
    """[L, G + 1] tokens sent to each device, and all tokens; [L, 0] where no loss asks."""

    def __add__(self, other: StepSums) -> StepSums:
        return StepSums(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def map(self, function: Callable[[Tensor], Tensor]) -> StepSums:
        """``function`` of every sum."""
        return StepSums(*(function(getattr(self, f.name)) for f in dataclasses.fields(self)))


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised beside the likelihood; the fields are arguments of ``ZooModule`` and explained there."""

    load_balance_coef: Weight
    device_balance_coef: Weight
    communication_balance_coef: Weight
    z_loss_coef: Weight
    mtp_coef: Weight
    balance_scope: Scope
    balance_devices: int
    max_devices: int = 0
    """The most devices that a token is sent to."""

    def of(self, name: str, config: ModelConfig) -> Objective:
        """This objective for the model ``name``: with its devices, or none where no loss asks for them.

        Raises:
            ValueError: settings that do not fit the model.
        """
        moe = config.moe
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not field.name.endswith("_coef"):
                continue
            check_weight(field.name, value)
            if value and field.name != "mtp_coef" and moe is None:
                raise ValueError(f"model.{field.name} = {value}: {name} has no experts to balance; set it to 0")
        if self.mtp_coef and not config.mtp_depth:
            raise ValueError(
                f"model.mtp_coef = {self.mtp_coef}: {name} has no MTP modules; set model.overrides.mtp_depth to 1, or "
                "this to 0"
            )
        if moe is None or not (self.device_balance_coef or self.communication_balance_coef):
            return dataclasses.replace(self, balance_devices=0)
        devices = self.balance_devices or moe.num_groups
        if devices < 2 or moe.num_experts % devices:
            raise ValueError(
                f"model.balance_devices = {devices}: give a divisor, of at least 2, of the {moe.num_experts} experts"
            )
        reach = moe.top_k_groups if devices == moe.num_groups else min(devices, moe.top_k)
        return dataclasses.replace(self, balance_devices=devices, max_devices=reach)

    def weights(self, step: int) -> dict[str, float]:
        """Of the terms of ``StepSums`` beside ``nll``, in optimizer step ``step``, counted from 0."""
        coefficients = {
            "load_balance": self.load_balance_coef,
            "device_balance": self.device_balance_coef,
            "communication_balance": self.communication_balance_coef,
            "z": self.z_loss_coef,
            "mtp_nll": self.mtp_coef,
        }
        return {term: weight_at(coefficient, step) for term, coefficient in coefficients.items()}

    def total(self, sums: StepSums, step: int) -> Tensor:
        """The loss of ``sums``, times their labels."""
        total = sums.nll
        for term, weight in self.weights(step).items():
            total = total + weight * getattr(sums, term)
        return total

    def metrics(self, sums: StepSums, config: ModelConfig) -> dict[str, Tensor]:
        """What is logged of the terms beside the likelihood, before their weights; means over labels."""
        moe, labels = config.moe, sums.labels.clamp(min=1)
        shown: dict[str, Tensor] = {"mtp_loss": sums.mtp_nll} if self.mtp_coef else {}
        if moe is not None:
            shown["load_balance_loss"] = sums.load_balance
        if self.balance_devices:
            shown["device_balance_loss"] = sums.device_balance
            shown["communication_balance_loss"] = sums.communication_balance
        if moe is not None:
            shown["z_loss"] = sums.z
        logged = {f"train/{name}": term / labels for name, term in shown.items()}
        if moe is not None and moe.routing is not None and moe.routing.capacity_factor:
            logged["train/dropped_fraction"] = sums.dropped / sums.expert_counts.sum().clamp(min=1)
        return logged


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
    objective: Objective,
    parallel: MoEParallelStrategy | None,
    before: StepSums | None = None,
) -> StepSums:
    """The terms of the loss, with gradient, and the expert counts of one micro-batch.

    Args:
        model: Whose loss it is.
        output: Of the model, for ``batch``; its logits are not used.
        batch: ``labels`` and ``document_ids``, each [B, S].
        objective: Which losses are taken, and what load fractions of the balance losses are taken over.
        parallel: What spreads the micro-batch over ranks, if it is spread: its terms are this rank's share then.
        before: This rank's sums over the earlier micro-batches of the step.
    """
    nll, count = model.nll(output.hidden, batch["labels"]), label_count(batch["labels"])
    ahead = mtp_nll(model.nll, output.mtp_hidden, batch["labels"], batch["document_ids"])
    routing = output.router_outputs
    zero, none = nll.new_zeros(()), count.new_zeros(0, 0)
    if not routing:
        return StepSums(count, nll, ahead, zero, zero, zero, zero, none, zero, none)
    tokens = batch["document_ids"] != PADDING_DOCUMENT
    counts = torch.stack([expert_counts(r, tokens) for r in routing])
    devices = objective.balance_devices
    sent = counts[:, :0]
    if devices:
        all_tokens = tokens.sum().view(1)
        sent = torch.stack([torch.cat((sent_tokens(r, devices, tokens), all_tokens)) for r in routing])
    whole = torch.cat((counts, sent), dim=-1)
    if objective.balance_scope == "global_batch" and before is not None:
        whole = whole + torch.cat((before.expert_counts, before.sent), dim=-1)
    per_token, weight = count, count
    if parallel is not None:
        per_token, per_sequence = _shares(count, tokens, parallel)
        weight = per_sequence if objective.balance_scope == "sequence" else per_token
        whole = whole if objective.balance_scope == "sequence" else parallel.sum_over_data(whole)
    losses = _balance(routing, tokens, objective, *whole.split((counts.shape[-1], sent.shape[-1]), dim=-1))
    return StepSums(
        labels=count,
        nll=nll,
        mtp_nll=ahead,
        load_balance=weight * losses[0],
        device_balance=weight * losses[1],
        communication_balance=weight * losses[2],
        z=per_token * z_loss(routing, tokens),
        expert_counts=counts,
        dropped=sum((dropped_fraction(r, tokens) * c.sum() for r, c in zip(routing, counts, strict=True)), zero),
        sent=sent,
    )


def _balance(
    routing: Sequence[RouterOutput], tokens: Tensor, objective: Objective, counts: Tensor, sent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The load-, device- and communication-balance losses of a micro-batch; 0 of those that no weight asks for.

    ``counts`` [L, E] and ``sent`` [L, G + 1] are of all that load fractions are taken over, unless that is a sequence.
    """
    devices = objective.balance_devices
    scope: TokenGroups = "sequence" if objective.balance_scope == "sequence" else "micro_batch"
    of_whole = None if scope == "sequence" else list(counts)
    load_balance = load_balance_loss(routing, tokens, scope, counts=of_whole)
    if not devices:
        return load_balance, torch.zeros_like(load_balance), torch.zeros_like(load_balance)
    fractions = None if scope == "sequence" else list(sent[:, :-1] / sent[:, -1:].clamp(min=1))
    return (
        load_balance,
        device_balance_loss(routing, devices, tokens, scope, counts=of_whole),
        communication_balance_loss(routing, devices, objective.max_devices, tokens, scope, sent=fractions),
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
