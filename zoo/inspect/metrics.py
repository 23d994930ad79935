"""The measures that are sums over tokens, as torchmetrics: they add up over batches, and over processes.

Shapes: B batch, S sequence, T = B·S tokens, L MoE layers, E experts, K top-k, V token types, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.inspect.measures import choices, co_activations, jaccard, router_z, routing_entropy
from zoo.moe.router import RouterOutput


class Routing(NamedTuple):
    """What ``RoutingMetric`` found, over all its tokens.

    Means are lists: of tensors with one element, torchmetrics drops the dimension.
    """

    tokens: int
    pairs: Tensor
    """[L, E, E] int64, tokens that go to both experts; the diagonal is the counts of each."""
    entropy: list[float]
    """By layer, mean entropy of a token's scores over its maximum."""
    z: list[float]
    """By layer, mean of logsumexp(logits)²."""
    dropped: list[float]
    """By layer, share of the assignments that found no room."""
    untaken: list[float]
    """By layer, share of the tokens that no expert takes."""

    @property
    def counts(self) -> Tensor:
        """[L, E] int64, assignments to each expert."""
        return self.pairs.diagonal(dim1=-2, dim2=-1)


class RoutingMetric(Metric):
    """Load, co-activation, entropy, z and dropped tokens of every MoE layer."""

    full_state_update = False
    tokens: Tensor
    pairs: Tensor
    entropy: Tensor
    z: Tensor
    kept: Tensor
    untaken: Tensor

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__()
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros(layers, experts, experts, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("entropy", "z", "kept", "untaken"):
            self.add_state(name, torch.zeros(layers, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Sequence[RouterOutput], token_mask: Tensor) -> None:
        """Add tokens: ``outputs`` of all layers, and ``token_mask`` [B, S], False for padding."""
        keep = token_mask.flatten()
        self.tokens += keep.sum()
        for layer, output in enumerate(outputs):
            self.pairs[layer] += co_activations(choices(output, token_mask))
            self.entropy[layer] += routing_entropy(output)[keep].double().sum()
            self.z[layer] += router_z(output)[keep].double().sum()
            taken = (output.destinations < output.scores.shape[-1])[keep].sum(dim=-1)
            self.kept[layer] += taken.sum()
            self.untaken[layer] += (taken == 0).sum()

    def compute(self) -> Routing:
        """Sums and means over the tokens so far."""
        tokens = self.tokens.clamp(min=1)
        asked = self.pairs.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        means = (self.entropy / tokens, self.z / tokens, 1 - self.kept / asked.clamp(min=1), self.untaken / tokens)
        return Routing(int(self.tokens), self.pairs, *(mean.tolist() for mean in means))


class Agreement(NamedTuple):
    """How alike two routings of the same tokens are, by layer."""

    equal: list[float]
    """Share of tokens with the same set of experts."""
    jaccard: list[float]
    """Mean of |A ∩ B| / |A ∪ B|."""
    by_chance: list[float]
    """The same of each token's set in one routing and another token's in the other."""


class AgreementMetric(Metric):
    """Routing stability: whether tokens keep their experts."""

    full_state_update = False
    tokens: Tensor
    sums: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(3, layers, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
        """Add tokens: ``chosen_experts`` [T, K] and [T, K'] of all layers, without padding."""
        self.tokens += len(one[0])
        for layer, (a, b) in enumerate(zip(one, other, strict=True)):
            overlap = jaccard(a, b)
            # Half of the batch away is another context, with the same loads.
            shifted = jaccard(a, b.roll(max(1, len(b) // 2), dims=0))
            self.sums[:, layer] += torch.stack(
                [(overlap == 1).double().sum(), overlap.double().sum(), shifted.double().sum()]
            )

    def compute(self) -> Agreement:
        """Means over the tokens so far."""
        return Agreement(*(self.sums / self.tokens.clamp(min=1)).tolist())


class TokenExpertMetric(Metric):
    """How often each of some token types goes to each expert.

    Args:
        types: [V] int64, distinct ids in ascending order.
    """

    full_state_update = False
    types: Tensor
    counts: Tensor

    def __init__(self, layers: int, experts: int, types: Tensor) -> None:
        super().__init__()
        self.register_buffer("types", types, persistent=False)
        self.add_state("counts", torch.zeros(layers, len(types), experts, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, outputs: Sequence[RouterOutput], input_ids: Tensor, token_mask: Tensor) -> None:
        """Add tokens: ``outputs`` of all layers, ``input_ids`` and ``token_mask`` [B, S]."""
        ids = input_ids.flatten()
        place = torch.searchsorted(self.types, ids).clamp(max=max(0, len(self.types) - 1))
        known = (self.types[place] == ids) & token_mask.flatten() if len(self.types) else torch.zeros_like(ids).bool()
        for layer, output in enumerate(outputs):
            self.counts[layer].index_add_(0, place[known], choices(output)[known])

    def compute(self) -> Tensor:
        """[L, V, E] int64."""
        return self.counts


class WindowMetric(Metric):
    """Assignments to each expert, window by window: what a test that moves whole windows needs."""

    full_state_update = False
    windows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("windows", [], dist_reduce_fx="cat")

    def update(self, outputs: Sequence[RouterOutput], token_mask: Tensor) -> None:
        """Add windows: ``outputs`` of all layers over the rows of ``token_mask`` [B, S]."""
        rows = [choices(output, token_mask).unflatten(0, token_mask.shape).sum(dim=1) for output in outputs]
        self.windows.append(torch.stack(rows, dim=1))

    def compute(self) -> Tensor:
        """[W, L, E] int64, in the order of the updates."""
        return torch.cat(self.windows)
