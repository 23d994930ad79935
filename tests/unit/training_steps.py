"""Steps of the training module on made batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from zoo.training.module import ZooModule

B, S, V = 2, 12, 50
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_layers": 2,
    "intermediate_size": 32,
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    "moe": {"num_experts": 4, "moe_intermediate_size": 8},
}
BIASED = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_layers": 2,
    "intermediate_size": 32,
    "mla": dict(num_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    "moe": {"num_experts": 8, "top_k": 2, "moe_intermediate_size": 8},
}


def batches(count: int) -> list[dict[str, Tensor]]:
    """Micro-batches with unequal numbers of labels, two documents a row and padding in the last."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids = torch.randint(0, V, (B, S + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:, 5] = -100
        labels[0, : 3 * i] = -100
        documents = torch.arange(S).ge(6).long().repeat(B, 1)
        if i == count - 1:
            documents[1, 9:] = -1
            labels[1, 9:] = -100
        made.append({"input_ids": ids[:, :-1], "labels": labels, "document_ids": documents})
    return made


class Gradients(Callback):
    """Keeps the gradients that the optimizer used."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}


def trainer_of(tmp_path: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **arguments,
    )


def one_step(module: ZooModule, micro_batches: list[dict[str, Tensor]], tmp_path: Path) -> dict[str, Tensor]:
    """Take one optimizer step over ``micro_batches`` and return its gradients."""
    gradients = Gradients()
    trainer = trainer_of(tmp_path, gradients, max_steps=1, accumulate_grad_batches=len(micro_batches))
    trainer.fit(module, DataLoader(micro_batches, batch_size=None))
    return gradients.values


def fit_steps(module: ZooModule, steps: int, tmp_path: Path, *callbacks: Callback, **arguments: Any) -> None:
    """Take so many optimizer steps."""
    data = batches(steps * arguments.get("accumulate_grad_batches", 1))
    trainer_of(tmp_path, *callbacks, max_steps=steps, **arguments).fit(module, DataLoader(data, batch_size=None))
