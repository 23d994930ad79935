"""A callback for ``zoo fit`` that breaks gradients, as a failing device would."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor


class Poison(Callback):
    """Makes one rank's part of one gradient not finite, after gradients were summed over the ranks.

    At the end every rank writes what it holds of each parameter to ``rank-N.pt`` in the run directory.

    Args:
        steps: Optimizer steps, from 1, in which it does so.
        rank: Whose.
    """

    def __init__(self, steps: list[int], rank: int = 0) -> None:
        self.steps, self.rank = steps, rank

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.global_step + 1 in self.steps and trainer.global_rank == self.rank:
            local(pl_module.model.layers[1].ffn.router.weight.grad)[0] = float("nan")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        held = {name: local(parameter).detach().clone() for name, parameter in pl_module.named_parameters()}
        torch.save(held, Path(trainer.default_root_dir, f"rank-{trainer.global_rank}.pt"))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
