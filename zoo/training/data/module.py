"""The LightningDataModule that serves packed tokens and knows how far a run has read.

Letters: B batch (windows over all ranks), R data-parallel ranks, S sequence length.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from zoo.tokenizer import Tokenizer
from zoo.training.data.packing import PackedDataset
from zoo.training.data.sampler import SequentialSampler, TrainSampler
from zoo.training.data.store import SplitName, TokenSplit, load_tokenizer, read_manifest

Batch = dict[str, Tensor]


class TokenDataModule(LightningDataModule):
    """Batches of packed documents out of a directory made by ``zoo data build``.

    A batch is a dict of int64 tensors [B / R, S]: ``input_ids``, ``labels`` (already shifted; -100 is ignored) and
    ``document_ids`` (-1 where a window holds no token). Of instructions only answers are labels.

    Training batches never end: epochs follow each other, each in its own order, and ``trainer.max_steps`` says when to
    stop. Which tokens come at which step depends on nothing but the data, ``seed``, ``batch_size`` and
    ``sequence_length``. A checkpoint holds the number of samples that the trainer has finished (not those that workers
    have fetched ahead), and a resumed run goes on there.

    Several processes need ``Trainer(use_distributed_sampler=False)``: the sampler here deals out the ranks' parts.

    Args:
        data_dir: directory made by ``zoo data build``.
        sequence_length: tokens in a training example.
        batch_size: examples in a batch, over all ranks and before gradient accumulation.
        seed: of the order of the examples.
        num_workers: processes that read ahead; 0 reads in the training process.
    """

    def __init__(
        self,
        data_dir: str | Path,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.data_dir = Path(data_dir)
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        if seed < 0:
            raise ValueError(f"seed = {seed}: give 0 or a positive integer")
        self.manifest = read_manifest(self.data_dir)
        # (samples, batches) that the trainer had finished at the point that everything after is counted from.
        self._origin = (0, 0)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the data was made with."""
        return load_tokenizer(self.data_dir, self.manifest)

    @cached_property
    def train_dataset(self) -> PackedDataset:
        """All windows of the training split.

        Of instructions, a warning says how many are longer than a window.
        """
        dataset = self._dataset("train")
        if dataset.cut:
            rank_zero_warn(
                f"{self.data_dir}: {dataset.cut:,} of {len(dataset.split.offsets) - 1:,} conversations are longer than "
                f"sequence_length = {self.sequence_length} and cut there: what follows is learned without it"
            )
        return dataset

    @cached_property
    def validation_dataset(self) -> PackedDataset:
        """All windows of the validation split."""
        return self._dataset("validation")

    @property
    def samples_seen(self) -> int:
        """Examples, over all ranks, that the trainer has finished since the run began."""
        samples, batches = self._origin
        return samples + (self._batches_finished() - batches) * self.batch_size

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless batches, beginning after ``samples_seen``.

        Raises:
            ValueError: the trainer waits for the end of an epoch, which does not come.
        """
        rank, world_size = self._rank()
        dataset = self.train_dataset
        trainer = self.trainer
        if trainer and trainer.max_steps == -1 and trainer.max_epochs != -1 and trainer.limit_train_batches == 1.0:
            raise ValueError(
                f"trainer.max_epochs = {trainer.max_epochs}: batches never end, so training is measured in steps; set "
                f"trainer.max_steps instead (once over {self.data_dir} is {len(dataset) / self.batch_size:.1f} batches)"
            )
        sampler = TrainSampler(len(dataset), self.batch_size, self.seed, lambda: self.samples_seen, rank, world_size)
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The validation split once, in order; no loader where the data was built without one."""
        if not self.manifest.splits["validation"].documents:
            return []
        rank, world_size = self._rank()
        dataset = self.validation_dataset
        return self._loader(dataset, SequentialSampler(len(dataset), self.batch_size, rank, world_size))

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, and what the order depends on."""
        return {"samples": self.samples_seen, "batches": self._batches_finished(), "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; ``batch_size`` may differ.

        Raises:
            ValueError: the checkpoint was trained on other data or in another order.
        """
        for key, value in self._order().items():
            before = state_dict["order"][key]
            if before != value:
                raise ValueError(
                    f"{key} = {value}: the checkpoint was trained with {before}, so its position in the data means "
                    "nothing here; use the same value, or start a new run from its weights"
                )
        self._origin = (state_dict["samples"], state_dict["batches"])

    def _order(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "train.bin SHA-256": self.manifest.splits["train"].sha256,
        }

    def _batches_finished(self) -> int:
        if self.trainer is None:
            return self._origin[1]
        # Lightning's own count: of all epochs, restored with a checkpoint, increased when a training step is done.
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()["processed"])

    def _dataset(self, name: SplitName) -> PackedDataset:
        return PackedDataset(TokenSplit(self.data_dir, name), self.sequence_length)

    def _rank(self) -> tuple[int, int]:
        """Rank and number of ranks that read different data (tensor-parallel ranks read the same)."""
        place = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (place["rank"], place["num_replicas"]) if place else (0, 1)

    def _loader(self, dataset: PackedDataset, sampler: Sampler[list[int]]) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )
