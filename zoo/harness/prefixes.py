"""What to put into one forward, so that beginnings that inputs share are computed once and little of it is padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from zoo.prefix import FORWARD_COSTS, common_length, sharing_pays


@dataclass(frozen=True)
class Input:
    """Tokens of one row, of which the hidden states from position ``first`` on are wanted."""

    tokens: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Group:
    """Inputs that begin with the same ``shared`` tokens, none of whose hidden states are wanted."""

    inputs: Sequence[Input]
    shared: int


@dataclass
class _Node:
    """Neighbouring inputs of the sorted list, ``start`` to ``end``, that agree in their first ``depth`` tokens."""

    depth: int
    start: int
    end: int
    first: int
    tokens: int
    work: int = 0
    groups: list[tuple[int, int, int]] = field(default_factory=list)
    """(start, end, shared) of the best groups of these inputs; ``work`` is what they take together."""

    def adopt(self, other: _Node) -> None:
        self.end = other.end
        self.first = min(self.first, other.first)
        self.tokens += other.tokens
        self.work += other.work
        self.groups += other.groups

    def close(self) -> None:
        """Make one group of all where that pays."""
        shared = min(self.depth, self.first)
        together = self.tokens - (self.end - self.start - 1) * shared
        if sharing_pays(together, alone=self.work):
            self.work, self.groups = together, [(self.start, self.end, shared)]


def grouped(inputs: Iterable[Input]) -> list[Group]:
    """Distinct ``inputs`` in groups with a shared beginning; one that shares nothing is a group with ``shared`` 0.

    A walk over the tree of common prefixes, from its leaves up (the intervals of the longest-common-prefix array,
    Abouelhoda et al. 2004): each node either shares its prefix or leaves its children as they are, whichever takes
    less. The result does not depend on the order of ``inputs``.
    """
    ordered = sorted(inputs, key=lambda one: one.tokens)
    open_nodes: list[_Node] = []  # each holds the next
    for number in range(len(ordered) + 1):
        common = common_length(ordered[number - 1].tokens, ordered[number].tokens) if 0 < number < len(ordered) else 0
        while open_nodes and open_nodes[-1].depth > common:
            closed = open_nodes.pop()
            closed.close()
            if not open_nodes or open_nodes[-1].depth < common:
                open_nodes.append(_Node(common, closed.start, closed.start, closed.first, 0))
            open_nodes[-1].adopt(closed)
        if number < len(ordered):
            size = len(ordered[number].tokens)
            leaf = _Node(size + 1, number, number + 1, ordered[number].first, size, size, [(number, number + 1, 0)])
            open_nodes.append(leaf)
    return [Group(ordered[start:end], shared) for node in open_nodes for start, end, shared in node.groups]


def batches(groups: Sequence[Group], budget: int) -> Iterator[list[Group]]:
    """Groups whose shared beginnings, cut to the shortest of them, make one forward of at most ``budget`` tokens.

    Those that share nothing come together. A beginning that exceeds the budget goes alone.
    """
    sharing = sorted((group for group in groups if group.shared), key=lambda group: group.shared)
    alone = [group for group in groups if not group.shared]
    if alone:
        yield alone
    batch: list[Group] = []
    repeated = 0
    # The shortest first: what the others of the batch share beyond it is computed for each of their inputs.
    for group in sharing:
        extra = (group.shared - batch[0].shared) * len(group.inputs) if batch else 0
        if batch and ((len(batch) + 1) * batch[0].shared > budget or repeated + extra > FORWARD_COSTS):
            yield batch
            batch, repeated, extra = [], 0, 0
        batch.append(group)
        repeated += extra
    if batch:
        yield batch


def padded(inputs: Iterable[Input], budget: int, past: int = 0, slots: int | None = None) -> Iterator[list[Input]]:
    """Inputs of similar length for forwards of at most ``budget`` tokens each, padding counted, the longest first.

    Of all ways to cut the list sorted by length it is the one that takes least, where a forward costs as much as
    ``FORWARD_COSTS`` tokens more than it has.

    Args:
        past: tokens of each that are computed already.
        slots: most tokens of all rows with ``past``, whose keys and values are in memory; by default ``budget``.
    """
    slots = budget if slots is None else slots
    ordered = sorted(inputs, key=lambda one: (-len(one.tokens), one.tokens))
    sizes = np.array([len(one.tokens) - past for one in ordered])
    costs = np.zeros(len(ordered) + 1, dtype=np.int64)  # of the inputs before
    starts = [0]  # of the last forward of those before
    first = 0
    for end in range(1, len(ordered) + 1):
        while (rows := end - first) > 1 and (rows * sizes[first] > budget or rows * (past + sizes[first]) > slots):
            first += 1
        ways = costs[first:end] + np.arange(end - first, 0, -1) * sizes[first:end]
        best = int(ways.argmin())
        costs[end] = ways[best] + FORWARD_COSTS
        starts.append(first + best)
    forwards: list[list[Input]] = []
    end = len(ordered)
    while end:
        forwards.append(ordered[starts[end] : end])
        end = starts[end]
    return reversed(forwards)
