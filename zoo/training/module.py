"""The Lightning module: any ``ModelConfig``, the next-token loss, the balance losses and the optimizer.

Shapes: E experts, L MoE layers.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import OmegaConf
from torch import Tensor
from torchmetrics import MeanMetric

from zoo.config import ModelConfig, ModelSpec
from zoo.config_reading import from_dict, to_dict
from zoo.families import expressible
from zoo.finetune.run import Finetuning
from zoo.model import Decoder, DecoderOutput, build
from zoo.moe.exploration import set_step
from zoo.moe.router import Router, update_selection_bias
from zoo.parallel import grads
from zoo.parallel.apply import recompute_activations
from zoo.parallel.strategy import MoEParallelStrategy
from zoo.registry import find_spec, own_checkpoint
from zoo.training import culprit
from zoo.training.averaging import ExponentialAverage
from zoo.training.guard import SpikeConfig, StepGuard
from zoo.training.loss import Objective, Scope, StepSums, label_count, micro_batch_sums
from zoo.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer
from zoo.training.ramp import Weight, check_weight, weight_at

ADAMW = OptimizerConfig()
COSINE = ScheduleConfig()


class ZooModule(LightningModule):
    """Trains a decoder on batches of packed documents.

    The loss of an optimizer step is the mean negative log-likelihood over all labels of its micro-batches (not the
    mean of their means, which would weigh labels unequally), plus each balance loss times its coefficient. A balance
    loss is taken per micro-batch and averaged over the micro-batches of the step with the same weights. Splitting a
    step into micro-batches therefore leaves the gradient of the likelihood as it is, and that of the z-loss and of the
    sequence scope where the parts have equal numbers of labels; the other scopes have, by their definition, another
    one (docs/training.md).

    A weight is a number or a ``Ramp`` over optimizer steps.

    Args:
        name: Name in ``configs/models``, path of a model YAML, or a checkpoint directory to train on from.
        overrides: Fields of the model that replace those of ``name``, nested as in its YAML; not with a checkpoint.
        load_balance_coef: Weight of the load-balance loss (Switch, arXiv 2101.03961: 0.01).
        device_balance_coef: Weight of the device-level balance loss (DeepSeek-V2, arXiv 2405.04434: 0.05).
        communication_balance_coef: Weight of the communication balance loss (DeepSeek-V2: 0.02).
        balance_devices: Devices that these two balance, each with as many neighbouring experts; 0 are the
            ``num_groups`` of the model.
        balance_scope: What the load fractions of the balance losses are taken over: a micro-batch, each sequence
            (DeepSeek-V3's sequence-wise loss), or the micro-batches of the step so far on all data ranks
            (``global_batch``, arXiv 2501.11873).
        z_loss_coef: Weight of the router z-loss (ST-MoE, arXiv 2202.08906: 0.001).
        bias_update_rate: Step of the selection bias of loss-free balancing (arXiv 2408.15664: 0.001); 0 leaves it.
        mtp_coef: Weight of the multi-token prediction loss (DeepSeek-V3, arXiv 2412.19437: 0.3, later 0.1); 0 leaves
            the model's MTP modules as they are.
        optimizer: AdamW's settings, and whether Muon updates the matrices in the blocks.
        schedule: Warm-up and decay of the learning rate.
        seed: Seed of the fresh weights.
        max_skipped_steps: Steps in a row that may be skipped because the loss or the gradient norm is not finite; one
            more ends the run.
        ema_decay: Average the weights exponentially, with this decay a step; the average is validated, and is the model
            that the run leaves. 0 averages nothing; on one device.
        recompute: Whose activations are computed again in the backward pass instead of kept, on one device; of several
            ``MoEParallelStrategy`` decides. ``zoo fit`` has ``parallel.recompute`` for both.
        spikes: Skip steps with a loss spike as well; by default they are taken.

    Raises:
        ValueError: an unknown model, overrides that do not fit it, balance settings of a model without experts, or an
            ``mtp_coef`` of one without MTP modules.
    """

    def __init__(
        self,
        name: str,
        overrides: dict[str, Any] | None = None,
        load_balance_coef: Weight = 0.0,
        device_balance_coef: Weight = 0.0,
        communication_balance_coef: Weight = 0.0,
        balance_devices: int = 0,
        balance_scope: Scope = "micro_batch",
        z_loss_coef: Weight = 0.0,
        bias_update_rate: Weight = 0.0,
        mtp_coef: Weight = 0.0,
        optimizer: OptimizerConfig = ADAMW,
        schedule: ScheduleConfig = COSINE,
        seed: int = 0,
        max_skipped_steps: int = 10,
        spikes: SpikeConfig | None = None,
        ema_decay: float = 0.0,
        recompute: Literal["none", "experts", "block"] = "none",
    ) -> None:
        super().__init__()
        self.checkpoint = Path(name) if Path(name).is_dir() else own_checkpoint(name)
        self.spec = _resolve(name, overrides or {}, self.checkpoint)
        self.bias_update_rate = bias_update_rate
        self.mtp_coef = mtp_coef
        self.optimizer_config = optimizer
        self.schedule = schedule
        self.seed = seed
        self.guard = StepGuard(max_skipped_steps, spikes)
        self.average = ExponentialAverage(ema_decay) if ema_decay else None
        self.recompute = recompute
        self._check_bias(self.spec.model)
        self.objective = Objective(
            load_balance_coef=load_balance_coef,
            device_balance_coef=device_balance_coef,
            communication_balance_coef=communication_balance_coef,
            z_loss_coef=z_loss_coef,
            mtp_coef=mtp_coef,
            balance_scope=balance_scope,
            balance_devices=balance_devices,
        ).of(self.spec.name, self.spec.model)
        self.model: Decoder | None = None
        self.finetuning: Finetuning | None = None
        """What is trained of it, where that is not all."""
        self.val_loss = MeanMetric().set_dtype(torch.float64)
        self.step_sums: StepSums | None = None
        self.step_batches: list[Mapping[str, Tensor]] = []
        """The micro-batches of the step under way."""
        self.step_metrics: dict[str, Tensor] = {}
        """Values of the last optimizer step, as they are logged; losses are means over its labels."""
        self.val_metrics: dict[str, Tensor] = {}
        """Values of the last validation, fp64."""
        self.step_expert_counts = torch.empty(0, 0, dtype=torch.int64)
        """[L, E], assignments to each expert in the last optimizer step."""

    def _check_bias(self, config: ModelConfig) -> None:
        check_weight("bias_update_rate", self.bias_update_rate)
        if self.bias_update_rate and not (config.moe and config.moe.router_bias):
            raise ValueError(
                f"model.bias_update_rate = {self.bias_update_rate}: {self.spec.name} has no selection bias; "
                "set model.overrides.moe.router_bias to true"
            )

    def check_vocabulary(self, tokenizer_size: int) -> None:
        """Raise ``ValueError`` where the tokenizer has ids that the embedding lacks."""
        if tokenizer_size > self.spec.model.vocab_size:
            raise ValueError(
                f"model.overrides.vocab_size = {self.spec.model.vocab_size}: the data's tokenizer has {tokenizer_size} "
                f"ids; set it to at least {tokenizer_size}"
            )

    @property
    def parallel(self) -> MoEParallelStrategy | None:
        """What spreads the model over processes; ``None`` where one process trains it."""
        strategy = self._trainer.strategy if self._trainer is not None else None
        return strategy if isinstance(strategy, MoEParallelStrategy) else None

    @property
    def _steps_taken(self) -> int:
        """Optimizer steps before this one; 0 outside a trainer."""
        return self._trainer.global_step if self._trainer is not None else 0

    def configure_model(self) -> None:
        """Build or load the weights, once, where Lightning wants them."""
        if self.model is not None:
            return
        if self.parallel is not None:
            precision = str(self.trainer.precision)
            self.model = self.parallel.build_model(self.spec.model, self.seed, self.checkpoint, precision)
        elif self.checkpoint is None:
            self.model = build(self.spec.model, self.seed)
        else:
            from zoo.weights import load

            self.model = load(self.checkpoint)
        if self.finetuning is not None:
            print(self.finetuning.begin(self.model, self.seed), flush=True)
        if self.parallel is None:
            recompute_activations(self.model, self.recompute)
        self.model.train()

    def on_fit_start(self) -> None:
        """Say where the training loss is not that of predicting."""
        moe = self.spec.model.moe
        if moe is not None and moe.routing is not None and not moe.routing.causal_in_training:
            self._say(
                f"warning: with moe.routing.choice = {moe.routing.choice}, experts of a token depend on later tokens "
                f"{'while' if moe.routing.causal else 'after and while'} training: the loss may be too low"
            )

    # -------------------------------------------------------------------------------------------------------------
    # Loss
    # -------------------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> DecoderOutput:
        """Hidden states and routing of a batch of packed documents (``TokenDataModule``); no logits."""
        assert self.model is not None
        output: DecoderOutput = self.model(
            batch["input_ids"],
            document_ids=batch["document_ids"],
            logits_to_keep=None,
            mtp=self.training and bool(self.mtp_coef),
        )
        return output

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Sum over the micro-batch's labels of the loss, fp32; ``on_before_optimizer_step`` makes it a mean."""
        assert self.model is not None
        if self.parallel is not None:
            # Lightning's own flag: nothing public says which micro-batch is the last of a step.
            self.parallel.set_last_micro_batch(self.model, not self.trainer.fit_loop._should_accumulate())
        set_step(self.model, self._steps_taken)
        sums = micro_batch_sums(self.model, self(batch), batch, self.objective, self.parallel, self.step_sums)
        self.step_batches.append(batch)
        detached = sums.map(Tensor.detach)
        self.step_sums = detached if self.step_sums is None else self.step_sums + detached
        return self.objective.total(sums, self._steps_taken)

    def on_validation_epoch_start(self) -> None:
        """Sum in fp64, also where all of the module was cast (``bf16-true`` casts the metric's sums as well)."""
        self.val_loss.set_dtype(torch.float64)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add the micro-batch to the validation loss, every label with the same weight."""
        assert self.model is not None
        nll, count = self.model.nll(self(batch).hidden, batch["labels"]), label_count(batch["labels"])
        if count > 0:
            self.val_loss.update(nll / count, weight=count)

    def on_validation_epoch_end(self) -> None:
        """Mean negative log-likelihood of a token in nats, and its exponential, the perplexity."""
        loss = self.val_loss.compute()
        self.val_loss.reset()
        self.val_metrics = {"val/loss": loss, "val/perplexity": loss.exp()}
        # For callbacks that monitor one. Lightning rounds to the precision of the run, so it does not write them.
        self.log_dict(self.val_metrics, logger=False)

    # -------------------------------------------------------------------------------------------------------------
    # Optimizer step
    # -------------------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """The average of the weights, where there is one.

        Raises:
            ValueError: the model is spread over processes.
        """
        if self.average is not None and self.parallel is not None:
            raise ValueError("model.ema_decay: weights are averaged on one device only; set it to 0")
        return [] if self.average is None else [self.average]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer with a schedule over all optimizer steps of the run."""
        assert self.model is not None
        total_steps = self.trainer.max_steps
        if total_steps < 1:
            raise ValueError(f"trainer.max_steps = {total_steps}: the schedule needs an end; give the optimizer steps")
        adamw, schedule = build_optimizer(self.model, self.optimizer_config, self.schedule, total_steps)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the gradients of the summed loss into those of the mean, and collect the step's metrics.

        A step whose loss or gradient norm is not finite on any rank, or a spike, is skipped by all: the optimizer
        leaves parameters without gradients, and their moments, as they are.

        Raises:
            ValueError: one more than ``max_skipped_steps`` in a row, on every rank alike.
        """
        parallel, sums = self.parallel, self.step_sums
        assert sums is not None
        if parallel is not None:
            sums = self.step_sums = sums.map(parallel.sum_over_data)
        labels = sums.labels.clamp(min=1)
        loss = self.objective.total(sums, self._steps_taken) / labels
        # Lightning divided each micro-batch's sum by their number.
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.trainer.accumulate_grad_batches / labels)
        norm = grads.global_norm(self.parameters())
        values = torch.stack((loss, norm))
        finite = values.isfinite() if parallel is None else parallel.all_finite(values)
        loss, norm = values.where(finite, torch.nan)
        self._judge(values, finite)
        if self.guard.skipped_last:
            optimizer.zero_grad()
        self.step_metrics = {
            "train/loss": loss,
            "train/lm_loss": sums.nll / labels,
            "train/grad_norm": norm,
            "train/lr": torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64),
            "train/skipped_steps": torch.tensor(self.guard.skipped.total),
        }
        if self.guard.spikes is not None:
            self.step_metrics["train/skipped_spikes"] = torch.tensor(self.guard.skipped.spikes)
        self.step_metrics |= self.objective.metrics(sums, self.spec.model)

    def _judge(self, values: Tensor, finite: Tensor) -> None:
        """Count the step with ``values``, loss and gradient norm, which are ``finite`` or not, as taken or skipped."""
        assert self.model is not None
        step, parallel = self._steps_taken + 1, self.parallel
        all_finite = torch.isfinite if parallel is None else parallel.all_finite
        if finite.all():
            line = self.guard.finite(
                step, values, lambda spike: not all_finite(values.new_tensor(torch.nan if spike else 0.0))
            )
        else:
            name = "gradient norm" if finite[0] else "loss"
            with self.trainer.precision_plugin.train_step_context():
                forwards = [partial(self, batch) for batch in self.step_batches]
                where = culprit.describe(name, self.model, forwards, all_finite)
            line = self.guard.not_finite(step, name, where)
        if line is not None:
            self._say(line)

    def _say(self, line: str) -> None:
        if self.trainer.is_global_zero:
            print(line, file=sys.stderr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how many steps were skipped, and what spikes are measured by."""
        checkpoint["skipped_steps"] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        self.guard.load_state_dict(checkpoint["skipped_steps"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that was just measured. Lightning's own refuses fused optimizers under autocast.

        Raises:
            ValueError: another algorithm than clipping by the norm is asked for.
        """
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError("trainer.gradient_clip_algorithm = value: only norm is supported; remove it")
        if gradient_clip_val:
            grads.clip_gradients(self.parameters(), gradient_clip_val, self.step_metrics["train/grad_norm"])

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, then move the selection biases by the load of all micro-batches of the step (arXiv 2408.15664).

        A skipped step moves no bias either.
        """
        step = self._steps_taken
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        sums, self.step_sums = self.step_sums, None
        self.step_batches.clear()
        assert sums is not None and self.model is not None
        self.step_expert_counts = sums.expert_counts
        if self.bias_update_rate and not self.guard.skipped_last:
            routers = [m for m in self.model.modules() if isinstance(m, Router)]
            # Those of MTP modules come last, and have no counts where the modules did not run.
            rate = weight_at(self.bias_update_rate, step)
            for router, counts in zip(routers, sums.expert_counts, strict=not self.model.mtp):
                assert router.bias is not None
                update_selection_bias(router.bias, counts, rate)


def _resolve(name: str, overrides: dict[str, Any], checkpoint: Path | None) -> ModelSpec:
    """The spec of ``name`` with ``overrides`` merged into its model, which may have no weights in a ``checkpoint``."""
    spec = find_spec(name)
    if not overrides:
        return spec
    if checkpoint is not None:
        raise ValueError(f"model.overrides = {overrides}: the weights in {name} fix the model; remove the overrides")
    merged = OmegaConf.to_container(OmegaConf.merge(to_dict(spec.model), overrides))
    model = from_dict(ModelConfig, merged, "model.overrides")
    # Weights of the changed model are not those of the published source, and maybe not of its family.
    return dataclasses.replace(
        spec, model=model, family=expressible(model), source=None, reference=None, published=None
    )
