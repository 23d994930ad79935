"""The models that a study names: bases, sparse variants, dense twins, sweeps; and what architectures they are.

Twins and variants are not written down but found from another model's config (``zoo.harness.match``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from zoo.config import ModelConfig, ModelSpec
from zoo.config_reading import from_dict, to_dict
from zoo.harness.match import DESCRIPTIONS, TOLERANCE, Quantity, Sparsity, match, measure, sparsify
from zoo.registry import find_spec

By = Literal["active", "total", "flops", "time"]
"""What a twin equals its model in."""

Dial = Literal["width", "experts", "active", "granularity", "shared"]
_DIALS: dict[str, tuple[Dial, ...]] = {"base": ("width",), "variant": ("experts", "active", "granularity", "shared")}
_SUFFIX = {"width": "-{}", "experts": "-{}", "active": "-k{}", "granularity": "-g{}", "shared": "-s{}"}
_UNSAID = {"granularity": 1, "shared": 0}
"""Values that a name leaves out."""


@dataclass(frozen=True, kw_only=True)
class TwinConfig:
    """The dense twin of one sparse model of the study, or of several that are equal in what it is matched in."""

    of: str | tuple[str, ...]
    by: By
    """``time`` is that of a training step on this machine, measured once for each directory of the study."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("of: name at least one model")
        if self.by == "time" and len(self.models) > 1:
            raise ValueError(f"of = {list(self.models)}: a twin by time has one model; make one twin for each")

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the sparse models; the twin is made from the first."""
        return (self.of,) if isinstance(self.of, str) else self.of


@dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """A dense model of the study made sparse at equal active parameters, in the terms of ``Sparsity``."""

    of: str
    experts: int | None = None
    """Left out where they are swept over."""
    active: int = 2
    granularity: int = 1
    shared: int = 0


@dataclass(frozen=True, kw_only=True)
class EntryConfig:
    """A model, or a sweep over models: exactly one of ``base``, ``variant`` and ``twin``."""

    name: str
    base: str | None = None
    """Name of ``zoo list`` or path of a model YAML."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the model that replace those of ``base``, nested as in its YAML."""
    width: int | None = None
    """Hidden size that ``base`` is brought to, with FFN and number of heads in proportion; depth stays."""
    variant: VariantConfig | None = None
    twin: TwinConfig | None = None
    layout: dict[str, Any] = field(default_factory=dict)
    """How ``zoo fit`` spreads the model over devices: ``strategy``, and keys of its ``parallel`` such as ``expert``."""
    sweep: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Values of ``width``, or of a variant's numbers: a model for each combination. The first is the axis of curves."""

    def __post_init__(self) -> None:
        given = [kind for kind in ("base", "variant", "twin") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"model {self.name!r}: give exactly one of base, variant and twin")
        if self.base is None and (self.overrides or self.width is not None):
            raise ValueError(f"model {self.name!r}: a {given[0]} follows from its model; remove overrides and width")
        if not self.name or Path(self.name).name != self.name or self.name.startswith("."):
            raise ValueError(f"model {self.name!r}: it names a directory; use letters, digits and hyphens")
        if self.layout and "strategy" not in self.layout:
            raise ValueError(f"model {self.name!r}: layout = {self.layout}: give its strategy, such as ep_fsdp")
        dials = _DIALS.get(given[0], ())
        for dial, values in self.sweep.items():
            if dial not in dials:
                known = f"use {', '.join(dials)}" if dials else "only a base and a variant can be swept over"
                raise ValueError(f"model {self.name!r}: sweep over {dial!r}; {known}")
            if not values or len(set(values)) < len(values):
                raise ValueError(f"model {self.name!r}: sweep.{dial} = {list(values)}: give each value once")
        if self.variant and (self.variant.experts is None) != ("experts" in self.sweep):
            raise ValueError(f"model {self.name!r}: give experts once, in its variant or in its sweep")
        if self.variant and self.variant.experts == 1:
            raise ValueError(f"model {self.name!r}: experts = 1 is the dense model {self.variant.of!r} itself; drop it")

    @property
    def made_from(self) -> tuple[str, ...]:
        """Other models of the study that must be known first."""
        if self.twin:
            return self.twin.models
        return (self.variant.of,) if self.variant else ()


@dataclass(frozen=True)
class Series:
    """Models along one dial of a sweep, by its value."""

    name: str
    dial: str
    models: Mapping[int, str]


@dataclass(frozen=True)
class Model:
    """A model of a study with its architecture worked out."""

    name: str
    spec: ModelSpec
    twin: TwinConfig | None = None
    variant: VariantConfig | None = None
    layout: Mapping[str, Any] = field(default_factory=dict)


def expand(entry: EntryConfig) -> tuple[list[EntryConfig], list[Series]]:
    """The models of ``entry``, and where it is a sweep, its series.

    A variant of one expert is the dense model that it is made from: it stands in the series and is no model of its own.
    """
    if not entry.sweep:
        return [entry], []
    axis = next(iter(entry.sweep))
    models, series = [], dict[str, dict[int, str]]()
    for values in product(*entry.sweep.values()):
        dials = dict(zip(entry.sweep, values, strict=True))
        of_series = series.setdefault(_name(entry, {d: value for d, value in dials.items() if d != axis}), {})
        if entry.variant and dials.get("experts") == 1:
            of_series[dials[axis]] = entry.variant.of
            continue
        if entry.variant:
            changes: dict[str, Any] = {"variant": replace(entry.variant, **dict[str, Any](dials))}
        else:
            changes = dict(dials)
        models.append(replace(entry, name=_name(entry, dials), sweep={}, **changes))
        of_series[dials[axis]] = models[-1].name
    return models, [Series(name, axis, dict(sorted(members.items()))) for name, members in series.items()]


