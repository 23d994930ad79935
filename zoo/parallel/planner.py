"""Layouts for a model and a number of GPUs: which of them fit, fastest first, and why the others do not.

Nothing is run, and no GPU or process group is needed. Considered are the plans that come with the zoo in all sizes of
their meshes, and within each the size of micro-batches, what is recomputed, and whether gathered parameters are freed.
Stages of a pipeline (``zoo.parallel.pipeline``) are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from zoo.parallel.apply import check_sizes
from zoo.parallel.estimate import Estimate, Layout, Setting, Workload, estimate
from zoo.parallel.footprint import Recompute, Units, holdings, resolve_units
from zoo.parallel.memory import USABLE_MEMORY, peak_memory
from zoo.parallel.mesh import MeshSizes
from zoo.parallel.plan import Plan, ResolvedPlan, load_plan, plan_names

RECOMPUTE: tuple[Recompute, ...] = ("none", "experts", "block")
Sizes = dict[str, int]
"""Arguments of ``Plan.sizes``: replicate, tensor, expert."""


@dataclass(frozen=True)
class Rejected:
    """A layout that cannot be used."""

    plan: str
    sizes: Sizes
    kind: Literal["plan", "sizes", "batch", "memory"]
    reason: str
    needed: float | None = None
    """Bytes of its most frugal setting, where memory is the reason."""


@dataclass(frozen=True)
class Result:
    """All layouts that were considered."""

    fitting: list[Estimate] = field(default_factory=list)
    """Fastest first."""
    rejected: list[Rejected] = field(default_factory=list)


def search(
    work: Workload,
    only: tuple[str, Sizes] | None = None,
    track: Callable[[list[Sizes], str], Iterable[Sizes]] = lambda sizes, plan: sizes,
) -> Result:
    """Consider every layout of ``work.gpus`` ranks.

    Args:
        work: What is trained, on what.
        only: One plan (a name or a YAML file) with given sizes, instead of all plans that come with the zoo.
        track: Called with the sizes and the name of each plan; what it hands on may show progress.

    Raises:
        ValueError: ``only`` names no plan.
    """
    result = Result()
    for name in plan_names() if only is None else [only[0]]:
        plan = load_plan(name)
        try:
            units, rules = resolve_units(work.config, plan, work.precision)
        except ValueError as error:
            result.rejected.append(Rejected(name, {}, "plan", str(error)))
            continue
        for sizes in track(list(_candidates(plan, rules, work.gpus)) if only is None else [only[1]], name):
            outcome = _consider(work, name, plan, sizes, units, rules)
            if isinstance(outcome, Estimate):
                result.fitting.append(outcome)
            else:
                result.rejected.append(outcome)
    result.fitting.sort(key=lambda one: (one.step_seconds, one.total_memory))
    return result


def divisors(number: int) -> list[int]:
    """All divisors, smallest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _candidates(plan: Plan, rules: ResolvedPlan, world: int) -> Iterator[Sizes]:
    """Sizes to try. What another plan does with fewer rules is left to it: one tensor rank, or nothing but copies."""
    tensors = divisors(world)[1:] if plan.tensor else [1]
    for tensor in tensors:
        data = world // tensor
        copies = divisors(data) if plan.data == "shard" else [data]
        if plan.data == "shard" and not plan.tensor and data > 1:
            copies = copies[:-1]
        experts = divisors(world) if rules.experts else [1]
        if plan.data == "replicate" and rules.experts:
            experts = experts[1:]
        for replicate in copies:
            for expert in experts:
                yield {"replicate": replicate, "tensor": tensor, "expert": expert}


def _consider(
    work: Workload, name: str, plan: Plan, wanted: Sizes, units: Units, rules: ResolvedPlan
) -> Estimate | Rejected:
    """The fastest setting of one layout that fits, or why there is none."""
    try:
        sizes = plan.sizes(work.gpus, **wanted)
        check_sizes(work.config, sizes, rules)
    except ValueError as error:
        return Rejected(name, wanted, "sizes", str(error))
    if work.global_batch % sizes.data:
        reason = f"{work.global_batch} sequences a step are not divisible by {sizes.data} data ranks"
        return Rejected(name, wanted, "batch", reason)
    held = holdings(work.config, units, sizes, work.precision)
    settings = {setting: peak_memory(work, sizes, held, setting) for setting in _settings(work, sizes)}
    limit = USABLE_MEMORY * work.gpu.memory
    fitting = [
        estimate(work, Layout(name, sizes), units, held, setting, memory)
        for setting, memory in settings.items()
        if sum(memory.values()) <= limit
    ]
    if fitting:
        return min(fitting, key=lambda one: (one.step_seconds, one.total_memory))
    least = min(settings.values(), key=lambda memory: sum(memory.values()))
    needed, largest = sum(least.values()), max(least, key=lambda part: least[part])
    reason = (
        f"needs {needed / 1e9:,.1f} GB at least, {least[largest] / 1e9:,.1f} GB of it for {largest}; "
        f"{limit / 1e9:,.1f} GB are usable"
    )
    return Rejected(name, wanted, "memory", reason, needed)


def _settings(work: Workload, sizes: MeshSizes) -> Iterator[Setting]:
    local = work.global_batch // sizes.data
    for micro_batch in divisors(local):
        for recompute in RECOMPUTE if work.config.moe else ("none", "block"):
            for reshard in (True, False) if sizes.world > 1 else (True,):
                for reduce_each in (False, True) if micro_batch < local else (False,):
                    yield Setting(micro_batch, local // micro_batch, recompute, reshard, reduce_each)
