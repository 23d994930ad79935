"""Every layout trains as one process does: loss, norm, and every parameter, gradient, moment and buffer."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from conftest import Pools
from training import LAYOUTS, PLAIN, Layout, Result, Run, train_alone, train_parallel

from zoo.parallel.apply import ParallelOptions

alone = cache(train_alone)


def assert_equal(results: list[Result], expected: Result, tolerance: float = 1e-10) -> None:
    for result in results:
        assert result.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(result[name], values, rtol=tolerance, atol=tolerance, err_msg=name)


def check(pools: Pools, run: Run, layout: Layout, options: ParallelOptions = PLAIN) -> None:
    assert_equal(pools[layout.world].run(train_parallel, run, layout, options), alone(run, layout.data))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["mixtral", "deepseek-v3", "qwen2"])
def test_layout_equals_one_process(pools: Pools, model: str, layout: str) -> None:
    check(pools, Run(model), LAYOUTS[layout])
