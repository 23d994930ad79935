"""What the ``finetune:`` section of ``zoo fit`` may say. Nothing here needs torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """W' = W + s·B A of every matrix W that is a target (LoRA, arXiv 2106.09685, equation 3); only A and B are trained.

    Attributes:
        targets: named sets (``zoo.finetune.sets``), or names of projections such as ``q_proj``.
        rank: r, the columns of B and rows of A.
        alpha: s = alpha / rank.
        rslora: s = alpha / √rank (rsLoRA, arXiv 2312.03732, theorem 3.2).
        dora: W' is brought to a trained length, row by row (DoRA, arXiv 2402.09353, equation 5).
    """

    targets: tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        _check_low_rank(self.targets, self.rank, self.alpha)

    @property
    def scaling(self) -> float:
        """s, that B A is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class MoLoRAConfig:
    """W x + s·Σᵢ gᵢ(x) Bᵢ Aᵢ x with g = softmax(G x): a router over LoRA experts at every target.

    LoRAMoE (arXiv 2312.09979, equation 4), MoLoRA (arXiv 2309.05444, section 2.2). It cannot be merged.

    Attributes:
        targets: as of ``LoRAConfig``; stacked experts share one mixture.
        num_experts: LoRA experts at each target.
        rank: of each.
        alpha: s = alpha / rank.
    """

    targets: tuple[str, ...] = ("ffn",)
    num_experts: int = 4
    rank: int = 4
    alpha: float = 16.0

    def __post_init__(self) -> None:
        _check_low_rank(self.targets, self.rank, self.alpha)
        if self.num_experts < 2:
            raise ValueError(f"num_experts = {self.num_experts}: give 2 or more, or use lora")

    @property
    def scaling(self) -> float:
        """s, that the mixture is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Trained keys and values before those of the text, in every attention layer (arXiv 2101.00190), directly.

    Attributes:
        length: keys of each layer and head.
    """

    length: int = 16

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length = {self.length}: give 1 or more")


AdapterConfig: TypeAlias = LoRAConfig | MoLoRAConfig | PrefixConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Which parameters are trained. Without an adapter: all, but for what is said here. With one: it alone.

    Attributes:
        freeze: named sets that are not trained; not with an adapter, beside which nothing is.
        train: the only named sets that are trained; with an adapter, those that are beside it.
        lora: the adapter, or one of the others.
        molora: LoRA experts with a router.
        prefix: prefix tuning.
    """

    freeze: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    lora: LoRAConfig | None = None
    molora: MoLoRAConfig | None = None
    prefix: PrefixConfig | None = None

    def __post_init__(self) -> None:
        adapters = [name for name in ("lora", "molora", "prefix") if getattr(self, name) is not None]
        if len(adapters) > 1:
            raise ValueError(f"both {adapters[0]} and {adapters[1]} are given: one run trains one adapter; remove one")
        if self.freeze and self.train:
            raise ValueError(f"both freeze = {[*self.freeze]} and train = {[*self.train]} are given: remove one")
        if self.freeze and adapters:
            raise ValueError(
                f"freeze = {[*self.freeze]} with {adapters[0]}: all but the adapter is frozen already; remove it, or "
                "say in train what is trained besides"
            )

    @property
    def adapter(self) -> AdapterConfig | None:
        """The one that is given."""
        return self.lora or self.molora or self.prefix


def _check_low_rank(targets: tuple[str, ...], rank: int, alpha: float) -> None:
    if not targets:
        raise ValueError("targets = []: name what is adapted, for example [attention] or [experts]")
    if rank < 1:
        raise ValueError(f"rank = {rank}: give 1 or more")
    if not alpha > 0:
        raise ValueError(f"alpha = {alpha}: give a positive number, such as twice the rank")
