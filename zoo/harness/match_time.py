"""The dense twin whose training step takes as long as a sparse model's on this machine, found by timing both."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from scipy.stats import binom
from torch import Tensor

from zoo.config import ModelConfig, ModelSpec
from zoo.harness.match import MULTIPLE, TOLERANCE, dense_config, derived, measure, with_ffn_width
from zoo.model import build

MIN_ROUNDS, MAX_ROUNDS = 9, 1001
MAX_SECONDS = 60.0
"""Of timing one width, once there are ``MIN_ROUNDS``."""
MAX_WIDTHS = 8
"""Widths tried; the time is nearly linear in the width, so that three are usual."""
LEVEL = 0.95


@dataclass(frozen=True)
class Timing:
    """Two models' steps, timed in turn."""

    sparse_seconds: float
    """Median of a step."""
    dense_seconds: float
    """Median of a step."""
    ratio: float
    """Median over the rounds of dense / sparse in the same round."""
    low: float
    """Lower bound of its 95% interval."""
    high: float
    """Upper bound of its 95% interval."""
    rounds: int

    @property
    def uncertainty(self) -> float:
        """How far the interval reaches from the ratio."""
        return max(self.ratio - self.low, self.high - self.ratio)

    @property
    def decided(self) -> bool:
        """Whether more rounds would not change what follows: an equal time known well, or one certainly unequal."""
        return self.uncertainty <= TOLERANCE / 2 or self.low > 1 + TOLERANCE or self.high < 1 - TOLERANCE


@dataclass(frozen=True)
class TimedMatch(Timing):
    """A twin and how it was timed in the end."""

    spec: ModelSpec

    def as_dict(self) -> dict[str, Any]:
        """The timing as plain data."""
        return {key: value for key, value in asdict(self).items() if key != "spec"}


Timer = Callable[[ModelConfig, ModelConfig], Timing]
"""(sparse, dense) → their timing."""


def match_time(
    spec: ModelSpec,
    sequence_length: int,
    batch_size: int,
    *,
    device: str = "cpu",
    progress: bool = False,
    timer: Timer | None = None,
) -> TimedMatch:
    """Dense twin of ``spec`` whose training step takes as long, within ``TOLERANCE``.

    A step is forward, backward and AdamW on random tokens. The twin holds for this machine, its number of threads and
    these sizes, and for no other.

    Args:
        spec: a sparse model.
        sequence_length: tokens of a sequence.
        batch_size: sequences of a step.
        device: where the steps run.
        progress: say on standard error what is timed.
        timer: what times two models; by default ``time_steps``.

    Raises:
        ValueError: ``spec`` is dense, no width is equal within the tolerance, or times vary too much to tell.
    """
    timer = timer or (lambda a, b: time_steps(a, b, sequence_length, batch_size, device))
    try:
        width = dense_config(spec.model, "flops", sequence_length).intermediate_size
    except ValueError as error:
        raise ValueError(f"{spec.name}: {error}") from None
    console, tried = Console(stderr=True, quiet=not progress), dict[int, Timing]()
    while width not in tried and len(tried) < MAX_WIDTHS:
        dense = with_ffn_width(spec.model, width)
        with console.status(f"timing {spec.name} against an FFN of width {width:,}"):
            timing = tried[width] = timer(spec.model, dense)
        console.print(f"width {width:,}: dense / sparse = {timing.ratio:.3f} ({timing.low:.3f} to {timing.high:.3f})")
        if abs(timing.ratio - 1) <= TOLERANCE:
            if timing.uncertainty > TOLERANCE:
                raise ValueError(
                    f"{spec.name}: after {timing.rounds} rounds the ratio of step times may be {timing.low:.3f} to "
                    f"{timing.high:.3f}, which does not tell {TOLERANCE:.0%}; end other programs, or time larger steps "
                    "with a larger batch size or sequence length"
                )
            reference = f"dense twin of {spec.name}, equal in time of a step at {batch_size} x {sequence_length} tokens"
            return TimedMatch(**asdict(timing), spec=derived(spec, "dense-time", dense, reference))
        width = _next_width(spec.model, {w: t.ratio for w, t in tried.items()}, sequence_length)
    best = min(tried, key=lambda w: abs(tried[w].ratio - 1))
    raise ValueError(
        f"{spec.name}: no dense FFN width takes as long within {TOLERANCE:.0%}; the nearest of {len(tried)} tried, "
        f"intermediate_size = {best}, takes {tried[best].ratio:.3f} times as long"
    )


def _next_width(sparse: ModelConfig, ratios: dict[int, float], sequence_length: int) -> int:
    """Where a line through two widths meets 1: those around it where there are any, else the two nearest to it.

    After one width, or where noise makes a wider FFN faster, a time proportional to FLOPs is assumed.
    """
    near, *others = sorted(ratios, key=lambda w: abs(ratios[w] - 1))
    across = [w for w in others if (ratios[w] < 1) != (ratios[near] < 1)]
    other = (across or others or [near])[0]
    slope = (ratios[other] - ratios[near]) / (other - near) if other != near else 0.0
    if slope <= 0:
        one, two = (measure(with_ffn_width(sparse, w), "flops", sequence_length) for w in (near, near + 1))
        slope = ratios[near] * (two - one) / one
    exact = min(max(near + (1 - ratios[near]) / slope, near / 4), near * 4)
    aligned = max(MULTIPLE, round(exact / MULTIPLE) * MULTIPLE)
    return aligned if aligned not in ratios else max(1, round(exact))


def time_steps(
    sparse: ModelConfig, dense: ModelConfig, sequence_length: int, batch_size: int, device: str = "cpu"
) -> Timing:
    """Time the training steps of two models in turn, until the ratio is decided or ``MAX_SECONDS`` are over."""
    steps = [training_step(config, sequence_length, batch_size, device) for config in (sparse, dense)]
    times: tuple[list[float], list[float]] = ([], [])
    for step in steps:  # allocators and kernels warm up
        step()
    began = time.monotonic()
    for number in itertools.count(1):
        # One goes first in even rounds, the other in odd ones.
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            steps[which]()
            times[which].append(time.perf_counter() - start)
        if number < MIN_ROUNDS:
            continue
        timing = summarise(*times)
        if timing.decided or number >= MAX_ROUNDS or time.monotonic() - began > MAX_SECONDS:
            break
    return timing


def summarise(sparse: Sequence[float], dense: Sequence[float]) -> Timing:
    """Medians, and the interval of the median ratio from the order of the rounds alone (Conover, 1999, section 3.2)."""
    ratios = sorted(d / s for s, d in zip(sparse, dense, strict=True))
    rounds = len(ratios)
    # Order statistics outside of which the median lies with less than 1 - LEVEL.
    outside = int(binom.ppf((1 - LEVEL) / 2, rounds, 0.5))
    return Timing(
        statistics.median(sparse),
        statistics.median(dense),
        statistics.median(ratios),
        ratios[max(outside - 1, 0)],
        ratios[min(rounds - outside, rounds - 1)],
        rounds,
    )


def training_step(config: ModelConfig, sequence_length: int, batch_size: int, device: str) -> Callable[[], None]:
    """One step of a freshly initialised model on random tokens, ready to be called."""
    model = build(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch_size, sequence_length + 1), generator=generator).to(device)

    def step() -> None:
        loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(loss)

    return step


def _wait(value: Tensor) -> None:
    """Until the device has computed ``value``."""
    if value.is_cuda:
        torch.cuda.synchronize()
