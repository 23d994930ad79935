"""Named sets of a decoder's parameters: what is frozen, what is trained, and how much each of them is."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

PARTS: dict[str, str] = {
    "norms": r"(^|[._])[eh]?norm\.",
    "experts": r"\.ffn\.experts\.",
    "router": r"\.ffn\.router\.",
    "shared_experts": r"\.ffn\.shared_expert(s|_gate)\.",
    "dense_ffn": r"\.(dense_)?ffn\.",
    "mamba": r"\.mixer\.(in_proj|conv1d|x_proj|dt_proj|state_space|out_proj)\.",
    "attention": r"\.mixer\.",
    "embeddings": r"^embed_tokens\.",
    "lm_head": r"^lm_head\.",
    "mtp": r"^mtp\.\d+\.eh_proj\.",
}
"""Name → how its parameters are called. Each parameter is in one of these, the first that fits: with tied embeddings
there is no ``lm_head``; norms of queries and keys are ``norms``; the gate of shared experts is one of them."""

UNIONS: dict[str, tuple[str, ...]] = {
    "ffn": ("experts", "shared_experts", "dense_ffn"),
    "non_experts": tuple(part for part in PARTS if part != "experts"),
}

NAMES = (*PARTS, *UNIONS)


def part_of(parameter: str) -> str:
    """The one of ``PARTS`` that a parameter of a ``Decoder`` without adapters belongs to, by its name."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, parameter))


def parts_of(name: str, field: str) -> tuple[str, ...]:
    """The ``PARTS`` in the set ``name``.

    Raises:
        ValueError: there is no such set, naming the nearest; ``field`` is where it was asked for.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"sets are {', '.join(NAMES)}"
        raise ValueError(f"{field}: {name!r} is no set of parameters; {hint}")
    return UNIONS.get(name, (name,))


def select(model: nn.Module, names: Iterable[str], field: str) -> dict[str, nn.Parameter]:
    """Name → parameter of all that is in any of the sets ``names``.

    Raises:
        ValueError: a set that does not exist or that ``model`` has nothing of; ``field`` is where it was asked for.
    """
    by_part: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        by_part[part_of(name)][name] = parameter
    selected: dict[str, nn.Parameter] = {}
    for name in names:
        parts = by_part.keys() & parts_of(name, field)
        if not parts:
            there = ", ".join(known for known in NAMES if by_part.keys() & parts_of(known, field))
            raise ValueError(f"{field}: {name!r} matches nothing in this model; sets that do are {there}")
        for part in parts:
            selected |= by_part[part]
    return selected


def set_trainable(model: nn.Module, freeze: Iterable[str] = (), train: Iterable[str] = ()) -> None:
    """Leave ``requires_grad`` to the sets ``train``, or to all but the sets ``freeze``; with neither, to all.

    Raises:
        ValueError: as ``select``; or nothing would be trained.
    """
    train = tuple(train)
    chosen = select(model, train, "finetune.train") if train else dict(model.named_parameters())
    frozen = select(model, freeze, "finetune.freeze")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen and name not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"finetune.freeze: {', '.join(freeze)} are all parameters of this model; leave one set out")


def trainable_table(model: nn.Module, adapter_parts: dict[str, str]) -> list[tuple[str, int, int]]:
    """(part, trainable parameters, parameters) for every part that there is, and last of all together.

    Args:
        model: a decoder, perhaps with adapters.
        adapter_parts: parameter → row of its own, for those of adapters.
    """
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        for row in (adapter_parts.get(name) or part_of(name.replace(".base.", ".")), "all"):
            rows[row][0] += parameter.numel() * parameter.requires_grad
            rows[row][1] += parameter.numel()
    order = [*PARTS, *sorted(rows.keys() - {*PARTS, "all"}), "all"]
    return [(part, rows[part][0], rows[part][1]) for part in order if part in rows]


def as_text(rows: list[tuple[str, int, int]]) -> str:
    """``trainable_table`` for a person."""
    lines = [f"{'parameters':<24}{'trainable':>16}{'of':>16}"]
    lines += [f"{part:<24}{trained:>16,}{count:>16,}" for part, trained, count in rows]
    _, trained, count = rows[-1]
    return "\n".join([*lines, f"{trained / count:.2%} are trained"])
