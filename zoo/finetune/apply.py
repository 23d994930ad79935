"""A fine-tuning config made true of a decoder, and its adapters taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from zoo.finetune.config import FinetuneConfig, LoRAConfig, MoLoRAConfig, PrefixConfig
from zoo.finetune.lora import AdaptedExperts, AdaptedLinear, DoRA, LoRA, MixtureOfLoRA, matrices
from zoo.finetune.prefix import PrefixAttention
from zoo.finetune.sets import NAMES, UNIONS, part_of, parts_of, set_trainable, trainable_table
from zoo.layers.attention import Attention
from zoo.model import Decoder
from zoo.moe.experts import Experts, StackedExperts

ADAPTED = (AdaptedLinear, AdaptedExperts, PrefixAttention)


def apply(model: Decoder, config: FinetuneConfig, seed: int = 0) -> list[tuple[str, int, int]]:
    """Freeze what is not trained and put the adapter, if there is one, into ``model``.

    Args:
        model: with its weights.
        config: what is trained.
        seed: of the adapter's first values.

    Returns:
        (part, trainable parameters, parameters) for every part of the model, the adapter and the whole.

    Raises:
        ValueError: a set or target that does not exist or matches nothing in ``model``, or both an adapter and training
            in full for one matrix.
    """
    if config.adapter is None:
        set_trainable(model, config.freeze, config.train)
        return trainable_table(model, {})
    if config.train:
        set_trainable(model, train=config.train)
    else:
        model.requires_grad_(False)
    before = {id(parameter) for parameter in model.parameters()}
    if isinstance(config.adapter, PrefixConfig):
        kind = "prefix"
        _add_prefixes(model, config.adapter, seed)
    else:
        kind = "lora" if isinstance(config.adapter, LoRAConfig) else "molora"
        _add_low_rank(model, config.adapter, f"finetune.{kind}.targets", seed)
    added = {name: kind for name, parameter in model.named_parameters() if id(parameter) not in before}
    return trainable_table(model, added)


def adapted_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of every adapter that is in ``model``."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ADAPTED)]


def merge(model: Decoder) -> None:
    """Put into the matrices of ``model`` what its LoRA adapters add, and take these out; in place.

    Raises:
        ValueError: adapters of another kind: what they add depends on the input.
    """
    modules = adapted_modules(model)
    for name, module in modules:
        if not is_mergeable(module):
            raise ValueError(f"{name}: LoRA experts with a router and prefixes are no change of weights; keep them")
    for name, module in modules:
        assert isinstance(module, AdaptedLinear | AdaptedExperts)
        model.set_submodule(name, module.merged())


def is_mergeable(module: nn.Module) -> bool:
    """Whether an adapted module is a change of weights."""
    adapters = {
        AdaptedLinear: lambda m: (m.adapter,),
        AdaptedExperts: lambda m: (m.gate_up_adapter, m.down_adapter),
        PrefixAttention: lambda m: (m,),
    }[type(module)](module)
    return all(isinstance(adapter, LoRA) for adapter in adapters)


def _add_low_rank(model: Decoder, config: LoRAConfig | MoLoRAConfig, field: str, seed: int) -> None:
    places = _targets(model, config, field)
    make: Callable[..., LoRA | MixtureOfLoRA] = MixtureOfLoRA
    if isinstance(config, LoRAConfig):
        make = DoRA if config.dora else LoRA
    for name, module in places.items():
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(f"finetune.train: {name} is trained in full; leave it out, or out of {field}")
        if isinstance(module, StackedExperts) and not isinstance(module, Experts):
            raise ValueError(f"{field}: {name} are experts without a gate, which take no adapter; name other targets")
        if isinstance(module, Experts):
            gate_up, down = matrices(module)
            adapters = (
                make(gate_up, config, f"{name}.gate_up_adapter", seed),
                make(down, config, f"{name}.down_adapter", seed),
            )
            model.set_submodule(name, AdaptedExperts(module, *adapters))
        elif isinstance(module, nn.Linear):
            model.set_submodule(name, AdaptedLinear(module, make(module.weight, config, f"{name}.adapter", seed)))


def _targets(model: Decoder, config: LoRAConfig | MoLoRAConfig, field: str) -> dict[str, nn.Module]:
    """Name → module of all that the targets of ``config`` mean, in the model's order.

    Raises:
        ValueError: a target that matches nothing, or LoRA experts elsewhere than in an FFN.
    """
    known = dict(_adaptable(model))
    wanted: set[str] = set()
    for target in config.targets:
        parts = parts_of(target, field) if target in NAMES else ()
        found = {name for name, part in known.items() if part in parts or name.split(".")[-1] == target}
        if not found:
            there = sorted({name.split(".")[-1] for name in known} - {"experts"})
            sets = [known_set for known_set in NAMES if set(known.values()).intersection(parts_of(known_set, field))]
            raise ValueError(
                f"{field}: {target!r} matches nothing in this model; sets that do are {', '.join(sets)}, and "
                f"projections {', '.join(there)}"
            )
        wanted |= found
    outside = [name for name, part in known.items() if name in wanted and part not in UNIONS["ffn"]]
    if isinstance(config, MoLoRAConfig) and outside:
        raise ValueError(f"{field}: {outside[0]} is outside of the FFNs, where LoRA experts belong; use ffn or lora")
    return {name: model.get_submodule(name) for name in known if name in wanted}


def _adaptable(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, part) of every module that takes a low-rank adapter."""
    for name, module in model.named_modules():
        if isinstance(module, StackedExperts | nn.Linear):
            yield name, part_of(f"{name}.")


def _add_prefixes(model: Decoder, config: PrefixConfig, seed: int) -> None:
    std = model.config.initializer_range
    mixers = [(name, m) for name, m in model.named_modules() if name.endswith(".mixer")]
    for name, mixer in mixers:
        if not isinstance(mixer, Attention):
            raise ValueError(
                f"finetune.prefix: {name} is {type(mixer).__name__}, which has no keys and values a head; use "
                "finetune.lora"
            )
        model.set_submodule(name, PrefixAttention(mixer, config, std, name, seed))
