"""Fixtures that every test may use. Threads and network are fixed here, once, before anything imports torch."""

from __future__ import annotations

import os
from pathlib import Path

# One thread a process: tests run side by side, and results on CPU must not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach a hub: what a test needs is in the repository, made by the test, or in `shared_data`.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets, tokenizers and small trained weights that stand beside the checkout."""
    directory = REPOSITORY.parent / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"real data is not at {directory}")
    return directory


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same state of torch's generator, whatever ran before it."""
    torch.manual_seed(0)
