"""GPUs and the links between them, as their makers state them, and how long a collective takes on them.

Rates are the dense ones (no structured sparsity), bandwidths are those of one direction, and gigabytes are decimal.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

LINK_EFFICIENCY = 0.8
"""Share of a link's stated bandwidth that messages get: 160 of 200 GB/s of NVLink on H800 (arXiv 2412.19437, 3.2.2)."""
BASE_LATENCY, NVLINK_HOP, NETWORK_HOP = 8.4e-6, 3.4e-6, 14.0e-6
"""Seconds to start a collective and for each step of a ring: NCCL's own cost model of its Simple protocol
(``src/graph/tuning.cc``, ``baseLat`` and ``hwLat``)."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU in the node that it is usually sold in.

    Attributes:
        memory: Bytes.
        bf16_flops: FLOPs a second of matrix products in bf16.
        fp32_flops: The same in fp32, without TF32, as torch computes them by default.
        memory_bandwidth: Bytes a second.
        intra_bandwidth: Bytes a second that one GPU sends to others of its node.
        inter_bandwidth: Bytes a second that one GPU sends to other nodes: its share of the node's network cards.
        gpus_per_node: GPUs that reach each other over NVLink.
        source: Where the figures are from.
    """

    name: str
    memory: float
    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    intra_bandwidth: float
    inter_bandwidth: float
    gpus_per_node: int = 8
    source: str


_GPUS = (
    Gpu(
        name="a100",
        memory=80e9,
        bf16_flops=312e12,
        fp32_flops=19.5e12,
        memory_bandwidth=2.039e12,
        intra_bandwidth=300e9,
        inter_bandwidth=25e9,
        source="NVIDIA A100 datasheet (SXM, 80 GB); DGX A100: eight 200 Gb/s cards",
    ),
    Gpu(
        name="h100",
        memory=80e9,
        bf16_flops=989.4e12,
        fp32_flops=67e12,
        memory_bandwidth=3.35e12,
        intra_bandwidth=450e9,
        inter_bandwidth=50e9,
        source="NVIDIA H100 datasheet (SXM); DGX H100: eight 400 Gb/s cards",
    ),
    Gpu(
        name="h800",
        memory=80e9,
        bf16_flops=989.4e12,
        fp32_flops=67e12,
        memory_bandwidth=3.35e12,
        intra_bandwidth=200e9,
        inter_bandwidth=50e9,
        source="H100 with NVLink of 400 GB/s both ways (arXiv 2412.19437, 3.1, and arXiv 2505.09343)",
    ),
    Gpu(
        name="h200",
        memory=141e9,
        bf16_flops=989.4e12,
        fp32_flops=67e12,
        memory_bandwidth=4.8e12,
        intra_bandwidth=450e9,
        inter_bandwidth=50e9,
        source="NVIDIA H200 datasheet (SXM); DGX H200: eight 400 Gb/s cards",
    ),
    Gpu(
        name="b200",
        memory=180e9,
        bf16_flops=2250e12,
        fp32_flops=75e12,
        memory_bandwidth=8e12,
        intra_bandwidth=900e9,
        inter_bandwidth=50e9,
        source="NVIDIA DGX B200 datasheet, an eighth of the node; eight 400 Gb/s cards",
    ),
)
GPUS = {gpu.name: gpu for gpu in _GPUS}


def find_gpu(name: str) -> Gpu:
    """A GPU by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in GPUS:
        close = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(GPUS)}"
        raise ValueError(f"gpu {name!r}: {hint}")
    return GPUS[name]


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other: ``size`` of them, each ``stride`` after the one before, nodes filled in order."""

    size: int
    stride: int = 1

    def per_node(self, gpu: Gpu) -> int:
        """Members that share a node."""
        return min(max(gpu.gpus_per_node // self.stride, 1), self.size)

    def nodes(self, gpu: Gpu) -> int:
        """Nodes that the group spans."""
        return -(-self.size // self.per_node(gpu))


def ring_seconds(gpu: Gpu, group: Group, sent: float, calls: float, passes: int = 1) -> float:
    """Time of ``calls`` collectives over ``group`` in which each rank sends ``sent`` bytes in all.

    Rings as NCCL builds them: as many as a node has members of the group, each through another network card, so that
    every member's card carries ``sent / per_node``. The slower kind of link decides. A ring takes size - 1 steps, an
    all-reduce (``passes = 2``) twice as many; of them nodes - 1 cross the network.
    """
    if group.size == 1:
        return 0.0
    here, nodes = group.per_node(gpu), group.nodes(gpu)
    inside = sent / gpu.intra_bandwidth if here > 1 else 0.0
    between = sent / here / gpu.inter_bandwidth if nodes > 1 else 0.0
    hops = (group.size - nodes) * NVLINK_HOP + (nodes - 1) * NETWORK_HOP
    return max(inside, between) / LINK_EFFICIENCY + calls * (BASE_LATENCY + passes * hops)


def all_to_all_seconds(gpu: Gpu, group: Group, sent: float, calls: float) -> float:
    """Time of ``calls`` all-to-alls in which each rank sends ``sent`` bytes in all, equally much to each other rank.

    Both kinds of links work at the same time; all messages start at once.
    """
    if group.size == 1:
        return 0.0
    inside = (group.per_node(gpu) - 1) / (group.size - 1)
    slowest = max(inside * sent / gpu.intra_bandwidth, (1 - inside) * sent / gpu.inter_bandwidth)
    hop = NETWORK_HOP if group.nodes(gpu) > 1 else NVLINK_HOP
    return slowest / LINK_EFFICIENCY + calls * (BASE_LATENCY + hop)
