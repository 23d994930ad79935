"""Balance losses: pure functions of the router outputs that the decoder hands back. The trainer adds them, once.

Shapes: B batch, S sequence, T = B·S tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.moe.router import RouterOutput


def load_balance_loss(
    outputs: Sequence[RouterOutput],
    token_mask: Tensor | None = None,
    scope: Literal["micro_batch", "sequence"] = "micro_batch",
    batch_size: int = 1,
    counts: Sequence[Tensor] | None = None,
) -> Tensor:
    """E · Σᵢ fᵢ·Pᵢ, the mean over layers (Switch, arXiv 2101.03961, equations 4 to 6); 1 when perfectly balanced.

    fᵢ = assignments to expert i / (K·T), without gradient; Pᵢ = mean over tokens of the score of expert i, normalised
    over all E experts (softmax scores are so already; for sigmoid scores this is DeepSeek-V3's equation 18).

    Args:
        outputs: one a MoE layer, with T = B·S.
        token_mask: [B, S] bool, False for padding, which counts in neither f nor P.
        scope: ``micro_batch`` takes f and P over all tokens given, ``sequence`` over each row, then the mean over rows
            (DeepSeek-V3, equations 17 to 20, with its 1/K in f). Only ``sequence`` does not depend on how a batch is
            split into micro-batches.
        batch_size: B; used where ``token_mask`` does not give it.
        counts: one [E] a layer, assignments over a larger batch that this is a part of: f is then taken over that batch
            (arXiv 2501.11873). The parts' losses, weighted with their tokens, have the mean that the whole has. Only
            with ``scope="micro_batch"``.

    Returns:
        fp32 scalar with gradient to the router logits.

    Raises:
        ValueError: no outputs: the model has no MoE layer; counts with another scope.
    """
    if not outputs:
        raise ValueError("load_balance_loss: the model has no MoE layer; set its coefficient to 0")
    if counts is not None and scope != "micro_batch":
        raise ValueError(f"load_balance_loss: counts need scope micro_batch, not {scope!r}")
    rows = token_mask.shape[0] if token_mask is not None else batch_size
    groups = rows if scope == "sequence" else 1
    given = [None] * len(outputs) if counts is None else counts
    losses = [_layer_balance(o, token_mask, groups, c) for o, c in zip(outputs, given, strict=True)]
    return torch.stack(losses).mean()


def _layer_balance(output: RouterOutput, token_mask: Tensor | None, groups: int, counts: Tensor | None) -> Tensor:
    num_experts, top_k = output.scores.shape[-1], output.experts.shape[-1]
    keep = _keep(output, token_mask).view(groups, -1, 1)
    probs = output.scores / output.scores.sum(dim=-1, keepdim=True)
    # A row that is padding throughout has no tokens: it contributes 0 and is not counted as a sequence.
    tokens = keep.sum(dim=1)
    mean_prob = (probs.view(groups, -1, num_experts) * keep).sum(dim=1) / tokens.clamp(min=1)
    chosen = F.one_hot(output.experts, num_experts).sum(dim=1).view(groups, -1, num_experts)
    fraction = (chosen * keep).sum(dim=1) / (top_k * tokens.clamp(min=1))
    if counts is not None:
        fraction = counts.to(fraction.dtype) / counts.sum().clamp(min=1)
    per_group = num_experts * (fraction.detach() * mean_prob).sum(dim=-1)
    return per_group.sum() / (tokens > 0).sum().clamp(min=1)


def z_loss(outputs: Sequence[RouterOutput], token_mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)², the mean over layers (ST-MoE, arXiv 2202.08906, equation 5).

    Arguments, result and errors as ``load_balance_loss``.
    """
    if not outputs:
        raise ValueError("z_loss: the model has no MoE layer; set its coefficient to 0")
    return torch.stack([_layer_z(o, token_mask) for o in outputs]).mean()


def _layer_z(output: RouterOutput, token_mask: Tensor | None) -> Tensor:
    keep = _keep(output, token_mask)
    return (output.logits.logsumexp(dim=-1).square() * keep).sum() / keep.sum().clamp(min=1)


def _keep(output: RouterOutput, token_mask: Tensor | None) -> Tensor:
    """[T], 1 for tokens and 0 for padding, in the dtype of the scores."""
    if token_mask is None:
        return output.scores.new_ones(output.scores.shape[0])
    return token_mask.flatten().to(output.scores.dtype)
