"""What an inspection may say in words: sentences made from its numbers, which never rank what is within chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.harness.headline import percent
from zoo.inspect.inspection import MOST_TYPES


def sentences(report: Mapping[str, Any]) -> list[str]:
    """The report in a few sentences, balance first."""
    result = [_balance(report), _dead(report)]
    if report["balance"][0]["dropped"] is not None:
        result.append(_dropped(report))
    result.append(_tokens(report))
    if report["domain_specialisation"]:
        result.append(_domains(report))
    if report["co_activation"]:
        result.append(_pairs(report))
    noise = report["settings"]["noise"]
    result.append(_stable(report["stability"]["noise"], f"With noise of {noise:g} times its size on every embedding"))
    for name, layers in report["stability"]["checkpoints"].items():
        result.append(_stable(layers, f"Between this checkpoint and {name}"))
    result.append(_alike(report))
    if report["shared"]:
        shares = [layer["share"] for layer in report["shared"]]
        result.append(f"Shared experts make {_range(shares, percent)} of the norm of what a layer adds.")
    return result


def _balance(report: Mapping[str, Any]) -> str:
    data = " and ".join(entry["name"] for entry in report["data"])
    loads = [share * len(layer["load"]) for layer in report["balance"] for share in layer["load"]]
    effective = [layer["effective_experts"] for layer in report["balance"]]
    return (
        f"On {report['tokens']:,} tokens of {data}, experts of {report['model']} get between {min(loads):.2f} and "
        f"{max(loads):.2f} of an equal share: as if {_range(effective, '{:.1f}'.format)} of {report['num_experts']} "
        f"experts shared the tokens of a layer equally."
    )


def _dead(report: Mapping[str, Any]) -> str:
    limit = f"less than {report['settings']['dead_below']:g} of an equal share"
    if any(layer["dead"] is None for layer in report["balance"]):
        return f"There are too few tokens to tell whether experts are dead ({limit})."
    dead = {layer["layer"]: layer["dead"] for layer in report["balance"] if layer["dead"]}
    if not dead:
        return f"No expert is dead ({limit})."
    parts = [f"{len(experts)} in layer {layer}" for layer, experts in dead.items()]
    total = sum(map(len, dead.values()))
    return f"{total} of {report['num_experts'] * len(report['layers'])} experts dead ({limit}): {_list(parts)}."


def _dropped(report: Mapping[str, Any]) -> str:
    dropped, untaken = ([layer[key] for layer in report["balance"]] for key in ("dropped", "untaken"))
    return (
        f"{_range(dropped, percent)} of the assignments of a layer found no room, and {_range(untaken, percent)} of "
        "the tokens none at any expert."
    )


def _tokens(report: Mapping[str, Any]) -> str:
    found = report["token_specialisation"]
    seen = f"token types seen {found['minimum_occurrences']} times or more"
    if found["types"] == MOST_TYPES:
        seen = "most frequent token types"
    if not found["types"]:
        return f"There are no {seen}, so none was tested for going to certain experts."
    tested = f"Fisher's exact test, Holm's correction for {found['tests']:,} tests"
    if not found["specialised_types"]:
        return f"None of {found['types']:,} {seen} goes to any expert more often than chance ({tested})."
    share = percent(found["specialised_types"] / found["types"])
    return (
        f"{found['specialised_types']:,} of {found['types']:,} {seen} ({share}) go to some expert more often than "
        f"chance ({tested})."
    )


def _domains(report: Mapping[str, Any]) -> str:
    layers = report["domain_specialisation"]["layers"]
    told = [layer for layer in layers if layer["p_holm"] <= report["settings"]["significance"]]
    names = " and ".join(entry["name"] for entry in report["data"])
    how = "permutation test of whole windows, Holm's correction for layers"
    if not told:
        return f"Which experts {names} use cannot be told apart in any layer ({how})."
    bits = max(layer["information"] - layer["by_chance"] for layer in told)
    return (
        f"{names} use other experts than each other in {len(told)} of {len(layers)} MoE layers ({how}): an "
        f"assignment's expert tells up to {bits:.3f} bits about where it comes from, beyond chance."
    )


def _pairs(report: Mapping[str, Any]) -> str:
    layers = report["co_activation"]
    count = sum(len(layer["told_apart"]) for layer in layers)
    experts = report["num_experts"]
    total = len(layers) * experts * (experts - 1) // 2
    which = f"{count:,} of {total:,} pairs" if count else f"None of {total:,} pairs"
    return (
        f"{which} of experts are chosen together more or less often than their loads explain (exact binomial test, "
        "Holm's correction)."
    )


def _stable(layers: Sequence[Mapping[str, Any]], where: str) -> str:
    equal, chance = ([layer[key] for layer in layers] for key in ("equal", "by_chance"))
    overlap = [layer["jaccard"] for layer in layers]
    return (
        f"{where}, {_range(equal, percent)} of the tokens keep all their experts; the overlap of old "
        f"and new ones (Jaccard) is {_range(overlap, '{:.2f}'.format)}, of unrelated tokens "
        f"{_range(chance, '{:.2f}'.format)}."
    )


def _alike(report: Mapping[str, Any]) -> str:
    means = {
        kind: [_off_diagonal(layer[kind]) for layer in report["similarity"]["layers"]]
        for kind in ("weights", "outputs")
    }
    return (
        f"Two experts of a layer have a mean cosine of {_range(means['weights'], _signed)} in their weights and of "
        f"{_range(means['outputs'], _signed)} in what they make of the same {report['similarity']['tokens']} tokens."
    )


def _off_diagonal(table: Sequence[Sequence[float]]) -> float:
    values = [value for i, row in enumerate(table) for j, value in enumerate(row) if i != j]
    return sum(values) / max(1, len(values))


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # adding 0 makes 0 of -0


def _range(values: Sequence[float], text: Any) -> str:
    """Of layers: one value, or from the lowest to the highest."""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"


def _list(parts: Sequence[str]) -> str:
    return ", ".join(parts) if len(parts) <= 4 else f"{', '.join(parts[:4])} and {len(parts) - 4} more layers"
