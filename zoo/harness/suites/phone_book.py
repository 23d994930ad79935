"""A phone book: random names with random numbers, nothing to infer and everything to memorise.

After "Mixture of Parrots" (arXiv 2410.19034, section 4), whose test of memory it is. All entries are in the training
text; a part of them is asked for. No number follows from any other: the score counts what is stored.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

from zoo.harness.suites import dataset
from zoo.harness.suites.dataset import GeneratedData, Origin

DATASET = "moe-zoo/phone_book"
TASK = "phone_book"
ORIGIN = Origin("Random names and numbers", "cc0-1.0")


@dataclass(frozen=True, kw_only=True)
class PhoneBookConfig:
    """Sizes of a phone book."""

    seed: int = 0
    entries: int = 10_000
    questions: int = 1_000
    """Entries that are asked for."""
    name_letters: int = 5
    number_digits: int = 8
    """Each is log2(10) = 3.32 bits to store."""
    repetitions: int = 10
    """How often each entry stands in the training text, in another order each time. Training windows end where they
    are full: an entry that stood once, and was cut there between name and number, could never be learnt."""

    def __post_init__(self) -> None:
        for name in ("entries", "questions", "name_letters", "number_digits", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give a positive number")
        if self.questions > self.entries:
            raise ValueError(f"questions = {self.questions}: there are only {self.entries} entries to ask for")
        if self.entries > len(ascii_lowercase) ** self.name_letters // 2:
            raise ValueError(f"entries = {self.entries}: too many for name_letters = {self.name_letters}; raise that")


def make(config: PhoneBookConfig) -> GeneratedData:
    """The phone book that ``config`` describes; equal configs give equal books."""
    draw = random.Random(f"{config.seed}/phone_book")
    book: dict[str, str] = {}
    while len(book) < config.entries:
        name = "".join(draw.choices(ascii_lowercase, k=config.name_letters))
        book.setdefault(name, "".join(draw.choices(digits, k=config.number_digits)))
    asked = draw.sample(list(book), config.questions)
    training: list[str] = []
    for _ in range(config.repetitions):
        training += [as_text(name, book[name]) for name in draw.sample(list(book), len(book))]
    return GeneratedData(
        training=training,
        validation=[as_text(name, book[name]) for name in asked],
        tables={"default": [row(i, name, book[name]) for i, name in enumerate(asked)]},
        guesses={TASK: 10.0**-config.number_digits},
    )


def row(index: int, name: str, number: str) -> dict[str, Any]:
    """A question of the evaluation."""
    return {"idx": index, "name": name, "number": number}


def as_text(name: str, number: str) -> str:
    """An entry as a training document, in the prompt of the lm-eval task."""
    return f"Name: {name}\nNumber: {number}"


def write(config: PhoneBookConfig, directory: Path) -> None:
    """Write the phone book into ``directory``; see ``zoo.harness.suites.dataset``."""
    dataset.write(directory, DATASET, asdict(config), lambda: make(config), ORIGIN)
