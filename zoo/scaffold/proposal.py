"""A ``ModelConfig`` for a published config.json that no family reads yet, and what it leaves unsaid.

There is no table of spellings here. The readers of the existing families are one: each is tried on the file, with what
it refuses noted instead of raised, and the one that leaves the least unread is the nearest. Which of our fields comes
from which of theirs is found by changing one value of the file at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from zoo.config import ModelConfig
from zoo.families import FAMILIES
from zoo.families.base import Family
from zoo.families.fields import Fields
from zoo.registry import find_spec, model_names

Aliases = Mapping[str, tuple[str, ...]]
"""Published field → other names that families give to the same."""


@dataclass
class Notes:
    """What one reading left."""

    unread: dict[str, Any] = field(default_factory=dict)
    """Fields with a value that the family does not know or does not support."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Field that the family asked for → the one of the file that was taken for it."""
    asked: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Proposal:
    """The nearest reading of a config.json."""

    family: str
    """The family that read it."""
    config: ModelConfig
    origins: dict[str, str]
    """Path of a field of ``config`` → the field of the file that it follows."""
    assumed: dict[str, Any]
    """Fields of ``config`` off their default that nothing in the file says: they are as in ``family``."""
    notes: Notes
    known_to: dict[str, list[str]]
    """Unread field → the families that know one of this name."""


def propose(hf: Mapping[str, Any], families: Mapping[str, Family] = FAMILIES) -> Proposal:
    """The proposal of the nearest of ``families``.

    Raises:
        ValueError: none of them can read the file, saying why for the last one tried.
    """
    readings: list[tuple[int, int, str, ModelConfig, Notes]] = []
    reason: ValueError | None = None
    aliases = known_aliases(tuple(families))
    for name, family in families.items():
        for spellings in ({}, aliases):  # its own are enough for most
            try:
                config, notes = _read(family, hf, spellings)
            except ValueError as error:
                reason = error
                continue
            readings.append((len(notes.unread), len(notes.renamed), name, config, notes))
    if not readings:
        raise ValueError(f"no family can read this config.json: {reason}")
    *_, name, config, notes = min(readings, key=lambda reading: reading[:2])
    exact, loose = _origins(families[name], hf, aliases if notes.renamed else {}, config)
    origins = {path: key for path, key in (loose | exact).items() if key not in notes.unread}
    assumed = {path: value for path, value in _given(config) if path not in origins}
    return Proposal(name, config, origins, assumed, notes, _known_to(notes.unread, families))


@cache
def known_aliases(families: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Spellings of ``families`` for the same field of ours, from the configs of the zoo."""
    spelled: dict[str, dict[str, None]] = {}
    for name, hf in _published(families).items():
        exact, _ = _origins(FAMILIES[name], hf, {}, FAMILIES[name].from_hf(hf))
        for path, key in exact.items():
            if "." not in key:
                spelled.setdefault(path, {})[key] = None
    groups = [tuple(keys) for keys in spelled.values() if len(keys) > 1]
    every = dict.fromkeys(key for group in groups for key in group)
    return {key: tuple(k for group in groups if key in group for k in group if k != key) for key in every}


class _Lenient(Fields):
    """Fields that a family reads as ever, while what it would refuse is noted."""

    def __init__(self, data: Mapping[str, Any], notes: Notes, aliases: Aliases, prefix: str = "") -> None:
        super().__init__(data)
        self._notes, self._aliases, self._prefix = notes, aliases, prefix

    def raw(self, key: str, default: Any = None) -> Any:
        self._notes.asked.add(self._prefix + key)
        if self._data.get(key) is None and not self._prefix:
            for alias in self._aliases.get(key, ()):
                if self._data.get(alias) is not None:
                    self._notes.renamed[key] = alias
                    return super().raw(alias)
        return super().raw(key, default)

    def section(self, key: str) -> Fields:
        super().section(key)  # refuses what is no object
        return _Lenient(self.raw(key, {}), self._notes, self._aliases, f"{self._prefix}{key}.")

    def expect(self, key: str, *allowed: Any) -> None:
        value = self.raw(key)
        if value is not None and value not in allowed:
            self._notes.unread[self._prefix + key] = value

    def skip(self, *keys: str) -> None:
        super().skip(*keys)
        self._notes.asked.update(self._prefix + key for key in keys)

    def finish(self) -> None:
        for key, value in self._data.items():
            if key not in self._used and value is not None and value is not False:
                self._notes.unread[self._prefix + key] = value


def _read(family: Family, hf: Mapping[str, Any], aliases: Aliases) -> tuple[ModelConfig, Notes]:
    notes = Notes()
    fields = _Lenient(hf, notes, aliases)
    fields.skip("quantization_config")
    config = family.read(fields)
    fields.finish()
    return config, notes


@cache
def _published(families: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Family → config.json of one of its models in the zoo."""
    specs = {spec.family: spec for spec in map(find_spec, model_names()) if spec.family in families}
    return {str(family): FAMILIES[str(family)].to_hf(spec.model) for family, spec in specs.items()}


def _origins(
    family: Family, hf: Mapping[str, Any], aliases: Aliases, config: ModelConfig
) -> tuple[dict[str, str], dict[str, str]]:
    """Path of our field → theirs: where it is the same number or switch, and where it only depends on it."""
    before = dict(_leaves(config))
    exact: dict[str, str] = {}
    loose: dict[str, str] = {}
    for key, value in _scalars(hf):
        for other in _others(value):
            try:
                after = dict(_leaves(_read(family, _with(hf, key, other), aliases)[0]))
            except ValueError:
                continue
            for path in before.keys() & after.keys():
                if after[path] != before[path]:
                    same = (before[path], after[path]) == (value, other)
                    (exact if same else loose).setdefault(path, key)
            break
    return exact, loose


def _leaves(block: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(block):
        value = getattr(block, f.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value


def _given(block: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of the fields that are required or off their default."""
    for f in dataclasses.fields(block):
        value = getattr(block, f.name)
        if dataclasses.is_dataclass(value):
            yield from _given(value, f"{prefix}{f.name}.")
        elif value != f.default:
            yield f"{prefix}{f.name}", value


def _scalars(hf: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of numbers and switches, those of a section as SECTION.NAME."""
    for key, value in hf.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", v) for inner, v in value.items() if isinstance(v, bool | int | float))
        elif isinstance(value, bool | int | float):
            yield key, value


def _others(value: bool | int | float) -> tuple[bool | int | float, ...]:
    """Values that might be read in the place of ``value``: some fields must divide others, or lie in a range."""
    if isinstance(value, bool):
        return (not value,)
    return (
        (value * 2, value // 2, value + 1, value - 1) if isinstance(value, int) else (value * 2, value / 2, value + 1)
    )


def _with(hf: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    section, _, inner = key.rpartition(".")
    return {**hf, section: {**hf[section], inner: value}} if section else {**hf, key: value}


def _known_to(keys: Mapping[str, Any], families: Mapping[str, Family]) -> dict[str, list[str]]:
    known: dict[str, list[str]] = {key: [] for key in keys}
    for name, hf in _published(tuple(families)).items():
        _, notes = _read(FAMILIES[name], hf, {})
        for key in keys:
            if key in notes.asked:
                known[key].append(name)
    return known
