"""The data module in a real Trainer: order, resumption in the middle of an epoch, workers, validation."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from zoo.training.data import TokenDataModule
from zoo.training.data.builder import build
from zoo.training.data.sources import Source
from zoo.training.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    stories = directory / "stories.txt"
    stories.write_text("\n".join(f"Story {n}: Lily found {n * 7} apples." for n in range(100)))
    source = Source(str(stories), separator="\n")
    tokenizer = train_tokenizer([source], 300, directory / "tokenizer")
    build([source], tokenizer, directory / "data", validation_fraction=0.1)
    return directory / "data"


class Recorder(LightningModule):
    """Keeps what it is given, and dies at one batch if asked to."""

    def __init__(self, dies_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.dies_at = dies_at
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if len(self.trained) == self.dies_at:
            raise InterruptedError
        self.trained.append(batch["input_ids"].clone())
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated.append(batch["input_ids"].clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(
    module: TokenDataModule, model: Recorder, directory: Path, checkpoint: Path | None = None, **trainer: Any
) -> None:
    """Train for 8 optimizer steps of 3 batches, with a checkpoint after every second step."""
    saving = ModelCheckpoint(dirpath=directory, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    Trainer(
        accelerator="cpu",
        accumulate_grad_batches=3,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **{"max_steps": 8, "limit_val_batches": 0, **trainer},
    ).fit(model, module, ckpt_path=checkpoint, weights_only=True)


def test_a_batch_is_three_int64_tensors(data_dir: Path) -> None:
    module = TokenDataModule(data_dir, sequence_length=16, batch_size=4)
    batch = next(iter(module.train_dataloader()))
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        key: ((4, 16), torch.int64) for key in ("input_ids", "labels", "document_ids")
    }
    assert module.tokenizer.vocab_size == module.manifest.vocab_size == 300


def test_equal_arguments_read_equal_tokens_and_another_seed_reads_others(data_dir: Path) -> None:
    def read(seed: int, num_workers: int = 0) -> Tensor:
        module = TokenDataModule(data_dir, 16, 4, seed=seed, num_workers=num_workers)
        batches = itertools.islice(module.train_dataloader(), 60)  # several epochs
        return torch.stack([batch["input_ids"] for batch in batches])

    assert torch.equal(read(1), read(1))
    assert torch.equal(read(1), read(1, num_workers=2))
    assert not torch.equal(read(1), read(2))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("trainer", [{}, {"limit_train_batches": 6}, {"limit_val_batches": 1, "val_check_interval": 5}])
def test_a_run_that_died_continues_with_the_batch_it_would_have_read(
    data_dir: Path, tmp_path: Path, num_workers: int, trainer: dict[str, Any]
) -> None:
    def module() -> TokenDataModule:
        return TokenDataModule(data_dir, 16, 4, seed=3, num_workers=num_workers)

    whole = Recorder()
    fit(module(), whole, tmp_path / "whole", **trainer)
    assert len(whole.trained) == 24

    died = Recorder(dies_at=17)
    with pytest.raises(InterruptedError):
        fit(module(), died, tmp_path / "died", **trainer)
    resumed, data = Recorder(), module()
    fit(data, resumed, tmp_path / "died", tmp_path / "died" / "step=4.ckpt", **trainer)
    assert len(resumed.trained) == 12
    assert torch.equal(torch.stack(whole.trained[12:]), torch.stack(resumed.trained))
    assert torch.equal(whole.weight, resumed.weight)
    assert data.samples_seen == 24 * 4


def test_the_position_counts_samples_so_the_batch_size_may_change(data_dir: Path, tmp_path: Path) -> None:
    before = Recorder()
    fit(TokenDataModule(data_dir, 16, 4), before, tmp_path)
    after, data = Recorder(), TokenDataModule(data_dir, 16, 2)
    fit(data, after, tmp_path, tmp_path / "step=4.ckpt")
    assert torch.equal(torch.cat(before.trained[12:])[:24], torch.cat(after.trained))
    assert data.samples_seen == 12 * 4 + 12 * 2


@pytest.mark.parametrize(("argument", "value"), [("seed", 1), ("sequence_length", 8)])
def test_resuming_in_another_order_is_refused(data_dir: Path, argument: str, value: int) -> None:
    arguments = {"sequence_length": 16, "batch_size": 4, "seed": 0}
    state = TokenDataModule(data_dir, **arguments).state_dict()
    changed = TokenDataModule(data_dir, **(arguments | {argument: value}))
    with pytest.raises(
        ValueError, match=f"{argument} = {value}: the checkpoint was trained with {arguments[argument]}"
    ):
        changed.load_state_dict(state)


def test_validation_reads_the_whole_split_in_order(data_dir: Path, tmp_path: Path) -> None:
    module = TokenDataModule(data_dir, 16, 4)
    model = Recorder()
    fit(module, model, tmp_path, limit_val_batches=1.0, val_check_interval=24)
    stream = torch.from_numpy(module.validation_dataset.split.tokens.astype("int64"))
    assert torch.equal(torch.cat(model.validated).flatten()[: len(stream) - 1], stream[:-1])
    assert len(torch.cat(model.validated)) == len(module.validation_dataset)


def test_two_processes_read_what_one_reads(data_dir: Path, tmp_path: Path) -> None:
    class Saver(Recorder):
        def on_train_end(self) -> None:
            name = f"{self.trainer.world_size}-{self.global_rank}.pt"
            torch.save((torch.stack(self.trained), torch.cat(self.validated)), tmp_path / name)

    settings = {"limit_val_batches": 1.0, "val_check_interval": 24, "use_distributed_sampler": False}
    fit(TokenDataModule(data_dir, 16, 4), Saver(), tmp_path, **settings)
    two = {"devices": 2, "strategy": "ddp_fork"}
    # Forked, so that the workers need not import this file.
    fit(TokenDataModule(data_dir, 16, 4), Saver(), tmp_path / "two", **settings, **two)
    trained, validated = torch.load(tmp_path / "1-0.pt")
    ranks = [torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2)]
    assert torch.equal(trained, torch.cat([rank[0] for rank in ranks], dim=1))
    rows = torch.cat([rank[1] for rank in ranks])
    assert sorted(row for row in rows.tolist() if any(row)) == sorted(validated.tolist())


def test_data_without_validation_trains(data_dir: Path, tmp_path: Path) -> None:
    stories = data_dir.parent / "stories.txt"
    tokenizer = TokenDataModule(data_dir, 16, 4).tokenizer
    build([Source(str(stories))], tokenizer, tmp_path / "data", validation_fraction=0)
    model = Recorder()
    fit(TokenDataModule(tmp_path / "data", 16, 4), model, tmp_path / "run", limit_val_batches=1.0, val_check_interval=6)
    assert (len(model.trained), len(model.validated)) == (24, 0)


def test_waiting_for_the_end_of_an_epoch_is_refused(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"trainer.max_epochs = 2: batches never end, .* set trainer.max_steps instead"
    ):
        fit(TokenDataModule(data_dir, 16, 4), Recorder(), tmp_path, max_steps=-1, max_epochs=2)


def test_jsonargparse_builds_it_from_yaml(data_dir: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TokenDataModule, "data")
    parsed = parser.parse_args([f"--data.data_dir={data_dir}", "--data.sequence_length=16", "--data.batch_size=4"])
    assert parser.instantiate_classes(parsed).data.sequence_length == 16
