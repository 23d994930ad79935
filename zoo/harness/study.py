"""A study: which models are trained on which tokens and scored on which tasks. One YAML file of ``configs/studies``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from zoo.config_reading import from_dict, load_yaml
from zoo.harness.entries import By, EntryConfig, Model, Series, TimeTwin, expand, resolve
from zoo.harness.facts import FactsConfig
from zoo.harness.match import DESCRIPTIONS, TOLERANCE, measure
from zoo.harness.suites.generators import MixtureConfig
from zoo.harness.task_text import TaskRows
from zoo.parallel.hardware import find_gpu

SKILLS = ("knowledge", "comprehension")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training text (one of ``facts``, ``generated``, ``sources``) and tokenizer (``vocab_size`` or ``tokenizer``)."""

    facts: FactsConfig | None = None
    """The embedded data set, made on the spot with its evaluation mirror."""
    generated: MixtureConfig | None = None
    """Other generated data sets, made on the spot with one mirror for all."""
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
        if [self.facts is None, self.generated is None, not self.sources].count(False) != 1:
            raise ValueError("facts / generated / sources: give exactly one of the three")
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise ValueError("vocab_size / tokenizer: give exactly one of the two")
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"documents = {self.documents}: give a positive number")
        if self.tasks and not self.sources:
            raise ValueError("tasks: their train rows stand beside sources, not beside made data; give sources")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The budget, equal for all models."""

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Sequences in a micro-batch; a step has one of them, unless ``fit`` accumulates several."""
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
    def sequences(self) -> int:
        """Sequences of an optimizer step, accumulated ones included."""
        return self.batch_size * int(self.fit.get("trainer", {}).get("accumulate_grad_batches", 1))

    @property
    def tokens(self) -> int:
        """Tokens that each model is trained on, repetitions counted."""
        return self.steps * self.sequences * self.sequence_length

    @property
    def evaluated_steps(self) -> tuple[int, ...]:
        """Optimizer steps after which a model is evaluated; the last one is the last of the training."""
        return tuple(round(self.steps * i / self.checkpoints) for i in range(1, self.checkpoints + 1))


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Names of lm-eval tasks, or of groups and suites of them, by what they measure."""

    knowledge: tuple[str, ...]
    comprehension: tuple[str, ...]
    apart: tuple[str, ...] = ()
    """Reported task by task, part of neither skill: train rows of a comprehension task, for example."""

    def __post_init__(self) -> None:
        for skill in SKILLS:
            if not getattr(self, skill):
                raise ValueError(f"{skill}: name at least one task")

    @property
    def all(self) -> tuple[str, ...]:
        """Every task once."""
        return tuple(dict.fromkeys(self.knowledge + self.comprehension + self.apart))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What ``zoo compare --dry-run`` estimates time and cost for."""

    gpus: int
    gpu: str = "h100"
    """A kind of GPU that ``zoo plan`` knows."""
    dollars_per_gpu_hour: float

    def __post_init__(self) -> None:
        find_gpu(self.gpu)
        if self.gpus < 1 or self.dollars_per_gpu_hour < 0:
            raise ValueError(f"{self}: give at least one GPU and a price of 0 or more")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What ``zoo compare`` runs."""

    name: str
    data: DataConfig
    training: TrainingConfig
    models: tuple[EntryConfig, ...]
    tasks: TasksConfig
    compare: tuple[tuple[str, ...], ...] = ()
    """Pairs of models, the first against the second. By default each sparse model against each of its dense twins, and
    each variant against the dense model that it is made from."""
    seeds: tuple[int, ...] = (0,)
    """Every model is trained once with each; a seed fixes the weights and the order of the data."""
    limit: int | None = None
    """Evaluate only the first items of each task."""
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if not self.models:
            raise ValueError("models: name at least one")
        for task, amount in self.data.tasks.items():
            if task in self.tasks.all and amount.rows is not None and (self.limit is None or self.limit > amount.rows):
                raise ValueError(f"limit = {self.limit}: {task} is trained on {amount.rows} rows; evaluate no more")
        for what, values in (("models", names), ("seeds", list(self.seeds))):
            if len(set(values)) < len(values) or not values:
                raise ValueError(f"{what} = {values}: give each once, and at least one")
        for entry in self.entries:
            for name in entry.made_from:
                if name not in names:
                    kind = "twin" if entry.twin else "variant"
                    raise ValueError(
                        f"model {entry.name!r}: {kind} of {name!r}, which is not among the models: {', '.join(names)}"
                    )
        for pair in self.compare:
            if len(pair) != 2 or pair[0] == pair[1]:
                raise ValueError(f"compare: {list(pair)} is no pair; give two models")
            for name in pair:
                if name not in names:
                    raise ValueError(f"compare: {name!r} is not among the models: {', '.join(names)}")

    @property
    def entries(self) -> tuple[EntryConfig, ...]:
        """The models, sweeps expanded."""
        return tuple(model for entry in self.models for model in expand(entry)[0])

    @property
    def series(self) -> tuple[Series, ...]:
        """What the sweeps of the study draw as curves."""
        return tuple(series for entry in self.models for series in expand(entry)[1])


@dataclass(frozen=True)
class Pair:
    """Two models to compare."""

    first: str
    second: str
    matched_by: By | None
    """What they have in common, ``None`` where nothing is equal."""


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


def resolve_models(study: Study, vocab_size: int, time_twin: TimeTwin | None = None) -> list[Model]:
    """Work out every architecture, in the study's order; see ``resolve``."""
    return resolve(study.entries, vocab_size, study.training.sequence_length, time_twin)


def pairs(study: Study, models: Sequence[Model]) -> list[Pair]:
    """What the study compares; ``models`` are all of its models."""
    by_name = {model.name: model for model in models}
    names = list(study.compare)
    if not names:
        names = [(of, model.name) for model in models if model.twin for of in model.twin.models]
        names += [(model.name, model.variant.of) for model in models if model.variant]
    length = study.training.sequence_length
    return [Pair(first, second, _matched_by(by_name[first], by_name[second], length)) for first, second in names]


def _matched_by(first: Model, second: Model, sequence_length: int) -> By | None:
    """What a twin was made equal in, else the first quantity that is equal within the tolerance."""
    if second.twin and first.name in second.twin.models:
        return second.twin.by
    for by in DESCRIPTIONS:
        one, two = (measure(model.spec.model, by, sequence_length) for model in (first, second))
        if abs(two / one - 1) <= TOLERANCE:
            return by
    return None
