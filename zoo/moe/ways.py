"""Which way experts are computed: a table of what was measured the fastest, and how to ask for another.

``zoo bench experts`` times every way beside the one that the table takes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

Way = Literal["loop", "split", "grouped", "blocked", "few", "single"]
"""The first three take rows sorted by expert, the others tokens with their routing: ``few`` at most as many as there
are experts, ``single`` one."""

VARIABLE = "MOE_ZOO_EXPERTS"
"""Environment variable with the name of a way, for a whole command."""


@dataclass(frozen=True)
class Rule:
    """Where a way is the fastest that was measured. What is None does not matter."""

    way: Way
    device: str | None = None
    dtypes: frozenset[torch.dtype] | None = None
    """Of the products: autocast's, where that is on."""
    fine: bool = False
    """Only for matrices of less than ``LARGE`` numbers, whose products are small."""


LARGE = 500_000

_BF16 = frozenset((torch.bfloat16,))

TABLE = (
    Rule("single", device="cpu"),
    Rule("few", device="cpu"),
    Rule("blocked", device="cpu"),
    Rule("grouped", device="cpu", dtypes=_BF16, fine=True),
    Rule("grouped", device="cuda", dtypes=_BF16),
    Rule("split"),
)
"""The first that fits, of those that can compute what is asked for."""

_asked_for: list[str] = [os.environ[VARIABLE]] if os.environ.get(VARIABLE) else []
"""And by ``computed_as``, the innermost last."""


Able = Callable[[], bool]


def choose(x: Tensor, weight: Tensor, able: Mapping[Way, Able]) -> Way:
    """The way to compute tokens or sorted rows x [rows, D] by experts one of whose matrices are ``weight`` [E, o, i].

    Args:
        able: way → whether it can compute these, asked in the table's order; ways that are missing cannot.

    Raises:
        ValueError: another way was asked for, and is none or cannot compute these.
    """
    if _asked_for:
        return _asked(_asked_for[-1], x, able)
    device = x.device.type
    for rule in TABLE:
        fits = (
            rule.way in able
            and rule.device in (None, device)
            and (rule.dtypes is None or product_dtype(x) in rule.dtypes)
            and (not rule.fine or weight.shape[1] * weight.shape[2] < LARGE)
        )
        if fits and able[rule.way]():
            return rule.way
    raise AssertionError("every kind of experts can be computed by the last rule's way")


def _asked(asked: str, x: Tensor, able: Mapping[Way, Able]) -> Way:
    ways = [way for way in able if able[way]()]
    for way in ways:
        if way == asked:
            return way
    names = ", ".join(ways)
    if asked not in get_args(Way):
        raise ValueError(
            f"experts computed as {asked!r} ({VARIABLE}): no such way; give one of {names}, or none at all"
        )
    raise ValueError(
        f"experts computed as {asked!r} ({VARIABLE}): it cannot compute {len(x)} rows of {product_dtype(x)} on "
        f"{x.device} here; give one of {names}, or none at all"
    )


@contextmanager
def computed_as(way: Way) -> Iterator[None]:
    """Compute experts in this way within the block, also where it is not the fastest."""
    _asked_for.append(way)
    try:
        yield
    finally:
        _asked_for.pop()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products of x have: autocast's, where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def ways_of_rows(rows: Tensor, down: Tensor) -> dict[Way, Able]:
    """Which ways can compute sorted rows [N, D] of experts with ``down`` [E, D, F], whatever is between."""
    return {"loop": _always, "split": _always, "grouped": partial(grouped_applies, rows, down)}


def _always() -> bool:
    return True


def grouped_applies(rows: Tensor, down: Tensor) -> bool:
    """Whether torch's grouped product takes these: memory of whole 16 bytes, and no fp64; on CUDA bf16 only."""
    dtype = product_dtype(rows)
    whole = all(size * dtype.itemsize % 16 == 0 for size in down.shape[1:])
    return whole and (dtype == torch.bfloat16 or (dtype == torch.float32 and not rows.is_cuda))
