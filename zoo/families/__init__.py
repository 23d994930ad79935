"""The families of published models: each a module that exports ``FAMILY``, found here by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from zoo.config import ModelConfig
from zoo.encoder_decoder_config import AnyConfig, AnySpec, EncoderDecoderSpec
from zoo.families import (
    dbrx,
    deepseek_moe,
    deepseek_v2,
    deepseek_v3,
    gemma2,
    gpt_oss,
    grok1,
    jamba,
    llama,
    llama4,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    switch,
    t5,
)
from zoo.families.base import Architecture, EncoderDecoderFamily, Family

F = TypeVar("F", Family, EncoderDecoderFamily)

_MODULES = (
    llama,
    mistral,
    qwen2,
    qwen3,
    olmo2,
    gemma2,
    mixtral,
    qwen2_moe,
    qwen3_moe,
    olmoe,
    gpt_oss,
    dbrx,
    llama4,
    grok1,
    jamba,
    deepseek_moe,
    deepseek_v2,
    deepseek_v3,
)

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}
"""Name → family of decoders, plainest first: the order in which ``expressible`` tries them."""

ENCODER_DECODERS: dict[str, EncoderDecoderFamily] = {module.FAMILY.name: module.FAMILY for module in (t5, switch)}
"""Name → family of encoder-decoders."""


def get_family(name: str) -> Family:
    """The family of decoders ``name``.

    Raises:
        ValueError: there is none, naming the nearest.
    """
    return _named(name, FAMILIES)


def _named(name: str, families: Mapping[str, F]) -> F:
    if name not in families:
        close = difflib.get_close_matches(name, families, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"families are {', '.join(families)}"
        raise ValueError(f"family = {name!r} is unknown; {hint}")
    return families[name]


def family_of(hf: Mapping[str, Any], where: str = "config.json") -> Architecture[Any]:
    """The family of a published ``config.json``, by its ``model_type``.

    Raises:
        ValueError: no family has it.
    """
    model_type = hf.get("model_type")
    families: list[Architecture[Any]] = [*FAMILIES.values(), *ENCODER_DECODERS.values()]
    for family in families:
        published = family.larger(hf) or family
        if published.model_type == model_type:
            architectures = hf.get("architectures") or [published.architectures[0]]
            if architectures not in [[name] for name in published.architectures]:
                supported = " or ".join(published.architectures)
                raise ValueError(f"{where}: architectures = {architectures!r} is not supported; only {supported} is")
            return family
    known = ", ".join(p.model_type for family in families for p in (family, family.multimodal) if p)
    raise ValueError(f"{where}: model_type = {model_type!r} is not supported; it must be one of {known}")


def expressible(config: ModelConfig) -> str | None:
    """Name of the first family that can hold ``config``: how a derived model, such as a dense twin, gets one.

    ``None`` where no published architecture can: the model trains and is evaluated like any other, and is not exported.
    """
    return next((family.name for family in FAMILIES.values() if _refusal(family, config) is None), None)


def exporting_family(spec: AnySpec) -> Architecture[Any]:
    """The family in whose layout ``spec`` is published.

    Raises:
        ValueError: it has none, saying why for each.
    """
    families: Mapping[str, Architecture[Any]] = ENCODER_DECODERS if isinstance(spec, EncoderDecoderSpec) else FAMILIES
    if spec.family is not None:
        return _named(spec.family, families)
    reasons = "; ".join(str(_refusal(family, spec.model)) for family in families.values())
    raise ValueError(f"{spec.name}: no published architecture can hold this model: {reasons}")


def _refusal(family: Architecture[Any], config: AnyConfig) -> ValueError | None:
    try:
        family.to_hf(config)
    except ValueError as error:
        return error
    return None
