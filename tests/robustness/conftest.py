"""Fixtures of the tests of bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_files import published, small


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return published(small("mixtral-tiny"), tmp_path / "mixtral")
