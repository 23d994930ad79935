"""An exponential moving average of the weights: what is validated, and what a run leaves as its model."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class ExponentialAverage(WeightAveraging):
    """Averages the weights after every optimizer step: a ← decay · a + (1 − decay) · w, beginning with those of step 1.

    Lightning's callback, except that it needs no warnings, keeps the average on the device that trains, and hands it
    over also where the last step was taken before the run was resumed. Selection biases are not averaged. A checkpoint
    holds both, the average as ``state_dict``.

    Args:
        decay: In (0, 1); it averages over about 1 / (1 − decay) steps.

    Raises:
        ValueError: another decay.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"model.ema_decay = {decay}: give a number between 0 and 1 such as 0.999, or 0 for none")
        # Not the buffers: rounding would move those of rotary positions, which are constant.
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average, of a model that is there.

        Raises:
            ValueError: the weights are kept in half precision.
        """
        if stage != "fit":
            return
        pl_module.configure_model()
        if any(parameter.dtype == torch.bfloat16 for parameter in pl_module.parameters()) or (
            trainer.precision == "bf16-true"
        ):
            raise ValueError(
                "model.ema_decay: an average moves too little for weights in bf16; set trainer.precision to bf16-mixed "
                "or 32-true"
            )
        device = trainer.strategy.root_device
        self._average_model = AveragedModel(pl_module, device=device, use_buffers=False, **self._kwargs)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait: checkpoints of the last step still take the weights themselves."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model. Unlike the end of training this also comes if no step was left to take."""
        self._copy_average_to_current(pl_module)
