"""How long a step takes in a layout: the model of time.

What is estimated is what ``zoo.parallel`` does with AdamW, uneven exchanges and no dropped tokens.

Time of a step
    compute    FLOPs of matrix products on this rank, recomputed ones included, over peak · efficiency. All that is
               bound by memory (norms, rotary, routing, sorting) is charged to the efficiency.
    exposed    Tensor-parallel collectives, and the exchanges of tokens, less what is computed during the first: the
               shared experts. Of exchanges in one hop and in two, the faster is taken.
    hidden     Gathers and reductions of FSDP run beside the computation: they cost time only where the network is busy
               for longer than compute and exposed communication take together.
    optimizer  Seven fp32 numbers are read or written for a parameter: 28 bytes at the memory's bandwidth.

    step = Σ over micro-batches of max(compute + exposed, all communication) + optimizer; reductions belong to the last,
    or to each.

Every rank is taken to get equally many rows, and the host never to be late.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from zoo.accounting import attention_flops, training_flops
from zoo.config import ModelConfig
from zoo.parallel.communication import (
    Collective,
    expert_exchanges,
    gradient_reductions,
    parameter_gathers,
    tensor_collectives,
)
from zoo.parallel.footprint import Holdings, Precision, Recompute, Units
from zoo.parallel.hardware import Gpu
from zoo.parallel.mesh import MeshSizes

EFFICIENCY = 0.5
"""Share of the peak rate that a rank reaches while it computes. Whole runs, communication included, are published at
0.38 to 0.43 (Llama 3 405B on H100, arXiv 2407.21783, table 4)."""
ADAMW_BYTES = 28


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained, on what.

    Attributes:
        global_batch: Sequences of an optimizer step over all ranks.
        efficiency: Share of the GPU's peak that matrix products reach.
    """

    config: ModelConfig
    gpu: Gpu
    gpus: int
    sequence_length: int
    global_batch: int
    precision: Precision = "bf16-mixed"
    efficiency: float = EFFICIENCY

    def __post_init__(self) -> None:
        for name in ("gpus", "sequence_length", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give a positive integer")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"efficiency = {self.efficiency}: give a share of the peak rate, above 0 and at most 1")
        if self.config.mamba is not None:
            raise ValueError(
                "mamba: memory and time of recurrent layers are not estimated; choose a plan and its sizes by hand "
                "(fsdp, ep_fsdp and tp_ep_fsdp take the model)"
            )
        if self.config.mtp_depth:
            raise ValueError(
                f"mtp_depth = {self.config.mtp_depth}: memory and time of MTP modules are not estimated; plan the "
                "model without them (mtp_depth: 0), and leave them a part of the memory"
            )
        moe = self.config.moe
        if self.config.dropout or (moe is not None and (moe.routing is not None or moe.expert_dropout)):
            raise ValueError(
                "moe.routing, dropout: memory and time are estimated of plain token choice without dropout; plan the "
                "model without them, or choose a plan and its sizes by hand"
            )
        relative = self.config.attention is not None and self.config.attention.relative_positions is not None
        if relative or "relu" in (self.config.ffn, self.config.expert_ffn) or (moe is not None and moe.dense_ffn):
            raise ValueError(
                "relative_positions, ffn = relu, moe.dense_ffn: memory and time are estimated of rotary attention, and "
                "of one gated FFN or layer of experts a block; choose a plan and its sizes by hand"
            )
        if self.sequence_length > self.config.max_position_embeddings:
            raise ValueError(
                f"sequence_length = {self.sequence_length}: the model has positions up to "
                f"{self.config.max_position_embeddings}; give at most that"
            )

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.global_batch * self.sequence_length

    @property
    def peak_flops(self) -> float:
        """FLOPs a second of one GPU in this precision."""
        return self.gpu.fp32_flops if self.precision == "32-true" else self.gpu.bf16_flops


@dataclass(frozen=True)
class Layout:
    """A plan by name, and the sizes of its meshes."""

    plan: str
    sizes: MeshSizes


@dataclass(frozen=True)
class Setting:
    """What is chosen within a layout."""

    micro_batch: int
    """Sequences that a data rank computes at once."""
    micro_batches: int
    """How many of them it accumulates for a step."""
    recompute: Recompute
    reshard: bool
    """Whether gathered parameters are freed between the forward and the backward pass."""
    reduce_each: bool = False
    """Whether gradients are reduced after every micro-batch (``reduce_every_micro_batch``), or after the last."""


@dataclass(frozen=True)
class Estimate:
    """A layout with the setting that serves it best, and what they cost each rank."""

    layout: Layout
    setting: Setting
    memory: dict[str, float]
    """Bytes by purpose."""
    sent: dict[str, float]
    """Bytes that the rank sends in a step, by kind of collective."""
    between_nodes: dict[str, float]
    """Those of them that leave its node."""
    hops: int
    """Exchanges on a token's way to its experts: none, one, or one between nodes and one within."""
    seconds: dict[str, float]
    """``compute``, ``exposed`` and ``hidden`` communication, ``waiting`` for the hidden, and ``optimizer``."""

    @property
    def total_memory(self) -> float:
        """Bytes at the fullest moment."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """Time of an optimizer step."""
        return sum(self.seconds.values()) - self.seconds["hidden"]


def estimate(
    work: Workload, layout: Layout, units: Units, held: Holdings, setting: Setting, memory: dict[str, float]
) -> Estimate:
    """Collectives of a micro-batch and of a step, and their time beside that of the computation."""
    config, sizes, precision, recompute = work.config, layout.sizes, work.precision, setting.recompute
    tokens = setting.micro_batch * work.sequence_length
    blocking = list(tensor_collectives(config, units, sizes, tokens, precision, recompute))
    gathers = list(parameter_gathers(units, sizes, precision, setting.reshard))
    reductions = list(gradient_reductions(units, sizes))
    rate = work.peak_flops * work.efficiency
    compute = tokens * rank_flops(config, units, sizes, work.sequence_length, recompute) / rate
    shared = tokens * _shared_expert_flops(config, sizes, recompute) / rate

    def in_the_open(exchanges: list[Collective]) -> float:
        """Seconds of exchanges less what the first dispatch hides behind the shared experts."""
        return _total(exchanges, work.gpu) - min(_total(exchanges[:1], work.gpu), shared)

    ways = [list(expert_exchanges(config, sizes, tokens, precision, recompute, n)) for n in (1, work.gpu.gpus_per_node)]
    exchanges = min(ways, key=in_the_open)
    travel = _total(blocking + exchanges, work.gpu)
    exposed = _total(blocking, work.gpu) + in_the_open(exchanges)
    sent: dict[str, float] = defaultdict(float)
    between: dict[str, float] = defaultdict(float)
    reducing = setting.micro_batches if setting.reduce_each else 1
    for collectives, times in (
        (blocking + exchanges + gathers, setting.micro_batches),
        (reductions, reducing),
    ):
        for collective in collectives:
            sent[collective.kind] += times * collective.sent
            between[collective.kind] += times * collective.between_nodes(work.gpu)

    gather, reduction = _total(gathers, work.gpu), _total(reductions, work.gpu)
    # By how much the network is busy for longer than the rest of a micro-batch takes, without and with reductions.
    late = travel + gather - compute - exposed
    seconds = {
        "compute": setting.micro_batches * compute,
        "exposed": setting.micro_batches * exposed,
        "hidden": setting.micro_batches * gather + reducing * reduction,
        "waiting": (setting.micro_batches - reducing) * max(late, 0.0) + reducing * max(late + reduction, 0.0),
        "optimizer": held.whole.at_rest * ADAMW_BYTES / work.gpu.memory_bandwidth,
    }
    sent, between = ({kind: size for kind, size in sizes.items() if size} for sizes in (sent, between))
    return Estimate(layout, setting, memory, sent, between, len(exchanges) // 2, seconds)


def _total(collectives: Iterable[Collective], gpu: Gpu) -> float:
    return sum(collective.seconds(gpu) for collective in collectives)


def rank_flops(
    config: ModelConfig, units: Units, sizes: MeshSizes, sequence_length: int, recompute: Recompute = "none"
) -> float:
    """FLOPs of one rank for each token of its data rank, forward and backward (which is twice the forward).

    Tensor ranks share attention, what the plan splits, and the experts' rows; the rest each computes in full. With one
    tensor rank and nothing recomputed it is ``zoo.accounting.training_flops``.
    """
    head = 2.0 * config.vocab_size * config.hidden_size
    experts, dense = 0.0, config.num_layers * attention_flops(config, sequence_length) / sizes.tensor
    for unit, count in units.items():
        for weight in unit.weights if unit.kind != "root" else ():
            if len(weight.shape) > 2:
                assert config.moe is not None
                share = config.moe.top_k / config.moe.num_experts / (sizes.tensor if unit.kind == "experts" else 1)
                experts += count * 2.0 * math.prod(weight.shape) * share
            elif len(weight.shape) == 2:
                dense += count * 2.0 * weight.gathered(sizes)
    again = {"none": 0.0, "experts": experts, "block": experts + dense}[recompute]
    return 3 * (head + experts + dense) + again


def _shared_expert_flops(config: ModelConfig, sizes: MeshSizes, recompute: Recompute) -> float:
    """FLOPs per token of all shared experts, of as many passes as there are dispatch exchanges."""
    if config.moe is None:
        return 0.0
    width = config.moe.num_shared_experts * config.moe.moe_intermediate_size
    layers = sum(map(config.is_moe_layer, range(config.num_layers)))
    return (4 if recompute == "block" else 3) * layers * 6.0 * config.hidden_size * width / sizes.tensor


def utilisation(work: Workload, estimate: Estimate) -> float:
    """Model FLOPs (nothing recomputed) of a step over what all GPUs could compute in its time."""
    flops = training_flops(work.config, work.sequence_length) * work.tokens
    return flops / (estimate.step_seconds * work.gpus * work.peak_flops)


def gpu_hours_per_trillion(work: Workload, estimate: Estimate) -> float:
    """GPU hours for 10¹² tokens."""
    return 1e12 / work.tokens * estimate.step_seconds * work.gpus / 3600
