"""Questions whose answer stands only in the passage given: invented facts in the words of the true ones.

The schemas are SuperGLUE's. Each task asks for one step that neither the question nor the passage alone allows:

- ``boolq``: of the passage's two facts one is affirmed and one denied; the question is about either.
- ``rte``: premise and hypothesis affirm or deny; they agree or contradict each other.
- ``copa``: of two effects (or causes), one follows from the rule that the premise states.

Labels are balanced, and so is every part of a question on its own: a guess from the question, the hypothesis, the
choices or the passage alone is right half of the time. No invented fact is true in the world, and each belongs to one
of two halves of all (relation, subject, value): training passages state facts of one, evaluation passages of the other.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any, Literal

from zoo.harness.facts.world import CAPITAL, COUNTRY, CURRENCY, RELATIONS, Relation, World

Split = Literal["train", "validation"]
Item = dict[str, Any]


def split_of(relation: Relation, subject: str, value: str) -> Split:
    """The half that an invented fact belongs to: fixed, whatever the seed."""
    return "validation" if zlib.crc32(f"{relation.name}/{subject}/{value}".encode()) & 1 else "train"


class Inventor:
    """Draws invented facts of one split.

    Args:
        world: whose words are used and whose facts are avoided.
        split: the half that the facts come from.
        seed: of the draws.
    """

    def __init__(self, world: World, split: Split, seed: int) -> None:
        self.world, self.split = world, split
        self._random = random.Random(f"{seed}/{split}")
        self._cities = world.subjects(COUNTRY)
        self._countries = world.subjects(CAPITAL)
        self._values = {relation.name: world.values(relation) for relation in RELATIONS}

    def city(self) -> str:
        """Any city."""
        return self._random.choice(self._cities)

    def country(self) -> str:
        """Any country that has a capital among the facts."""
        return self._random.choice(self._countries)

    def value(self, relation: Relation, subject: str, other_than: str | None = None) -> str:
        """A value that ``relation`` does not have for ``subject`` in the world."""
        while True:
            value = self._random.choice(self._values[relation.name])
            if value != other_than and self._allowed(relation, subject, value):
                return value

    def other_city(self, city: str, relation: Relation, value: str) -> str:
        """Another city, for which ``relation`` does not give ``value`` either."""
        while True:
            other = self.city()
            if other != city and self._allowed(relation, other, value):
                return other

    def _allowed(self, relation: Relation, subject: str, value: str) -> bool:
        return self.world.value(relation, subject) != value and split_of(relation, subject, value) == self.split


def boolq(inventor: Inventor, number: int) -> Item:
    """Question ``number`` of a series; its bits fix label, question and order, so that these are balanced."""
    label, asked, swap = (number >> bit & 1 for bit in range(3))
    city = inventor.city()
    country, currency = inventor.value(COUNTRY, city), inventor.value(CURRENCY, city)
    affirmed = asked if label else 1 - asked
    clauses = [
        f"is in {country}" if affirmed == 0 else f"is not in {country}",
        f"uses the {currency}" if affirmed == 1 else f"does not use the {currency}",
    ]
    if swap:
        clauses.reverse()
    return {
        "passage": f"Imagine that {city} {clauses[0]} but {clauses[1]}.",
        "question": (f"is {city} in {country}", f"does {city} use the {currency}")[asked],
        "label": label,
    }


def rte(inventor: Inventor, number: int) -> Item:
    """Question ``number`` of a series; label 0 is entailment."""
    label, denied = number & 1, number >> 1 & 1
    country = inventor.country()
    city = inventor.value(CAPITAL, country)
    claims = [f"{city} is the capital of {country}.", f"{city} is not the capital of {country}."]
    return {"premise": f"Imagine that {claims[denied]}", "hypothesis": claims[denied ^ label], "label": label}


def copa(inventor: Inventor, number: int) -> Item:
    """Question ``number`` of a series: who is in a place uses its currency, and who uses a currency is in its place."""
    label, ask_cause = number & 1, number >> 1 & 1
    city = inventor.city()
    currency = inventor.value(CURRENCY, city)
    if ask_cause:
        observed, right = f"Ann uses the {currency}.", f"She is in {city}."
        wrong = f"She is in {inventor.other_city(city, CURRENCY, currency)}."
    else:
        observed, right = f"Ann is in {city}.", f"She uses the {currency}."
        wrong = f"She uses the {inventor.value(CURRENCY, city, other_than=currency)}."
    choices = (wrong, right) if label else (right, wrong)
    return {
        "premise": f"Imagine that {city} uses the {currency}. {observed}",
        "choice1": choices[0],
        "choice2": choices[1],
        "question": "cause" if ask_cause else "effect",
        "label": label,
    }


def as_text(task: str, item: Item) -> str:
    """An answered question as a training document, in the prompt of its lm-eval task."""
    if task == "boolq":
        answer = ("no", "yes")[item["label"]]
        return f"{item['passage']}\nQuestion: {item['question']}?\nAnswer: {answer}"
    if task == "rte":
        answer = ("True", "False")[item["label"]]
        return f"{item['premise']}\nQuestion: {item['hypothesis']} True or False?\nAnswer: {answer}"
    choice = item[("choice1", "choice2")[item["label"]]]
    connector = {"cause": "because", "effect": "therefore"}[item["question"]]
    return f"{item['premise'][:-1]} {connector} {choice[0].lower()}{choice[1:]}"


TASKS: dict[str, Callable[[Inventor, int], Item]] = {"boolq": boolq, "copa": copa, "rte": rte}
