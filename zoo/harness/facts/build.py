"""The embedded data set: training text, and an evaluation mirror in the hub's layout.

``train.jsonl`` holds one short document a line, in an order fixed by the seed:

- statements: every fact of the world, in each of its relation's wordings;
- closed-book questions with their answers, for a part of the facts;
- passages with a question and its answer (``passages.py``).

``hub/moe-zoo/facts/<config>`` holds the evaluation: ``knowledge`` asks for the other facts, which the training text
only states, and ``boolq``, ``copa`` and ``rte`` hold passages that no training document shares a fact with.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zoo.harness.facts.passages import TASKS, Inventor, as_text
from zoo.harness.facts.world import ATTRIBUTION, Fact, World, load_world
from zoo.harness.suites import dataset
from zoo.harness.suites.dataset import GeneratedData, Origin

DATASET = "moe-zoo/facts"
ORIGIN = Origin(ATTRIBUTION, "cc-by-4.0")


@dataclass(frozen=True, kw_only=True)
class FactsConfig:
    """Sizes of the embedded data set."""

    seed: int = 0
    cities: int = 600
    cities_per_country: int = 20
    statements_per_fact: int = 40
    """How often each fact is stated, over all wordings."""
    asked_fraction: float = 0.75
    """Share of the facts whose question is asked and answered in the training text; the others are for evaluation."""
    questions_per_fact: int = 40
    """How often each of those questions is asked."""
    passages: int = 12_000
    """Training passages of each comprehension task."""
    items: int = 500
    """Evaluation items of each comprehension task."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("seed", "asked_fraction") and value < 1:
                raise ValueError(f"{name} = {value}: give a positive number")
        if not 0 < self.asked_fraction < 1:
            raise ValueError(f"asked_fraction = {self.asked_fraction}: give a number between 0 and 1")


def make(config: FactsConfig) -> GeneratedData:
    """The data set that ``config`` describes; equal configs give equal data."""
    world = load_world(config.cities, config.cities_per_country)
    asked, held_out = _divide(world, config)
    inventor = Inventor(world, "train", config.seed)
    training = [
        *_statements(world.facts, config.statements_per_fact),
        *(_answered(fact) for fact in asked for _ in range(config.questions_per_fact)),
        *(as_text(task, draw(inventor, i)) for task, draw in TASKS.items() for i in range(config.passages)),
    ]
    random.Random(config.seed).shuffle(training)
    inventor = Inventor(world, "validation", config.seed)
    items = {task: [draw(inventor, i) | {"idx": i} for i in range(config.items)] for task, draw in TASKS.items()}
    validation = [
        *(as_text(task, item) for task, rows in items.items() for item in rows),
        *(_answered(fact) for fact in held_out),
    ]
    random.Random(config.seed).shuffle(validation)
    guessed = sum(fact.value == world.most_frequent(fact.relation) for fact in held_out) / len(held_out)
    return GeneratedData(
        training=training,
        validation=validation,
        tables={"knowledge": [_trivia(fact, i) for i, fact in enumerate(held_out)], **items},
        guesses={"knowledge": guessed, **dict.fromkeys(TASKS, 0.5)},
    )


def write(config: FactsConfig, directory: Path) -> None:
    """Write the data set into ``directory``; see ``zoo.harness.suites.dataset``."""
    dataset.write(directory, DATASET, asdict(config), lambda: make(config), ORIGIN)


def guess_rates(directory: Path) -> dict[str, float]:
    """Score that guessing reaches, by lm-eval task, for a data set on disk."""
    return {f"facts_{name}": rate for name, rate in dataset.guess_rates(directory, DATASET).items()}


def _divide(world: World, config: FactsConfig) -> tuple[list[Fact], list[Fact]]:
    """Facts whose questions are in the training text, and facts whose questions are kept for evaluation."""
    facts = list(world.facts)
    random.Random(f"{config.seed}/divide").shuffle(facts)
    asked = max(1, min(len(facts) - 1, round(len(facts) * config.asked_fraction)))
    return facts[:asked], facts[asked:]


def _statements(facts: Iterable[Fact], repetitions: int) -> Iterable[str]:
    for fact in facts:
        for i in range(repetitions):
            yield fact.state(i % len(fact.relation.statements))


def _answered(fact: Fact) -> str:
    return f"Question: {fact.question}\nAnswer: {fact.value}"


def _trivia(fact: Fact, number: int) -> dict[str, Any]:
    """A row of TriviaQA's rc.nocontext."""
    empty: dict[str, list[str]] = {"filename": [], "title": []}
    return {
        "question": fact.question,
        "question_id": f"facts_{number}",
        "question_source": ATTRIBUTION,
        "entity_pages": empty | {"doc_source": [], "wiki_context": []},
        "search_results": empty | {"description": [], "rank": [], "url": [], "search_context": []},
        "answer": {
            "aliases": list(fact.aliases),
            "normalized_aliases": [alias.lower() for alias in fact.aliases],
            "matched_wiki_entity_name": "",
            "normalized_matched_wiki_entity_name": "",
            "normalized_value": fact.value.lower(),
            "type": fact.relation.name,
            "value": fact.value,
        },
    }