def _name(entry: EntryConfig, dials: Mapping[str, int]) -> str:
    """Of one model of a sweep, with the values that set it apart."""
    return entry.name + "".join(_SUFFIX[d].format(value) for d, value in dials.items() if _UNSAID.get(d) != value)


TimeTwin = Callable[[ModelSpec], ModelSpec]
"""Sparse model → its dense twin by measured time."""


def resolve(
    entries: Sequence[EntryConfig], vocab_size: int, sequence_length: int, time_twin: TimeTwin | None = None
) -> list[Model]:
    """Work out every architecture, in the order of ``entries``, none of which is a sweep.

    Args:
        vocab_size: of the data's tokenizer; it replaces that of every base.
        sequence_length: tokens that FLOPs are matched at.
        time_twin: finds twins by time; without it, those equal in FLOPs stand in for them.

    Raises:
        ValueError: an unknown base, overrides that do not fit, a twin or variant that does not exist, or several models
            of one twin that are not equal.
    """
    by_name = {entry.name: entry for entry in entries}
    specs: dict[str, ModelSpec] = {}

    def spec_of(entry: EntryConfig, above: tuple[str, ...] = ()) -> ModelSpec:
        if entry.name in above:
            raise ValueError(f"model {entry.name!r}: it is made from itself, by way of {', '.join(above)}")
        if entry.name not in specs:
            sources = [spec_of(by_name[name], (*above, entry.name)) for name in entry.made_from]
            specs[entry.name] = replace(_spec(entry, sources, vocab_size, sequence_length, time_twin), name=entry.name)
        return specs[entry.name]

    for entry in entries:
        for name in entry.made_from if entry.twin else ():
            if by_name[name].twin:
                raise ValueError(f"model {entry.name!r}: {name!r} is a twin itself; name a sparse model")
    return [Model(entry.name, spec_of(entry), entry.twin, entry.variant, entry.layout) for entry in entries]


def _spec(
    entry: EntryConfig,
    sources: Sequence[ModelSpec],
    vocab_size: int,
    sequence_length: int,
    time_twin: TimeTwin | None,
) -> ModelSpec:
    if entry.base is not None:
        return _based(entry, entry.base, vocab_size)
    if entry.variant is not None:
        v = entry.variant
        assert v.experts is not None
        try:
            sparsity = Sparsity(experts=v.experts, active=v.active, granularity=v.granularity, shared=v.shared)
            return sparsify(sources[0], sparsity)
        except ValueError as error:
            raise ValueError(f"model {entry.name!r}: {error}") from None
    assert entry.twin is not None
    if entry.twin.by == "time":
        return time_twin(sources[0]) if time_twin else match(sources[0], "flops", sequence_length)
    twin = match(sources[0], entry.twin.by, sequence_length)
    _check_shared(entry.name, entry.twin.by, twin, sources, sequence_length)
    return twin


def _check_shared(name: str, by: Quantity, twin: ModelSpec, sources: Sequence[ModelSpec], length: int) -> None:
    """All models of a twin are as large as it."""
    wanted = measure(twin.model, by, length)
    for source in sources:
        own = measure(source.model, by, length)
        if abs(wanted / own - 1) > TOLERANCE:
            raise ValueError(
                f"model {name!r}: its {DESCRIPTIONS[by]} ({wanted:,.0f}) are not those of {source.name!r} ({own:,.0f}) "
                f"within {TOLERANCE:.0%}; give that one a twin of its own, or change its size"
            )


def _based(entry: EntryConfig, base: str, vocab_size: int) -> ModelSpec:
    spec = find_spec(base)
    changes: Mapping[str, Any] = {"vocab_size": vocab_size, **entry.overrides}
    merged = OmegaConf.to_container(OmegaConf.merge(to_dict(spec.model), changes))
    model = from_dict(ModelConfig, merged, f"model {entry.name!r}: overrides")
    if entry.width is not None:
        try:
            model = widen(model, entry.width)
        except ValueError as error:
            raise ValueError(f"model {entry.name!r}: {error}") from None
    return ModelSpec(name=entry.name, family=spec.family, model=model)


def widen(config: ModelConfig, width: int) -> ModelConfig:
    """``config`` with ``hidden_size = width``; FFN, experts and number of heads in proportion, all else as it is.

    Raises:
        ValueError: the heads would not be whole.
    """

    def scaled(size: int, field_name: str | None = None) -> int:
        if field_name and size * width % config.hidden_size:
            raise ValueError(
                f"width = {width}: of {size} at hidden_size = {config.hidden_size}, {field_name} would not stay whole"
            )
        return max(1, round(size * width / config.hidden_size))

    if width < 1:
        raise ValueError(f"width = {width}: give a positive number")
    attention, mla, moe = config.attention, config.mla, config.moe
    if attention:
        heads = scaled(attention.num_heads, "num_heads")
        attention = replace(attention, num_heads=heads, num_kv_heads=scaled(attention.num_kv_heads, "num_kv_heads"))
    if mla:
        mla = replace(mla, num_heads=scaled(mla.num_heads, "num_heads"))
    if moe:
        moe = replace(moe, moe_intermediate_size=scaled(moe.moe_intermediate_size))
    return replace(
        config,
        hidden_size=width,
        intermediate_size=scaled(config.intermediate_size),
        attention=attention,
        mla=mla,
        moe=moe,
    )
