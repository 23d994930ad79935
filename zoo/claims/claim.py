"""A claim: which arms are trained, and what their measures have to show. One YAML file of ``configs/studies/claims``.

What is the same for all claims, texts and budget above all, stands in ``common.yaml`` beside them, and any of it may be
said anew in a claim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf

from zoo.claims.measures import MEASURES
from zoo.config import from_dict, load_yaml
from zoo.harness.entries import EntryConfig

COMMON = "common.yaml"


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A text to train on, tokenised with the tokenizer that all texts share."""

    sources: tuple[str, ...]
    """Files and hub ids, as ``zoo data build`` takes them."""
    separator: str | None = None
    """What ends a document in ``.txt`` sources; by default a file is one document."""
    documents: int | None = None
    """Only so many documents of each source, the first; by default all."""
    validation_fraction: float = 0.1
    """Part of the documents that is held out."""


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Weights that an arm begins with: those that another arm of the same seed ended with."""

    of: str
    upcycle: tuple[str, ...] | None = None
    """Further arguments of ``zoo upcycle``, which turns them into those of a sparse model; by default they are taken
    as they are."""


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One way to train: exactly one of ``model`` and ``start``."""

    model: str | None = None
    """Name among the claim's models; its weights are drawn from the seed."""
    start: StartConfig | None = None
    text: str = "general"
    """Name among the claim's texts."""
    fit: dict[str, Any] = field(default_factory=dict)
    """Keys of ``zoo fit``, nested, that differ from those of the claim."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.start is None):
            raise ValueError("model / start: give exactly one of the two")


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """That Σ weight · measure over arms of equal seed is at least, at most, or within ± of a number."""

    measure: str
    """A name of ``zoo.claims.measures.MEASURES``."""
    contrast: dict[str, float]
    """Arm → weight; for a difference of two 1 and -1."""
    log: bool = False
    """Of the measures' logarithms: a difference is then that of a ratio from 1, about."""
    at_least: float | None = None
    at_most: float | None = None
    within: float | None = None

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"measure = {self.measure!r}: use one of {', '.join(MEASURES)}")
        if [self.at_least, self.at_most, self.within].count(None) != 2:
            raise ValueError(f"expectation on {self.measure}: give exactly one of at_least, at_most and within")
        if self.within is not None and self.within <= 0:
            raise ValueError(f"within = {self.within}: give the positive distance from 0 that counts as none")
        if not self.contrast:
            raise ValueError(f"expectation on {self.measure}: its contrast names no arm")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is said, the experiment, and what it would have to show."""

    name: str
    says: str
    """The claim in one sentence."""
    sources: tuple[str, ...]
    """Who says so, and who says otherwise."""
    note: str = ""
    """What the experiment can and cannot show."""
    texts: dict[str, TextConfig]
    vocab_size: int
    """Of the tokenizer, which is trained on all texts."""
    fit: dict[str, Any]
    """Keys of ``zoo fit``, nested, for every arm."""
    models: tuple[EntryConfig, ...]
    arms: dict[str, ArmConfig]
    expect: tuple[Expectation, ...]
    given: tuple[Expectation, ...] = ()
    """What must hold for the experiment to be one: where it does not, there is no verdict."""
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < max(3, len(self.seeds)):
            raise ValueError(f"seeds = {list(self.seeds)}: give at least 3, each once; fewer have no useful interval")
        if not self.expect:
            raise ValueError("expect: say what would have to be seen")
        names = [model.name for model in self.models]
        for name, arm in self.arms.items():
            known = [("model", arm.model, names), ("text", arm.text, list(self.texts))]
            if arm.start:
                known.append(("start.of", arm.start.of, list(self.arms)))
            for key, value, there in known:
                if value is not None and value not in there:
                    raise ValueError(f"arm {name!r}: {key} = {value!r}: use one of {', '.join(there)}")
        for expectation in (*self.expect, *self.given):
            for arm_name in expectation.contrast:
                if arm_name not in self.arms:
                    raise ValueError(
                        f"expectation on {expectation.measure}: {arm_name!r} is no arm; there are "
                        f"{', '.join(self.arms)}"
                    )
        self.ordered()

    def ordered(self) -> list[str]:
        """Names of the arms, each after the one that it starts from.

        Raises:
            ValueError: arms start from each other.
        """
        done: list[str] = []
        left = list(self.arms)
        while left:
            ready = [n for n in left if (start := self.arms[n].start) is None or start.of in done]
            if not ready:
                raise ValueError(f"arms {', '.join(left)}: they start from each other; give one of them a model")
            done += ready
            left = [name for name in left if name not in ready]
        return done


def claim_files(folder: Path) -> list[Path]:
    """The claims of a folder, in the order of their file names."""
    return sorted(path for path in folder.glob("*.yaml") if path.name != COMMON)


def load_claim(path: Path, smoke: bool = False, sources: Mapping[str, Sequence[str]] | None = None) -> Claim:
    """Read a claim.

    Args:
        path: of its YAML file, beside which ``common.yaml`` may lie. The key ``smoke`` of either holds what replaces
            other values for a quick run.
        smoke: whether to replace them.
        sources: by name of a text, what to read in place of its ``sources``.

    Raises:
        ValueError: it is not a valid claim, or a text is not one of it.
    """
    common = path.with_name(COMMON)
    parts = [load_yaml(common)] if common.exists() else []
    parts.append(load_yaml(path))
    smaller = [part.pop("smoke", {}) for part in parts]
    for key, value in (part for smoke_part in smaller if smoke for part in smoke_part.items()):
        parts.append({key: value})
    data = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(*parts)))
    # A model of the claim stands beside the common ones, and takes the place of one of the same name.
    models = {model["name"]: model for part in parts for model in part.get("models", [])}
    used = _used(data.get("arms", {}), models)
    data["models"] = [model for name, model in models.items() if name in used]
    for name, given in (sources or {}).items():
        if name not in data.get("texts", {}):
            raise ValueError(f"--text {name}=…: {path} has no such text; it has {', '.join(data.get('texts', {}))}")
        data["texts"][name] |= {"sources": list(given)}
    return from_dict(Claim, data, str(path))


def _used(arms: dict[str, Any], models: dict[str, Any]) -> set[str]:
    """Models of arms, and those that they are made from."""
    used = {arm.get("model") for arm in arms.values() if isinstance(arm, dict)}
    while True:
        made = [models[name].get(kind) or {} for name in used if name in models for kind in ("twin", "variant")]
        more = {part["of"] for part in made if isinstance(part.get("of"), str)} - used
        if not more:
            return {name for name in used if name}
        used |= more


Verdict = Literal["holds here", "does not hold here", "not decidable at this size"]
