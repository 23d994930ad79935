"""One pool of worker processes a world size for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import Pools, WorkerPool


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    """World size → its pool; processes start when first used.

    Not for the whole run: each group of a mesh keeps a gloo thread that wakes a hundred times a second. The hundreds of
    them that the layouts of all modules make took 0.9 of two cores from the tests that came after.
    """
    made = {world: WorkerPool(world) for world in (1, 2, 4)}
    yield made
    for pool in made.values():
        pool.close()
