"""Which parameters one rank holds in a layout, from the model's shapes and the plan's rules, before anything is run.

The rules are those that ``zoo.parallel.apply`` applies, matched against the model on the meta device; no memory is
taken and no process group is needed, so that any world size can be asked about. Of ranks that differ (FSDP gives the
last ones less where a size does not divide) the fullest is meant.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from zoo.accounting import FP32_BYTES
from zoo.config import ModelConfig
from zoo.model import Decoder
from zoo.parallel.hardware import Group
from zoo.parallel.mesh import MeshSizes
from zoo.parallel.plan import ExpertRule, Plan, ResolvedPlan, Style, resolve

Precision = Literal["bf16-mixed", "32-true"]
Recompute = Literal["none", "experts", "block"]
COMPUTE_BYTES: dict[Precision, int] = {"bf16-mixed": 2, "32-true": 4}
"""Bytes of an element of activations and of gathered parameters; parameters, gradients and moments at rest are fp32."""


@dataclass(frozen=True)
class Weight:
    """One parameter and how it is split."""

    shape: tuple[int, ...]
    tensor: Style | None
    expert: ExpertRule | None

    def on_rank(self, sizes: MeshSizes) -> tuple[int, ...]:
        """Shape of what one rank computes with: after expert and tensor parallelism, before FSDP."""
        if self.expert is not None:
            return _split(self.shape, self.expert.expert, sizes.expert)
        if self.tensor == "colwise":
            return _split(self.shape, 0, sizes.tensor)
        if self.tensor == "rowwise" and len(self.shape) == 2:  # the bias of a row-wise layer stays whole
            return _split(self.shape, 1, sizes.tensor)
        return self.shape

    def gathered(self, sizes: MeshSizes) -> int:
        """Elements that one rank computes with."""
        return math.prod(self.on_rank(sizes))

    def at_rest(self, sizes: MeshSizes) -> int:
        """Elements that one rank keeps between steps: FSDP splits one dimension, the first unless a rule says."""
        if self.expert is not None:
            return math.prod(_split(self.on_rank(sizes), self.expert.shard, sizes.expert_shard))
        return math.prod(_split(self.on_rank(sizes), 0, sizes.data_shard))


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together, and how many equal units there are."""

    kind: Literal["root", "block", "experts", "full_precision"]
    weights: tuple[Weight, ...]

    def gathered(self, sizes: MeshSizes) -> int:
        """Elements of one unit that one rank computes with."""
        return sum(weight.gathered(sizes) for weight in self.weights)

    def at_rest(self, sizes: MeshSizes) -> int:
        """Elements of one unit that one rank keeps."""
        return sum(weight.at_rest(sizes) for weight in self.weights)

    def shards(self, sizes: MeshSizes) -> Group:
        """Ranks that the unit is gathered from."""
        if self.kind == "experts":
            return Group(sizes.expert_shard, sizes.expert)
        return Group(sizes.data_shard, sizes.tensor)

    def copies(self, sizes: MeshSizes) -> Group:
        """Ranks that hold equal shards, over which gradients are summed."""
        if self.kind == "experts":
            return Group(sizes.expert_replicate, sizes.expert * sizes.expert_shard)
        return Group(sizes.data_replicate, sizes.data_shard * sizes.tensor)

    def compute_bytes(self, precision: Precision) -> int:
        """Bytes of an element once gathered."""
        return FP32_BYTES if self.kind == "full_precision" else COMPUTE_BYTES[precision]


Units = Counter[Unit]
"""FSDP units of a model → how many there are of each."""


def _split(shape: tuple[int, ...], dim: int, ranks: int) -> tuple[int, ...]:
    return (*shape[:dim], -(-shape[dim] // ranks), *shape[dim + 1 :])


def resolve_units(config: ModelConfig, plan: Plan, precision: Precision) -> tuple[Units, ResolvedPlan]:
    """The FSDP units of ``Decoder(config)`` under ``plan``, as ``zoo.parallel.apply`` makes them.

    Raises:
        ValueError: the plan does not fit the model.
    """
    with torch.device("meta"):
        model = Decoder(config)
    rules = resolve(plan, model)
    kinds: dict[str, Literal["root", "block", "experts", "full_precision"]] = {"": "root"}
    kinds |= {name: "block" for name in rules.units}
    kinds |= {name.rpartition(".")[0]: "experts" for name in rules.experts}
    if precision != "32-true":
        kinds |= {name: "full_precision" for name in rules.full_precision}
    members: dict[str, list[Weight]] = {name: [] for name in kinds}
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        owner = next(parent for parent in _parents(module) if parent in kinds)
        members[owner].append(Weight(tuple(parameter.shape), rules.tensor.get(module), rules.experts.get(name)))
    return Counter(Unit(kinds[name], tuple(weights)) for name, weights in members.items()), rules


def _parents(name: str) -> Iterator[str]:
    """``name`` and the modules around it, innermost first; the root is ''."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


@dataclass(frozen=True)
class Share:
    """One rank's part of some parameters."""

    at_rest: int = 0
    """Elements kept between steps; as many gradients, and each of Adam's moments."""
    gathered: int = 0
    """Elements computed with in a step."""
    gathered_bytes: int = 0
    """Their bytes, in the dtypes of the computation."""

    def __add__(self, other: Share) -> Share:
        return Share(
            self.at_rest + other.at_rest,
            self.gathered + other.gathered,
            self.gathered_bytes + other.gathered_bytes,
        )

    def __mul__(self, times: int) -> Share:
        return Share(times * self.at_rest, times * self.gathered, times * self.gathered_bytes)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Equal blocks that follow each other.

    Attributes:
        count: How many.
        block: Of one block, without experts that are a unit of their own.
        experts: Of its experts, if they are.
    """

    count: int
    block: Share
    experts: Share


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """Parameters of one rank.

    Attributes:
        whole: Of all units.
        root: Of embedding, final norm and output head.
        layers: Of the blocks, in order: those with a dense FFN first.
    """

    whole: Share
    root: Share
    layers: tuple[Layers, ...]


def holdings(config: ModelConfig, units: Units, sizes: MeshSizes, precision: Precision) -> Holdings:
    """What the fullest rank holds of ``units``, which are those of ``config``."""
    shares: dict[str, list[tuple[Share, int]]] = {kind: [] for kind in ("root", "block", "experts", "full_precision")}
    whole = Share()
    for unit, count in units.items():
        gathered = unit.gathered(sizes)
        share = Share(unit.at_rest(sizes), gathered, gathered * unit.compute_bytes(precision))
        shares[unit.kind].append((share, count))
        whole += share * count
    experts = shares["experts"][0][0] if shares["experts"] else Share()
    router = shares["full_precision"][0][0] if shares["full_precision"] else Share()
    dense = len(shares["block"]) > 1 or config.moe is None
    layers = tuple(
        Layers(
            count=count,
            block=share if dense and i == 0 else share + router,
            experts=Share() if dense and i == 0 else experts,
        )
        for i, (share, count) in enumerate(shares["block"])
    )
    return Holdings(whole=whole, root=shares["root"][0][0], layers=layers)
