"""One pool of worker processes a world size for all distributed tests of a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import Pools, WorkerPool


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """World size → its pool; processes start when first used."""
    made = {world: WorkerPool(world) for world in (1, 2, 4)}
    yield made
    for pool in made.values():
        pool.close()
