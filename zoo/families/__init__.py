"""The families of published models: each a module that exports ``FAMILY``, found here by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from zoo.config import ModelConfig, ModelSpec
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
)
from zoo.families.base import Family

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
"""Name → family, plainest first: the order in which ``expressible`` tries them."""


def get_family(name: str) -> Family:
    """The family ``name``.

    Raises:
        ValueError: there is none, naming the nearest.
    """
    if name not in FAMILIES:
        close = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"families are {', '.join(FAMILIES)}"
        raise ValueError(f"family = {name!r} is unknown; {hint}")
    return FAMILIES[name]


def family_of(hf: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a published ``config.json``, by its ``model_type``.

    Raises:
        ValueError: no family has it.
    """
    model_type = hf.get("model_type")
    for family in FAMILIES.values():
        if family.model_type == model_type:
            architectures = hf.get("architectures") or [family.architectures[0]]
            if architectures not in [[name] for name in family.architectures]:
                supported = " or ".join(family.architectures)
                raise ValueError(f"{where}: architectures = {architectures!r} is not supported; only {supported} is")
            return family
    known = ", ".join(family.model_type for family in FAMILIES.values())
    raise ValueError(f"{where}: model_type = {model_type!r} is not supported; it must be one of {known}")


def expressible(config: ModelConfig) -> str | None:
    """Name of the first family that can hold ``config``: how a derived model, such as a dense twin, gets one.

    ``None`` where no published architecture can: the model trains and is evaluated like any other, and is not exported.
    """
    return next((family.name for family in FAMILIES.values() if _refusal(family, config) is None), None)


def exporting_family(spec: ModelSpec) -> Family:
    """The family in whose layout ``spec`` is published.

    Raises:
        ValueError: it has none, saying why for each.
    """
    if spec.family is not None:
        return get_family(spec.family)
    reasons = "; ".join(str(_refusal(family, spec.model)) for family in FAMILIES.values())
    raise ValueError(f"{spec.name}: no published architecture can hold this model: {reasons}")


def _refusal(family: Family, config: ModelConfig) -> ValueError | None:
    try:
        family.to_hf(config)
    except ValueError as error:
        return error
    return None
