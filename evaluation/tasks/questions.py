"""The questions that this project makes, for lm-eval's ``custom_dataset``. Runs wherever lm-eval does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset

SHIPPED = Path(__file__).resolve().parents[1] / "data"
"""The questions that the default configs of ``zoo.harness.facts`` and ``zoo.harness.suites`` make."""


def load(*, dataset: str, data_root: str = ".", **_: Any) -> dict[str, Dataset]:
    """Splits of ``dataset``: those under ``data_root`` where they are, else those that come with the tasks.

    Args:
        dataset: owner/name/configuration.
        data_root: folder in the hub's layout. ``--data-root`` of ``zoo eval`` and ``--metadata '{"data_root": …}'`` of
            lm-eval set it; by default the working directory, where lm-eval looks for its own local data sets, too.
        _: the other metadata of the task and of the command line.

    Raises:
        ValueError: ``dataset`` is in neither place.
    """
    for root in (Path(data_root), SHIPPED):
        files = sorted((root / dataset).glob("*-?????-of-?????.parquet"))
        if files:
            splits = sorted({file.name.split("-")[0] for file in files})
            return {
                split: Dataset(pq.read_table([file for file in files if file.name.split("-")[0] == split]))
                for split in splits
            }
    raise ValueError(f"data set {dataset!r} is neither in {data_root!r} nor in {str(SHIPPED)!r}")
