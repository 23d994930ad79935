"""One set of ranks, seen in two ways: attention wants data and tensor ranks, experts want expert ranks.

The outermost dimension is the pipeline: each of its stages has ranks of its own, and these two views of them. The dense
view is (data_parallel, tensor_parallel), or (data_replicate, data_shard, tensor_parallel) where copies of the model are
kept; the sparse view is (expert_replicate, expert_shard, expert_parallel). Both have the ranks in the same order, the
last dimension fastest. So expert parallelism costs no ranks of its own: it folds over the tensor ranks first, then over
the sharded and then over the replicated data ranks.
"""

from __future__ import annotations

import atexit
import time
from dataclasses import dataclass
from functools import cache

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from zoo.parallel.torch_private import unflatten

DATA, TENSOR = "data_parallel", "tensor_parallel"
"""Names that Lightning looks for."""
EXPERT = "expert_parallel"
PIPELINE = "pipeline_parallel"


@dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """How many ranks each dimension has; the world is ``pipeline * data_replicate * data_shard * tensor``.

    Attributes:
        pipeline: Groups of ranks that hold some of the layers each, and pass activations on; all others are within one.
        data_replicate: Groups of ranks that each hold the whole (sharded) model; gradients are summed over them.
        data_shard: Ranks over which a group shards parameters, gradients and optimizer state (FSDP).
        tensor: Ranks that share one batch and split attention heads and FFN columns.
        expert: Ranks over which the experts are spread; it folds over the others and does not multiply the world.
    """

    pipeline: int = 1
    data_replicate: int = 1
    data_shard: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for name in ("pipeline", "data_replicate", "data_shard", "tensor", "expert"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give at least 1 rank")
        inner = self.data_shard * self.tensor
        if self.expert > 1 and (self.stage % self.expert or (inner % self.expert and self.expert % inner)):
            raise ValueError(
                f"expert = {self.expert}: it folds over data_shard * tensor = {inner} ranks and then over "
                f"data_replicate = {self.data_replicate}; give a divisor of {inner}, or a multiple of it that divides "
                f"{self.stage}"
            )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pipeline * self.stage

    @property
    def stage(self) -> int:
        """Ranks of one stage of the pipeline."""
        return self.data_replicate * self.data_shard * self.tensor

    @property
    def data(self) -> int:
        """Number of different batches in a step."""
        return self.data_replicate * self.data_shard

    @property
    def expert_shard(self) -> int:
        """Ranks over which FSDP shards what an expert rank holds."""
        return max(self.data_shard * self.tensor // self.expert, 1)

    @property
    def expert_replicate(self) -> int:
        """Copies of every expert."""
        return self.stage // (self.expert * self.expert_shard)


@dataclass(frozen=True)
class Meshes:
    """The views of one world, as this rank has them: of the ranks of its stage, and of the pipeline through it."""

    sizes: MeshSizes
    pipeline: DeviceMesh
    """Ranks at the same place of each stage, first stage first."""
    dense: DeviceMesh
    """(data_parallel, tensor_parallel)."""
    dense_data: DeviceMesh
    """Where FSDP shards dense parameters: (data_replicate, data_shard) where there are replicas, else data_parallel."""
    sparse: DeviceMesh
    """(expert_replicate, expert_shard, expert_parallel)."""
    sparse_data: DeviceMesh
    """Where FSDP shards experts: (expert_replicate, expert_shard) where there are replicas, else expert_shard."""

    @property
    def data(self) -> DeviceMesh:
        """Ranks with different batches (and the same tensor rank): what losses and counts are summed over."""
        return self.dense[DATA]

    @property
    def tensor(self) -> DeviceMesh:
        """Ranks that share a batch."""
        return self.dense[TENSOR]

    @property
    def expert(self) -> DeviceMesh:
        """Ranks over which the experts are spread."""
        return self.sparse[EXPERT]


def build_meshes(device_type: str, sizes: MeshSizes) -> Meshes:
    """Make the views and their process groups; every rank calls it.

    Raises:
        ValueError: the sizes do not fill the world.
    """
    world = dist.get_world_size()
    if sizes.world != world:
        factors = " * ".join(map(str, (sizes.pipeline, sizes.data_replicate, sizes.data_shard, sizes.tensor)))
        raise ValueError(
            f"pipeline * data_replicate * data_shard * tensor = {factors} = {sizes.world}: the run has {world} "
            f"processes; make the product {world}"
        )
    _let_threads_finish_at_exit()
    ranks = init_device_mesh(device_type, (world,), mesh_dim_names=("world",))
    stages = unflatten(ranks, (sizes.pipeline, sizes.stage), (PIPELINE, "stage"))
    stage = stages["stage"]
    dense = unflatten(stage, (sizes.data, sizes.tensor), (DATA, TENSOR))
    dense_data = dense[DATA]
    if sizes.data_replicate > 1:
        shape = (sizes.data_replicate, sizes.data_shard, sizes.tensor)
        dense_data = unflatten(stage, shape, ("data_replicate", "data_shard", TENSOR))["data_replicate", "data_shard"]
    shape = (sizes.expert_replicate, sizes.expert_shard, sizes.expert)
    sparse = unflatten(stage, shape, ("expert_replicate", "expert_shard", EXPERT))
    sparse_data = sparse["expert_replicate", "expert_shard"] if sizes.expert_replicate > 1 else sparse["expert_shard"]
    return Meshes(sizes, stages[PIPELINE], dense, dense_data, sparse, sparse_data)


@cache
def _let_threads_finish_at_exit() -> None:
    """Leave gloo's threads a moment before the interpreter ends.

    They let go of the tensors of a collective after they have reported it done, and need the interpreter for it: one
    that asks while the interpreter is ending aborts the program (pytorch issue 190489). Destroying the groups does not
    end the threads, as meshes, and what DTensor remembers by them, hold the groups.
    """
    atexit.register(time.sleep, 0.1)
