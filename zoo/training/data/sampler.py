"""Which window of the data is read when: a pure function of (seed, number of samples seen so far).

A sample is one window. The order does not depend on the number of processes, workers or epochs in a run, and a run that
continues at sample n reads what an uninterrupted one would have read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from zoo.training.data.packing import PADDING_WINDOW


def epoch_order(num_windows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The permutation [num_windows] of all windows that is read in ``epoch`` (from 0)."""
    return np.random.default_rng([seed, epoch]).permutation(num_windows)


class TrainSampler(Sampler[list[int]]):
    """Endless batches of window indices for one rank; epochs follow each other, also inside a batch.

    Rank r of R reads rows r·B/R … (r+1)·B/R - 1 of every batch of B, so the ranks' parts put together are the batch
    that one process would read.
    """

    def __init__(
        self,
        num_windows: int,
        batch_size: int,
        seed: int,
        position: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            num_windows: size of the data set.
            batch_size: B, windows in a batch over all ranks.
            seed: of the order, 0 or more.
            position: number of samples, over all ranks, that were seen so far; asked each time an iterator is made.
            rank: r, from 0.
            world_size: R.

        Raises:
            ValueError: ``batch_size`` cannot be divided among the ranks.
        """
        self.num_windows = num_windows
        self.batch_size = batch_size
        self.seed = seed
        self.position = position
        self.rows = _rows_of_rank(batch_size, rank, world_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, np.int64)
        start = self.position()
        while True:
            batch = []
            for sample in range(start + self.rows.start, start + self.rows.stop):
                if sample // self.num_windows != epoch:
                    epoch = sample // self.num_windows
                    order = epoch_order(self.num_windows, self.seed, epoch)
                batch.append(int(order[sample % self.num_windows]))
            yield batch
            start += self.batch_size


class SequentialSampler(Sampler[list[int]]):
    """Every window once, in order, for one rank. All ranks get the same number of batches.

    A rank whose part of the last batch is empty gets a window of padding, so that no rank waits for another.
    """

    def __init__(self, num_windows: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        """Arguments as for ``TrainSampler``."""
        self.num_windows = num_windows
        self.batch_size = batch_size
        self.rows = _rows_of_rank(batch_size, rank, world_size)

    def __len__(self) -> int:
        return -(-self.num_windows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.num_windows, self.batch_size):
            stop = min(start + self.rows.stop, self.num_windows)
            yield list(range(start + self.rows.start, stop)) or [PADDING_WINDOW]


def _rows_of_rank(batch_size: int, rank: int, world_size: int) -> range:
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size = {batch_size}: give a positive multiple of the {world_size} data-parallel ranks")
    share = batch_size // world_size
    return range(rank * share, (rank + 1) * share)
