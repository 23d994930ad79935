"""Balance losses: pure functions of the router outputs that the decoder hands back. The trainer adds them, once.

Shapes: B batch, S sequence, T = B·S tokens, E experts, K top-k, D devices (groups of neighbouring experts), G token
groups that a loss is taken over: one, or B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from zoo.moe.router import RouterOutput

TokenGroups = Literal["micro_batch", "sequence"]


def load_balance_loss(
    outputs: Sequence[RouterOutput],
    token_mask: Tensor | None = None,
    scope: TokenGroups = "micro_batch",
    batch_size: int = 1,
    counts: Sequence[Tensor] | None = None,
) -> Tensor:
    """E · Σᵢ fᵢ·Pᵢ, the mean over layers (Switch, arXiv 2101.03961, equations 4 to 6); 1 when perfectly balanced.

    fᵢ = assignments to expert i / (K·T), without gradient, before any is dropped for want of capacity; Pᵢ = mean over
    tokens of the score of expert i, normalised over all E experts (softmax scores are so already).

    Args:
        outputs: one a MoE layer, with T = B·S.
        token_mask: [B, S] bool, False for padding, which counts in neither f nor P.
        scope: ``micro_batch`` takes f and P over all tokens given, ``sequence`` over each row, then the mean over rows:
            DeepSeek-V3's sequence-wise loss (arXiv 2412.19437, equations 17 to 20, with its 1/K in f). Only
            ``sequence`` does not depend on how a batch is split into micro-batches.
        batch_size: B; used where ``token_mask`` does not give it.
        counts: one [E] a layer, assignments over a larger batch that this is a part of: f is then taken over that batch
            (arXiv 2501.11873). The parts' losses, weighted with their tokens, have the mean that the whole has. Only
            with ``scope="micro_batch"``.

    Returns:
        fp32 scalar with gradient to the router logits.

    Raises:
        ValueError: no outputs: the model has no MoE layer; counts with another scope.
    """
    losses = []
    for output, whole in _layers("load_balance_loss", outputs, scope, counts):
        groups = _TokenGroups(output, token_mask, scope, batch_size)
        losses.append(groups.mean(output.scores.shape[-1] * groups.load(whole) * groups.mean_scores))
    return torch.stack(losses).mean()


def device_balance_loss(
    outputs: Sequence[RouterOutput],
    devices: int,
    token_mask: Tensor | None = None,
    scope: TokenGroups = "micro_batch",
    batch_size: int = 1,
    counts: Sequence[Tensor] | None = None,
) -> Tensor:
    """Σ_d f′_d·P′_d over D ``devices`` (DeepSeek-V2, arXiv 2405.04434, equations 26 to 28); 1 when balanced.

    With the f of the paper, which is E times that of ``load_balance_loss``, f′ is the mean of f over the E/D experts of
    a device and P′ the sum of P. Other arguments, result and errors as ``load_balance_loss``.
    """
    losses = []
    for output, whole in _layers("device_balance_loss", outputs, scope, counts):
        groups = _TokenGroups(output, token_mask, scope, batch_size)
        load = output.scores.shape[-1] * groups.load(whole)
        losses.append(groups.mean(_by_device(load, devices).mean(-1) * _by_device(groups.mean_scores, devices).sum(-1)))
    return torch.stack(losses).mean()


def communication_balance_loss(
    outputs: Sequence[RouterOutput],
    devices: int,
    max_devices: int,
    token_mask: Tensor | None = None,
    scope: TokenGroups = "micro_batch",
    batch_size: int = 1,
    sent: Sequence[Tensor] | None = None,
) -> Tensor:
    """Σ_d f″_d·P″_d over D ``devices`` (DeepSeek-V2, arXiv 2405.04434, equations 29 to 31).

    f″_d = D/(M·T) · tokens of which some expert is on device d, without gradient; P″ is the sum of P over its experts.
    1 when every token goes to M = ``max_devices`` devices, and all devices get equally many.

    Args:
        outputs, token_mask, scope, batch_size: as ``load_balance_loss``.
        devices: D, a divisor of E.
        max_devices: M, the most devices that a token may be sent to.
        sent: one [D] a layer, the fraction of the tokens of a larger batch that each device is sent, as ``counts``.

    Returns:
        fp32 scalar with gradient to the router logits.

    Raises:
        ValueError: as ``load_balance_loss``.
    """
    losses = []
    for output, whole in _layers("communication_balance_loss", outputs, scope, sent):
        groups = _TokenGroups(output, token_mask, scope, batch_size)
        fraction = groups.over_tokens(_sent(output, devices)) if whole is None else whole.to(output.scores.dtype)
        load = devices / max_devices * fraction
        losses.append(groups.mean(load * _by_device(groups.mean_scores, devices).sum(-1)))
    return torch.stack(losses).mean()


def sent_tokens(output: RouterOutput, devices: int, token_mask: Tensor | None = None) -> Tensor:
    """[D] int64, tokens of which at least one expert is on each device; those of padding are left out."""
    return (_sent(output, devices) * _keep(output, token_mask).unsqueeze(-1)).sum(dim=0).long()


def z_loss(outputs: Sequence[RouterOutput], token_mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)², the mean over layers (ST-MoE, arXiv 2202.08906, equation 5).

    Arguments, result and errors as ``load_balance_loss``.
    """
    losses = []
    for output, _ in _layers("z_loss", outputs, "micro_batch", None):
        keep = _keep(output, token_mask)
        losses.append((output.logits.logsumexp(dim=-1).square() * keep).sum() / keep.sum().clamp(min=1))
    return torch.stack(losses).mean()


class _TokenGroups:
    """Means over the tokens of each group; padding is in none."""

    def __init__(self, output: RouterOutput, token_mask: Tensor | None, scope: TokenGroups, batch_size: int) -> None:
        rows = token_mask.shape[0] if token_mask is not None else batch_size
        self._output = output
        self._keep = _keep(output, token_mask).view(rows if scope == "sequence" else 1, -1, 1)
        self._tokens = self._keep.sum(dim=1)
        self.mean_scores = self.over_tokens(output.scores / output.scores.sum(dim=-1, keepdim=True))
        """[G, E], P: with gradient, sums to 1."""

    def over_tokens(self, values: Tensor) -> Tensor:
        """values [T, n] → [G, n]; 0 where a group is padding throughout."""
        kept = values.view(*self._keep.shape[:2], -1) * self._keep
        return kept.sum(dim=1) / self._tokens.clamp(min=1)

    def load(self, counts: Tensor | None) -> Tensor:
        """Fraction of the assignments that each expert gets, [G, E] without gradient: of ``counts`` [E], if given."""
        if counts is not None:
            return counts.to(self._keep.dtype) / counts.sum().clamp(min=1)
        chosen = _chosen(self._output, self._output.experts, self.mean_scores.shape[-1])
        chosen = (chosen.view(*self._keep.shape[:2], -1) * self._keep).sum(dim=1)
        return chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1)

    def mean(self, terms: Tensor) -> Tensor:
        """terms [G, n] → their sum in a group, the mean over groups that have tokens."""
        return terms.sum() / (self._tokens > 0).sum().clamp(min=1)


def _layers(
    name: str, outputs: Sequence[RouterOutput], scope: TokenGroups, whole: Sequence[Tensor] | None
) -> list[tuple[RouterOutput, Tensor | None]]:
    """Each layer's output with what is known of the larger batch."""
    if not outputs:
        raise ValueError(f"{name}: the model has no MoE layer; set its coefficient to 0")
    if whole is not None and scope != "micro_batch":
        raise ValueError(f"{name}: counts of a larger batch need scope micro_batch, not {scope!r}")
    given: Sequence[Tensor | None] = [None] * len(outputs) if whole is None else whole
    return list(zip(outputs, given, strict=True))


def _chosen(output: RouterOutput, indices: Tensor, size: int) -> Tensor:
    """indices [T, K] of chosen experts → [T, size], how often each is there, in the dtype of the scores."""
    ones = torch.ones_like(indices) if output.chosen is None else output.chosen
    counts = output.scores.new_zeros(indices.shape[0], size)
    return counts.scatter_add_(1, indices, ones.to(counts.dtype))


def _sent(output: RouterOutput, devices: int) -> Tensor:
    """[T, D], 1 where an expert of the token is on the device."""
    return _chosen(output, output.experts // (output.scores.shape[-1] // devices), devices).clamp(max=1)


def _by_device(values: Tensor, devices: int) -> Tensor:
    """values [..., E] → [..., D, E / D]."""
    return values.unflatten(-1, (devices, -1))


def _keep(output: RouterOutput, token_mask: Tensor | None) -> Tensor:
    """[T], 1 for tokens and 0 for padding, in the dtype of the scores."""
    if token_mask is None:
        return output.scores.new_ones(output.scores.shape[0])
    return token_mask.flatten().to(output.scores.dtype)
