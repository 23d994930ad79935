"""The Lightning strategy: ``zoo fit`` on several devices, in any layout, from outside the model."""

from __future__ import annotations

import dataclasses
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from zoo.config import ModelConfig
from zoo.model import Decoder
from zoo.parallel import checkpoint as sharded
from zoo.parallel import grads, init
from zoo.parallel.apply import ParallelOptions, parallelize
from zoo.parallel.mesh import Meshes, MeshSizes, build_meshes
from zoo.parallel.plan import Plan, load_plan
from zoo.parallel.supervise import MEETING_SECONDS, Launcher, Watch, end_process
from zoo.parallel.torch_private import set_timeout
from zoo.parallel.weights import load_weights


class MoEParallelStrategy(ModelParallelStrategy):
    """Spreads a decoder over processes as a plan says: data, sharded data, expert and tensor parallelism.

    The module asks it for its model (``build_model``), and for everything that is summed over ranks. Losses are summed
    over tokens and divided by the global number of tokens, so that a step equals that of one process.

    Args:
        plan: ``ddp``, ``fsdp``, ``ep``, ``ep_fsdp``, ``tp_ep_fsdp``, or the path of a plan YAML.
        tensor: Ranks that share a batch. By default 2 in a plan with rules for them, else 1.
        expert: Ranks over which the experts are spread. By default as many as the world and the experts allow.
        replicate: Data ranks that hold copies of what the others shard. By default all in ``ddp`` and ``ep``, else 1.
        recompute: Whose activations are computed again in the backward pass; ``zoo fit`` does so on one device as well.
        capacity_factor: Bound on what an expert takes over its balanced load; by default nothing is dropped.
        overlap_shared_experts: Compute shared experts while tokens travel.
        reshard_after_forward: Free gathered parameters between forward and backward.
        compile_backend: ``torch.compile`` every block with this backend.
        ranks_per_node: Neighbouring ranks that share fast links; experts over several such nodes are reached in two
            hops. By default the processes of one machine.
        reduce_every_micro_batch: Under accumulation, sum gradients over ranks after every micro-batch, not after the
            last: more communication, and gradients are never held in the size of the gathered parameters.
        async_save: Go on training while a checkpoint is written, from a copy of this rank's part of it in host memory.
        timeout: Seconds after which a collective that some rank does not join is an error.
    """

    def __init__(
        self,
        plan: str = "fsdp",
        *,
        tensor: int | None = None,
        expert: int | None = None,
        replicate: int | None = None,
        recompute: Literal["none", "experts", "block"] = "none",
        capacity_factor: float | None = None,
        overlap_shared_experts: bool = True,
        reshard_after_forward: bool = True,
        compile_backend: str | None = None,
        ranks_per_node: int | None = None,
        reduce_every_micro_batch: bool = False,
        async_save: bool = True,
        timeout: float = 600.0,
    ) -> None:
        # torch's own ends the rank that waits first, and names nobody: the watch comes before it.
        super().__init__(timeout=timedelta(seconds=timeout + MEETING_SECONDS))
        self._patience = timeout
        self.plan = load_plan(plan)
        self._sizes = {"tensor": tensor, "expert": expert, "replicate": replicate}
        self.options = ParallelOptions(
            recompute=recompute,
            compile_backend=compile_backend,
            capacity_factor=capacity_factor,
            overlap_shared_experts=overlap_shared_experts,
            reshard_after_forward=reshard_after_forward,
            ranks_per_node=ranks_per_node,
        )
        self._meshes: Meshes | None = None
        self._watch: Watch | None = None
        self._reduce_every_micro_batch = reduce_every_micro_batch
        self._async_save = async_save
        self._saver: sharded.Saver | None = None

    @property
    def meshes(self) -> Meshes:
        """The views of the ranks; there once the processes have met."""
        assert self._meshes is not None
        return self._meshes

    def setup_environment(self) -> None:
        """Let the processes meet, and make the meshes in place of Lightning's, which has no expert dimension.

        Raises:
            ValueError: sizes that do not fit the world or the model.
        """
        self._setup_distributed()
        assert self.lightning_module is not None
        config: Any = self.lightning_module.spec
        sizes = choose_sizes(self.plan, config.model, self.world_size, **self._sizes)
        self._meshes = build_meshes(self.root_device.type, sizes)
        self._device_mesh = self._meshes.dense
        self.lightning_module._device_mesh = self._meshes.dense
        self._saver = sharded.Saver(self._timeout, background=self._async_save)
        if self.world_size > 1:
            end = self._launcher.end if isinstance(self._launcher, Launcher) else end_process
            self._watch = Watch(self.global_rank, self.world_size, self._patience, end)
            self._watch.start()

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def on_exception(self, exception: BaseException) -> None:
        """Finish the checkpoint under way and let the other ranks know; end this one where another is the reason.

        The watch ends a rank that waits here for one that is gone.
        """
        if self._saver is not None:
            try:
                self._saver.wait()
            except (OSError, RuntimeError) as error:
                print(f"zoo: error: {error}", file=sys.stderr)
        if self._watch is not None and isinstance(exception, Exception):
            self._watch.fail(exception)

    def teardown(self) -> None:
        """End the watch over the other ranks."""
        if self._watch is not None:
            self._watch.end()
        super().teardown()

    def build_model(self, config: ModelConfig, seed: int, source: Path | None, precision: str) -> Decoder:
        """The spread decoder with the weights of ``seed`` or of the checkpoint ``source``; no rank ever holds it whole.

        ``bf16-mixed`` gathers in bf16 what is kept in fp32, ``bf16-true`` keeps it in bf16; both sum gradients in fp32.

        Raises:
            ValueError: the plan or the sizes do not fit the model, or the checkpoint is of another one.
        """
        # Cast before it is spread: FSDP's buffers have the dtype that it found.
        with torch.device("meta"):
            model = Decoder(config).to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
        half = torch.bfloat16 if precision.startswith("bf16") and self.world_size > 1 else None
        options = dataclasses.replace(self.options, param_dtype=half)
        if options.ranks_per_node is None:
            options = dataclasses.replace(options, ranks_per_node=self.num_processes)
        parallelize(model, self.meshes, self.plan, options)
        assert self._timeout is not None
        set_timeout(self._timeout)
        model.to_empty(device=self.root_device)
        if source is None:
            init.initialize(model, seed)
        else:
            load_weights(model, source)
        return model

    def sum_over_data(self, value: Tensor) -> Tensor:
        """Sum over the ranks with different batches."""
        return grads.sum_over_data(value, self.meshes)

    def all_finite(self, values: Tensor) -> Tensor:
        """Which of ``values`` are finite on every rank."""
        return grads.all_finite(values)

    def set_last_micro_batch(self, model: nn.Module, last: bool) -> None:
        """Say whether the next backward pass is the ``last`` of the step: gradients wait for it to be reduced."""
        grads.set_last_micro_batch(model, last or self._reduce_every_micro_batch)

    # -------------------------------------------------------------------------------------------------------------
    # Checkpoints (``zoo.parallel.checkpoint``)
    # -------------------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's shards."""
        assert self.model is not None
        return dict(self.model.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """This rank's shards of the state by name of parameter, and the groups."""
        return sharded.optimizer_state(_plain(optimizer), self._parameter_names())

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a sharded checkpoint, or begin to (``async_save``). Every rank calls it.

        Raises:
            OSError: on every rank, where one could not write this one or the one begun before; others are intact.
        """
        assert self._saver is not None
        self._saver.save(Path(self.broadcast(str(filepath))), checkpoint)

    def saved(self, *, wait: bool) -> bool:
        """Whether the last checkpoint stands, the same on every rank. Every rank calls it, and may ``wait`` for it.

        Raises:
            OSError: on every rank, where one could not write it; earlier checkpoints are intact.
        """
        assert self._saver is not None
        if not wait and not self.reduce_boolean_decision(self._saver.idle, all=True):
            return False
        self._saver.wait()
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill model and optimizer from a checkpoint of any layout, or of one process. Every rank calls it.

        Raises:
            ValueError: the checkpoint is of another model.
        """
        assert self.model is not None
        (optimizer,) = self.optimizers
        path = Path(self.broadcast(str(checkpoint_path)))
        found: dict[str, Any] = sharded.load(
            path, dict(self.model.state_dict()), _plain(optimizer), self._parameter_names()
        )
        return found

    def _parameter_names(self) -> dict[Tensor, str]:
        assert self.model is not None
        return {parameter: name for name, parameter in self.model.named_parameters()}


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that Lightning may have wrapped."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def choose_sizes(
    plan: Plan,
    config: ModelConfig,
    world: int,
    *,
    tensor: int | None = None,
    expert: int | None = None,
    replicate: int | None = None,
) -> MeshSizes:
    """Mesh sizes for ``world`` ranks; what is not given is chosen (``MoEParallelStrategy``).

    Raises:
        ValueError: sizes that do not fit the world.
    """
    if tensor is None:
        tensor = 2 if plan.tensor and world > 1 else 1
    if expert is not None or not plan.experts or config.moe is None:
        return plan.sizes(world, tensor=tensor, expert=expert or 1, replicate=replicate)
    # From the most ranks down; one always fits.
    for ranks in range(world, 1, -1):
        if world % ranks or config.moe.num_experts % ranks:
            continue
        try:
            return plan.sizes(world, tensor=tensor, expert=ranks, replicate=replicate)
        except ValueError:
            continue
    return plan.sizes(world, tensor=tensor, replicate=replicate)
