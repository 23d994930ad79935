"""All generated data sets by name: what ``zoo data make`` makes, and the questions that ``evaluation/data`` carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from zoo.config_reading import from_dict
from zoo.harness.facts import build as facts
from zoo.harness.suites import dataset, phone_book, shortest_path
from zoo.harness.suites.dataset import MIRROR, GeneratedData, Origin
from zoo.harness.suites.phone_book import PhoneBookConfig
from zoo.harness.suites.shortest_path import ShortestPathConfig
from zoo.registry import evaluation_dir


@dataclass(frozen=True)
class Generator:
    """How one data set is made."""

    dataset: str
    """Its name in a mirror."""
    config: type
    make: Callable[[Any], GeneratedData]
    origin: Origin


GENERATORS = {
    "facts": Generator(facts.DATASET, facts.FactsConfig, facts.make, facts.ORIGIN),
    "phone_book": Generator(phone_book.DATASET, phone_book.PhoneBookConfig, phone_book.make, phone_book.ORIGIN),
    "shortest_path": Generator(
        shortest_path.DATASET, shortest_path.ShortestPathConfig, shortest_path.make, shortest_path.ORIGIN
    ),
}


def generate(name: str, settings: Sequence[str], directory: Path) -> dict[str, Any]:
    """Write a data set into ``directory``; see ``zoo.harness.suites.dataset``.

    Args:
        name: of ``GENERATORS``.
        settings: fields of its config as ``field=value``; the others keep their defaults.

    Returns:
        The whole config.

    Raises:
        ValueError: an unknown field, a value that does not fit, or ``directory`` holds another data set.
    """
    generator = GENERATORS[name]
    for setting in settings:
        if "=" not in setting:
            raise ValueError(f"zoo data make {name}: {setting!r}: give field=value")
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(settings)))
    config: Any = from_dict(generator.config, values, f"zoo data make {name}")
    dataset.write(directory, generator.dataset, asdict(config), lambda: generator.make(config), generator.origin)
    return asdict(config)


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Data sets that one model is trained on together."""

    phone_book: PhoneBookConfig | None = None
    shortest_path: ShortestPathConfig | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"generated: name at least one of {', '.join(vars(self))}")

    @property
    def parts(self) -> dict[str, Any]:
        """Configs of those that are there, by their name in ``GENERATORS``."""
        return {name: config for name, config in vars(self).items() if config is not None}


def write_mixture(config: MixtureConfig, directory: Path) -> list[Path]:
    """Write every data set into a folder of its own under ``directory``, and all questions into the mirror ``hub``.

    Returns:
        The folders, each laid out as ``zoo.harness.suites.dataset`` says, but for its mirror.
    """
    for name, part in config.parts.items():
        made = GENERATORS[name]
        make = partial(made.make, part)
        dataset.write(directory / name, made.dataset, asdict(part), make, made.origin, directory / MIRROR)
    return [directory / name for name in config.parts]


def guess_rates(config: MixtureConfig, directory: Path) -> dict[str, float]:
    """Score that guessing reaches, by lm-eval task, for what ``write_mixture`` wrote."""
    found: dict[str, float] = {}
    for name in config.parts:
        found |= dataset.guess_rates(directory / name, GENERATORS[name].dataset)
    return found


def write_shipped(directory: Path | None = None) -> None:
    """Write the questions of all default configs, by default to where tasks find them without a mirror."""
    for generator in GENERATORS.values():
        tables = generator.make(generator.config()).tables
        dataset.write_tables((directory or evaluation_dir() / "data") / generator.dataset, tables, generator.origin)
