"""Shortest paths: a graph is given in the prompt, and a path between two of its vertices is to be found.

After "Mixture of Parrots" (arXiv 2410.19034, section 4), whose test of reasoning it is. Graphs are drawn uniformly
among those with a given number of vertices and edges (Erdős and Rényi's G(n, M)). No graph is seen twice, so there is
nothing to memorise: the score counts what is worked out from the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from zoo.harness.suites import dataset
from zoo.harness.suites.dataset import GeneratedData, Origin

DATASET = "moe-zoo/shortest_path"
TASK = "shortest_path"
ORIGIN = Origin("Random graphs", "cc0-1.0")
VERTEX_NAMES = ascii_uppercase
"""Names of one letter: two of them written together name an edge, and nothing else."""
_MAX_DRAWS = 10_000
"""Graphs tried for one question: at the default sizes every second or third one serves."""

_MAX_REPEATS = 1_000
"""Questions in a row that there are already, after which there are no others."""

Item = dict[str, Any]
"""``edges`` (pairs of names in random order), ``source``, ``target``, ``distance``, ``path`` (one of the shortest)."""
_Graph = dict[int, set[int]]


@dataclass(frozen=True, kw_only=True)
class ShortestPathConfig:
    """Sizes of the graphs, and how many there are."""

    seed: int = 0
    graphs: int = 50_000
    """Graphs in the training text, each with one question and its answer."""
    questions: int = 1_000
    """Graphs of the evaluation. None of them is in the training text."""
    vertices: int = 12
    edges: int = 16
    distances: tuple[int, ...] = (2, 3, 4)
    """Edges on the shortest path; graphs are divided evenly among them."""

    def __post_init__(self) -> None:
        for name in ("graphs", "questions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give a positive number")
        if not self.distances or min(self.distances) < 1:
            raise ValueError(f"distances = {list(self.distances)}: give positive numbers")
        if not 2 <= self.vertices <= len(VERTEX_NAMES):
            raise ValueError(f"vertices = {self.vertices}: give 2 to {len(VERTEX_NAMES)}, a letter names each")
        pairs = self.vertices * (self.vertices - 1) // 2
        if not max(self.distances) <= self.edges <= pairs:
            raise ValueError(
                f"edges = {self.edges}: give {max(self.distances)} to {pairs} for {self.vertices} vertices"
            )


def make(config: ShortestPathConfig) -> GeneratedData:
    """The graphs that ``config`` describes; equal configs give equal graphs."""
    seen: set[str] = set()
    items = _series(config, "validation", config.questions, seen)
    training = _series(config, "train", config.graphs, seen)
    return GeneratedData(
        training=[as_text(item) for item in training],
        validation=[as_text(item) for item in items],
        tables={"default": [{"idx": i, **item} for i, item in enumerate(items)]},
        guesses={TASK: sum(map(walk_probability, items)) / len(items)},
    )


def write(config: ShortestPathConfig, directory: Path) -> None:
    """Write the graphs into ``directory``; see ``zoo.harness.suites.dataset``."""
    dataset.write(directory, DATASET, asdict(config), lambda: make(config), ORIGIN)


def as_text(item: Item) -> str:
    """A graph with its answer as a training document, in the prompt of the lm-eval task."""
    edges = " ".join(a + b for a, b in item["edges"])
    return f"Edges: {edges}\nFrom {item['source']} to {item['target']}\nPath: {' '.join(item['path'])}"


def walk_probability(item: Item) -> float:
    """Probability that a walk along random edges from the source is a shortest path to the target.

    That is the score of a guesser who reads edges and knows how many to take, but does not search.
    """
    neighbours: dict[str, set[str]] = {}
    for a, b in item["edges"]:
        neighbours.setdefault(a, set()).add(b)
        neighbours.setdefault(b, set()).add(a)
    # All walks of `distance` edges from source to target are shortest paths.
    at = {item["source"]: 1.0}
    for _ in range(item["distance"]):
        after: dict[str, float] = {}
        for vertex, probability in at.items():
            for neighbour in neighbours[vertex]:
                after[neighbour] = after.get(neighbour, 0.0) + probability / len(neighbours[vertex])
        at = after
    return at[item["target"]]


def _series(config: ShortestPathConfig, split: str, number: int, seen: set[str]) -> list[Item]:
    """``number`` items that are not in ``seen``, which grows by them."""
    draw = random.Random(f"{config.seed}/shortest_path/{split}")
    items: list[Item] = []
    repeats = 0
    while len(items) < number:
        item = _item(draw, config, config.distances[len(items) % len(config.distances)])
        key = " ".join(sorted("".join(sorted(edge)) for edge in item["edges"])) + item["source"] + item["target"]
        if key not in seen:
            seen.add(key)
            items.append(item)
            repeats = 0
        elif (repeats := repeats + 1) == _MAX_REPEATS:
            raise ValueError(
                f"graphs = {config.graphs:,} and questions = {config.questions:,}: there are hardly more than "
                f"{len(seen):,} of them with {config.vertices} vertices, {config.edges} edges and distances "
                f"{list(config.distances)}; ask for fewer, or for more vertices"
            )
    return items


def _item(draw: random.Random, config: ShortestPathConfig, distance: int) -> Item:
    """Draw graphs until a random vertex has others at ``distance``, and choose one of them."""
    pairs = list(combinations(range(config.vertices), 2))
    for _ in range(_MAX_DRAWS):
        edges = [draw.sample(pair, 2) for pair in draw.sample(pairs, config.edges)]
        graph: _Graph = {vertex: set() for vertex in range(config.vertices)}
        for a, b in edges:
            graph[a].add(b)
            graph[b].add(a)
        layers = _layers(graph, draw.randrange(config.vertices))
        if distance < len(layers):
            path = _path(draw, graph, layers[: distance + 1])
            return {
                "edges": [[VERTEX_NAMES[a], VERTEX_NAMES[b]] for a, b in edges],
                "source": VERTEX_NAMES[path[0]],
                "target": VERTEX_NAMES[path[-1]],
                "distance": distance,
                "path": [VERTEX_NAMES[vertex] for vertex in path],
            }
    raise ValueError(
        f"distances: none of {_MAX_DRAWS:,} graphs with {config.vertices} vertices and {config.edges} edges has a path "
        f"of {distance}; change edges or remove the distance"
    )


def _layers(graph: _Graph, source: int) -> list[list[int]]:
    """Vertices by their distance from ``source``."""
    layers, reached = [[source]], {source}
    while True:
        layer = sorted({n for vertex in layers[-1] for n in graph[vertex]} - reached)
        if not layer:
            return layers
        layers.append(layer)
        reached.update(layer)


def _path(draw: random.Random, graph: _Graph, layers: Sequence[Sequence[int]]) -> list[int]:
    """A random vertex of the last layer, and a shortest path to it."""
    path = [draw.choice(layers[-1])]
    for layer in reversed(layers[:-1]):
        path.append(draw.choice([vertex for vertex in layer if vertex in graph[path[-1]]]))
    return path[::-1]
