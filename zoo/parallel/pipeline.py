"""Pipeline parallelism: the stages of a decoder on torch's schedules, from outside the model.

Only hidden states travel between stages. All ranks of a pipeline read the same rows, and each takes its document ids,
masks and labels from there.

Shapes: B batch, S sequence, E experts, L MoE layers of this rank.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from zoo.model import Decoder
from zoo.moe.router import Router, RouterOutput
from zoo.moe.stats import expert_counts
from zoo.parallel.apply import ParallelOptions, check_sizes, moe_layers, parallelize, replace_forward
from zoo.parallel.mesh import Meshes
from zoo.parallel.plan import Plan, resolve
from zoo.parallel.stages import Batch, cut, forward_stage, layer_costs, split_layers

TokenLoss = Callable[[Tensor], Tensor]
"""Sum of −ln p over the labels of a micro-batch → scalar."""
RouterLoss = Callable[[Sequence[RouterOutput], Batch], Tensor]
"""(routing of some MoE layers, their micro-batch without ``input_ids``) → scalar, a mean over these layers."""
Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b"]
_SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved_1f1b": ScheduleInterleaved1F1B}
PLAIN = ParallelOptions()


@dataclass(frozen=True, eq=False)
class PipelineStep:
    """Result of the forward and backward passes of one batch."""

    loss: Tensor
    """Sum of the losses of all micro-batches and stages; fp64 scalar, the same on all ranks of the pipeline."""
    expert_counts: Tensor
    """[L, E] int64, assignments in the batch to the experts of ``Pipeline.routers``; padding is left out."""


class Pipeline:
    """This rank's stages of a model, spread over the ranks of each stage as a plan says, and the schedule they run in.

    They begin without memory: ``to_empty``, then ``init.initialize`` or ``weights.load_weights``, for each. Gradients
    are sums, as those of ``parallelize``; their norm is ``grads.global_norm(pipeline.parameters(), meshes.pipeline)``.

    Args:
        model: The whole, on the meta device; it is left as it is.
        meshes: Of this world; ``meshes.sizes.pipeline`` ranks take the stages in turn.
        plan: What goes where in a stage, by the names of the whole model.
        options: Memory, speed and precision. FSDP gathers parameters once a micro-batch, or with
            ``reshard_after_forward=False`` once a batch.
        micro_batches: Parts of equally many rows that a batch is split into; they are in the pipeline together.
        schedule: ``gpipe`` (arXiv 1811.06965) runs all forward passes first; ``1f1b`` (arXiv 2006.09503) keeps the
            activations of at most as many micro-batches as there are stages; ``interleaved_1f1b`` (arXiv 2104.04473)
            gives each rank several stages, so that it waits less.
        stages_per_rank: Above 1 in ``interleaved_1f1b``, and only there.
        sequence_length: For which stages shall take equally long.

    Raises:
        ValueError: a model that cannot be cut so, too few micro-batches for the schedule, or a plan that does not fit.
    """

    def __init__(
        self,
        model: Decoder,
        meshes: Meshes,
        plan: Plan,
        options: ParallelOptions = PLAIN,
        *,
        micro_batches: int,
        schedule: Schedule = "1f1b",
        stages_per_rank: int = 1,
        sequence_length: int = 4096,
    ) -> None:
        ranks = meshes.sizes.pipeline
        _check_schedule(schedule, ranks, micro_batches, stages_per_rank)
        rules = resolve(plan, model)
        check_sizes(model.config, meshes.sizes, rules)
        parts = split_layers(layer_costs(model.config, sequence_length), ranks * stages_per_rank)
        self.stages: dict[int, Decoder] = {}
        """Number of the stage → its part of the model."""
        for index in range(meshes.pipeline.get_local_rank(), len(parts), ranks):
            stage = cut(copy.deepcopy(model), parts[index])
            held = rules.within(stage)
            # A stage of dense layers has no exchange to bound; a plan without experts is refused as ever.
            bound = options.capacity_factor if held.experts or not rules.experts else None
            parallelize(stage, meshes, held, dataclasses.replace(options, capacity_factor=bound))
            replace_forward(stage, partial(forward_stage, stage, partial(self._route, stage)))
            self.stages[index] = stage
        self._config, self._num_stages, self._dtype = model.config, len(parts), options.param_dtype
        self._moe_layers = sum(1 for _ in moe_layers(model))
        self._group = meshes.pipeline.get_group()
        self._schedule, self._micro_batches = schedule, micro_batches
        self._shape: torch.Size | None = None
        self._runner: Any = None
        # Of the step that runs:
        self._token_loss: TokenLoss | None = None
        self._router_loss: RouterLoss | None = None
        self._router_losses: list[Tensor] = []
        self._counts: dict[nn.Module, Tensor] = {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of this rank's stages."""
        return (parameter for stage in self.stages.values() for parameter in stage.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Of this rank's stages, by the names of the whole model."""
        return {name: tensor for stage in self.stages.values() for name, tensor in stage.state_dict().items()}

    def routers(self) -> list[Router]:
        """Of this rank's stages, in order."""
        found = (moe.router for stage in self.stages.values() for _, moe in moe_layers(stage))
        return [router for router in found if isinstance(router, Router)]

    def step(self, batch: Batch, token_loss: TokenLoss, router_loss: RouterLoss | None = None) -> PipelineStep:
        """Forward and backward pass of ``batch``; gradients add to those that are there. Every rank calls it.

        Args:
            batch: The same on all ranks of a pipeline, and of the same shape in every step.
            token_loss: Called on the last stage for each micro-batch; divides by a number of labels, or leaves it.
            router_loss: Called on each stage with MoE layers for each micro-batch, and weighted with its share of all
                MoE layers: the sum is the mean over all. Gradients are those of both losses as they are, so divide them
                by the global number of labels, or scale the gradients afterwards.

        Raises:
            ValueError: a batch that cannot be split, or that has another shape than the first.
        """
        ids, labels = batch["input_ids"], batch["labels"]
        self._prepare(ids)
        experts = self._config.moe.num_experts if self._config.moe else 0
        self._counts = {s: labels.new_zeros(sum(1 for _ in moe_layers(s)), experts) for s in self.stages.values()}
        self._token_loss, self._router_loss, self._router_losses = token_loss, router_loss, []
        losses: list[Tensor] = []
        others = {key: tensor for key, tensor in batch.items() if key != "input_ids"}
        inputs = [ids] if 0 in self.stages else []
        self._runner.step(*inputs, target=labels, losses=losses, return_outputs=False, **others)
        total = torch.zeros((), dtype=torch.float64, device=ids.device)
        for loss in (*losses, *self._router_losses):
            total += loss.detach()
        dist.all_reduce(total, group=self._group)
        return PipelineStep(total, torch.cat(list(self._counts.values())))

    def _route(self, stage: Decoder, outputs: list[RouterOutput], micro_batch: Batch) -> Tensor | None:
        """Count the assignments of one micro-batch in one stage; its part of the loss, if that is asked for."""
        mask = micro_batch.get("attention_mask")
        tokens = None if mask is None else mask != 0
        self._counts[stage] += torch.stack([expert_counts(routing, tokens) for routing in outputs])
        if self._router_loss is None:
            return None
        loss = self._router_loss(outputs, micro_batch) * (len(outputs) / self._moe_layers)
        self._router_losses.append(loss.detach())
        return loss

    def _prepare(self, ids: Tensor) -> None:
        """Make the schedule for batches like ``ids`` [B, S]: torch receives into buffers that are made once."""
        if self._shape is not None and ids.shape != self._shape:
            raise ValueError(f"batch of {tuple(ids.shape)} ids: the first had {tuple(self._shape)}; keep to one shape")
        if self._shape is not None:
            return
        rows, length = ids.shape
        if rows % self._micro_batches:
            raise ValueError(f"micro_batches = {self._micro_batches}: it must divide the {rows} rows of a batch")
        shape = (rows // self._micro_batches, length)
        dtype = self._dtype or next(self.parameters()).dtype
        like = partial(torch.empty, dtype=dtype, device="meta", requires_grad=True)
        tokens = torch.empty(shape, dtype=ids.dtype, device="meta")
        hidden = like((*shape, self._config.hidden_size))
        nll = like((), dtype=torch.promote_types(dtype, torch.float32))
        stages = [
            PipelineStage(
                stage,
                index,
                self._num_stages,
                ids.device,
                input_args=hidden if index > 0 else tokens,
                output_args=hidden if index < self._num_stages - 1 else nll,
                group=self._group,
            )
            for index, stage in self.stages.items()
        ]
        make: Any = _SCHEDULES[self._schedule]
        one_or_all: Any = stages if self._schedule == "interleaved_1f1b" else stages[0]
        self._runner = make(one_or_all, self._micro_batches, loss_fn=self._loss, scale_grads=False)
        self._shape = ids.shape

    def _loss(self, nll: Tensor, labels: Tensor) -> Tensor:
        assert self._token_loss is not None
        return self._token_loss(nll)


def _check_schedule(schedule: Schedule, ranks: int, micro_batches: int, stages_per_rank: int) -> None:
    interleaved = schedule == "interleaved_1f1b"
    if stages_per_rank < 1 or (stages_per_rank > 1) != interleaved:
        wanted = "2 or more" if interleaved else "1"
        raise ValueError(f"stages_per_rank = {stages_per_rank}: give {wanted} with schedule {schedule}")
    if micro_batches < 1 or (schedule == "1f1b" and micro_batches < ranks) or (interleaved and micro_batches % ranks):
        wanted = {"gpipe": "1 or more", "1f1b": f"{ranks} or more", "interleaved_1f1b": f"a multiple of {ranks}"}[
            schedule
        ]
        raise ValueError(f"micro_batches = {micro_batches}: give {wanted} with schedule {schedule} on {ranks} stages")
