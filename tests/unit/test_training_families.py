"""Every family trains: the zoo's own training step lowers the loss of each kind of model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from zoo.families import FAMILIES
from zoo.model import Decoder, build
from zoo.registry import find_spec, model_names
from zoo.training.module import ZooModule
from zoo.training.optim import OptimizerConfig, ScheduleConfig

STEPS = 5
SMALL = {"vocab_size": 64, "num_layers": 2}


def tiny(family: str) -> str:
    """The smallest model of a family in the zoo."""
    names = [name for name in model_names() if find_spec(name).family == family]
    return min(names, key=lambda name: (find_spec(name).model.hidden_size, name))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_lower_the_loss(family: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 64, (2, 25), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(24).ge(10).long().repeat(2, 1)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "document_ids": documents}
    module = ZooModule(tiny(family), SMALL, optimizer=OptimizerConfig(lr=3e-3), schedule=ScheduleConfig(warmup_steps=1))
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    before = loss(build(module.spec.model), batch)
    trainer.fit(module, DataLoader([batch] * STEPS, batch_size=None))
    assert trainer.global_step == STEPS
    assert loss(module.model, batch) < before - 0.3
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@torch.no_grad()
def loss(model: Decoder, batch: dict[str, torch.Tensor]) -> float:
    """Mean negative log-likelihood of the labels of ``batch``."""
    logits = model(batch["input_ids"], document_ids=batch["document_ids"]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()
