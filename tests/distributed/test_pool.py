"""A rank that fails or dies fails the test and not the tests after it."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist
from pool import Pools


def fail_alone(how: str) -> int:
    if how and dist.get_rank() == 1:
        if how == "dies":
            os._exit(1)
        raise ValueError("what went wrong")
    dist.barrier()
    return dist.get_rank()


@pytest.mark.parametrize(("how", "message"), [("raises", "what went wrong"), ("dies", "the process died")])
def test_a_failing_rank_is_reported_and_replaced(pools: Pools, how: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        pools[2].run(fail_alone, how)
    assert pools[2].run(fail_alone, "") == [0, 1]
