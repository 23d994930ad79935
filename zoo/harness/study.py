"""A study: which models are trained on which tokens and scored on which tasks. One YAML file of ``configs/studies``.

Dense twins are not written down but found from the sparse model's config (``zoo.harness.match``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf

from zoo.config import ModelConfig, ModelSpec, from_dict, load_yaml, to_dict
from zoo.harness.facts import FactsConfig
from zoo.harness.match import Quantity, match
from zoo.harness.task_text import TaskRows
from zoo.registry import find_spec

Skill = Literal["knowledge", "comprehension"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training text and tokenizer. Exactly one of ``facts`` and ``sources``, of ``vocab_size`` and ``tokenizer``."""

    facts: FactsConfig | None = None
    """The embedded data set, made on the spot with its evaluation mirror."""
    sources: tuple[str, ...] = ()
    """Files and hub ids, as ``zoo data build`` takes them."""
    documents: int | None = None
    """Only so many documents of each source, the first; by default all."""
    validation_fraction: float = 0.01
    """Part of the documents of ``sources`` that is held out for perplexity."""
    tasks: dict[str, TaskRows] = field(default_factory=dict)
    """Evaluation tasks whose train rows are trained on beside ``sources``, by name."""
    separator: str | None = None
    """What ends a document in ``.txt`` sources; by default a file is one document."""
    vocab_size: int | None = None
    """Train a tokenizer of this size on the training text."""
    tokenizer: str | None = None
    """Directory or file of an existing tokenizer."""

    def __post_init__(self) -> None:
        if (self.facts is None) == (not self.sources):
            raise ValueError("facts / sources: give exactly one of the two")
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise ValueError("vocab_size / tokenizer: give exactly one of the two")
        if self.facts is not None and self.tasks:
            raise ValueError("tasks: their train rows stand beside sources, not beside facts; give sources")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The budget, equal for all models."""

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Sequences in a step."""
    sequence_length: int
    """Tokens in a sequence."""
    checkpoints: int = 1
    """How many are evaluated, evenly over the steps, the last at their end. Views at equal perplexity, FLOPs and time
    need several."""
    fit: dict[str, Any] = field(default_factory=dict)
    """Further keys of ``zoo fit``, nested, for every model."""
    balance: dict[str, float] = field(default_factory=dict)
    """Keys of ``zoo fit``'s ``model`` that only models with experts take, such as ``load_balance_coef``."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length", "checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give a positive number")
        if self.checkpoints > self.steps:
            raise ValueError(f"checkpoints = {self.checkpoints}: give at most one for each of the {self.steps} steps")

    @property
    def tokens(self) -> int:
        """Tokens that each model is trained on, repetitions counted."""
        return self.steps * self.batch_size * self.sequence_length

    @property
    def evaluated_steps(self) -> tuple[int, ...]:
        """Optimizer steps after which a model is evaluated; the last one is the last of the training."""
        return tuple(round(self.steps * i / self.checkpoints) for i in range(1, self.checkpoints + 1))


@dataclass(frozen=True, kw_only=True)
class TwinConfig:
    """The dense twin of another model of the study."""

    of: str
    by: Quantity


@dataclass(frozen=True, kw_only=True)
class EntryConfig:
    """A model: ``base`` with ``overrides``, or a ``twin``."""

    name: str
    base: str | None = None
    """Name of ``zoo list`` or path of a model YAML."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the model that replace those of ``base``, nested as in its YAML."""
    twin: TwinConfig | None = None

    def __post_init__(self) -> None:
        if (self.base is None) == (self.twin is None):
            raise ValueError(f"model {self.name!r}: give exactly one of base and twin")
        if self.twin and self.overrides:
            raise ValueError(f"model {self.name!r}: a twin follows from its model; remove the overrides")
        if not self.name or Path(self.name).name != self.name or self.name.startswith("."):
            raise ValueError(f"model {self.name!r}: it names a directory; use letters, digits and hyphens")


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Names of lm-eval tasks by what they measure."""

    knowledge: tuple[str, ...]
    comprehension: tuple[str, ...]

    def __post_init__(self) -> None:
        for skill in ("knowledge", "comprehension"):
            if not getattr(self, skill):
                raise ValueError(f"{skill}: name at least one task")

    @property
    def all(self) -> tuple[str, ...]:
        """Every task once."""
        return tuple(dict.fromkeys(self.knowledge + self.comprehension))


@dataclass(frozen=True, kw_only=True)
class Study:
    """What ``zoo compare`` runs."""

    name: str
    data: DataConfig
    training: TrainingConfig
    models: tuple[EntryConfig, ...]
    tasks: TasksConfig
    seeds: tuple[int, ...] = (0,)
    """Every model is trained once with each; a seed fixes the weights and the order of the data."""
    limit: int | None = None
    """Evaluate only the first items of each task."""

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.models]
        if not self.models:
            raise ValueError("models: name at least one")
        for what, values in (("models", names), ("seeds", list(self.seeds))):
            if len(set(values)) < len(values) or not values:
                raise ValueError(f"{what} = {values}: give each once, and at least one")
        for entry in self.models:
            if entry.twin and entry.twin.of not in names:
                raise ValueError(f"model {entry.name!r}: twin of {entry.twin.of!r}, which is not among the models")


@dataclass(frozen=True)
class Model:
    """A model of a study with its architecture worked out."""

    name: str
    spec: ModelSpec
    twin: TwinConfig | None = None


def load_study(path: str | Path, smoke: bool = False) -> Study:
    """Read a study.

    Args:
        path: of the YAML file. Its key ``smoke`` holds the values that replace others for a quick run.
        smoke: whether to replace them.

    Raises:
        ValueError: the file is not a valid study, or has no smoke size.
    """
    data = load_yaml(path)
    smaller = data.pop("smoke", None)
    if smoke:
        if smaller is None:
            raise ValueError(f"{path}: it has no smoke size; add the key smoke, or run it without --smoke")
        data = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(data, smaller)))
    return from_dict(Study, data, str(path))


def resolve_models(study: Study, vocab_size: int) -> list[Model]:
    """Work out every architecture, in the study's order.

    Args:
        vocab_size: of the data's tokenizer; it replaces that of every base.

    Raises:
        ValueError: an unknown base, overrides that do not fit, or a twin that does not exist.
    """
    specs: dict[str, ModelSpec] = {}
    for entry in study.models:
        if entry.base is not None:
            specs[entry.name] = _based(entry, entry.base, vocab_size)
    models = []
    for entry in study.models:
        spec = specs.get(entry.name)
        if spec is None:
            assert entry.twin is not None
            if entry.twin.of not in specs:
                raise ValueError(f"model {entry.name!r}: {entry.twin.of!r} is a twin itself; name a sparse model")
            spec = match(specs[entry.twin.of], by=entry.twin.by, sequence_length=study.training.sequence_length)
        models.append(Model(entry.name, replace(spec, name=entry.name), entry.twin))
    return models


def _based(entry: EntryConfig, base: str, vocab_size: int) -> ModelSpec:
    spec = find_spec(base)
    changes: Mapping[str, Any] = {"vocab_size": vocab_size, **entry.overrides}
    merged = OmegaConf.to_container(OmegaConf.merge(to_dict(spec.model), changes))
    model = from_dict(ModelConfig, merged, f"model {entry.name!r}: overrides")
    return ModelSpec(name=entry.name, family=spec.family, model=model)
