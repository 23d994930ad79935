"""The experts of every family are spread over ranks: an expert-parallel run is that of one process."""

from __future__ import annotations

import numpy as np
import pytest
from layouts import LAYOUTS, Run, train_alone, train_parallel
from pool import Pools

from zoo.registry import find_spec, model_names


def smallest(family: str) -> str:
    names = [name for name in model_names() if find_spec(name).family == family]
    return min(names, key=lambda name: (find_spec(name).model.hidden_size, name))


SPARSE = sorted({str(find_spec(name).family) for name in model_names() if find_spec(name).model.moe})


@pytest.mark.slow
@pytest.mark.parametrize("family", SPARSE)
def test_experts_of_every_family_are_spread(pools: Pools, family: str) -> None:
    """Loss, norm, expert load, and every parameter, gradient and moment after two steps in double precision."""
    run, layout = Run(smallest(family), steps=2), LAYOUTS["ep2"]
    expected = train_alone(run, layout.data)
    for result in pools[layout.world].run(train_parallel, run, layout):
        assert result.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(result[name], values, rtol=1e-10, atol=1e-10, err_msg=name)
