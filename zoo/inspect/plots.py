"""The figures of an inspection: SVG for its page, PNG and the plotted numbers as CSV for files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from zoo.harness.drawing import FAINT, FONT_SIZE, STYLE, WIDTH, Plot, finish, heat_map, legend, looks, plt
from zoo.inspect.contents import shown

Lines = Mapping[str, Sequence[float]]
"""Name of a line → its value in every MoE layer."""

Table = Sequence[Sequence[float]]


def plots(report: Mapping[str, Any]) -> list[Plot]:
    """Every figure of a report of ``zoo.inspect.report.inspect``."""
    layers = report["balance"]
    with plt.rc_context(STYLE):
        result = [
            load(report),
            by_layer(
                report,
                "entropy",
                "balance",
                "Entropy over its maximum",
                "Of the load: 1 is uniform. Of a token's scores: 1 is no preference.",
                {"load": [x["entropy"] for x in layers], "a token's scores": [x["routing_entropy"] for x in layers]},
            ),
            by_layer(
                report, "z", "balance", "Router z", "Mean of logsumexp(logits)².", {"z": [x["z"] for x in layers]}
            ),
            stability(report),
            specialised(report),
        ]
        if layers[0]["dropped"] is not None:
            result.append(dropped(report))
        if report["domain_specialisation"]:
            result += [domain_load(report), information(report)]
        if report["co_activation"]:
            result.append(together(report))
        result += [alike(report, kind) for kind in ("weights", "outputs")]
        if report["shared"]:
            result.append(shared(report))
    return result


def load(report: Mapping[str, Any]) -> Plot:
    """Load of each expert by layer."""
    shares = [layer["load"] for layer in report["balance"]]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.26 * len(shares) + 1.5))
    heat_map(figure, [axes], [_relative(shares)], list(map(str, report["layers"])))
    axes.set(ylabel="layer")
    rows: list[list[Any]] = [["layer", "expert", "share"]]
    rows += [[layer["layer"], i, share] for layer in report["balance"] for i, share in enumerate(layer["load"])]
    note = f"Of {report['tokens']:,} tokens over {report['num_experts']} experts; 1 is an equal share."
    return finish(figure, "load", "balance", "Expert load", note, rows)


def dropped(report: Mapping[str, Any]) -> Plot:
    """Assignments that found no room, and tokens that no expert takes."""
    names = {"dropped": "assignments without room", "untaken": "tokens without any expert"}
    lines = {name: [layer[key] for layer in report["balance"]] for key, name in names.items()}
    return by_layer(report, "dropped", "balance", "Dropped", f"Shares, of {report['tokens']:,} tokens.", lines)


def stability(report: Mapping[str, Any]) -> Plot:
    """Overlap of every token's experts with those under noise and in other checkpoints."""
    found = report["stability"]
    lines = {f"noise of {report['settings']['noise']:g}": [x["jaccard"] for x in found["noise"]]}
    lines |= {f"against {name}": [x["jaccard"] for x in layers] for name, layers in found["checkpoints"].items()}
    chance = [x["by_chance"] for x in found["noise"]]
    note = f"Jaccard overlap of the experts of {report['tokens']:,} tokens; dotted: of unrelated tokens."
    return by_layer(report, "stability", "stability", "Experts kept", note, lines, chance)


def specialised(report: Mapping[str, Any]) -> Plot:
    """Share of token types that go to some expert more often than chance."""
    found = report["token_specialisation"]
    shares = [x["specialised_types"] / max(1, found["types"]) for x in found["layers"]]
    note = (
        f"Share of {found['types']:,} types, those seen {found['minimum_occurrences']} times or more, that go to an "
        "expert more often than chance (Holm p up to 0.05)."
    )
    return by_layer(report, "specialised", "tokens", "Specialised token types", note, {"share of types": shares})


def domain_load(report: Mapping[str, Any]) -> Plot:
    """Load of each expert by set of data; a panel for each layer, of many for four of them."""
    layers = report["domain_specialisation"]["layers"]
    names = list(layers[0]["load"])
    tables = [_relative(list(layer["load"].values())) for layer in shown(layers)]
    note = f"1 is an equal share.{_of_all(layers)}"
    rows: list[list[Any]] = [["layer", "data", "expert", "share"]]
    rows += [[x["layer"], n, i, s] for x in layers for n, of in x["load"].items() for i, s in enumerate(of)]
    height = 0.26 * len(names) + 0.3
    return _maps("load-by-data", "data", "Expert load by data", note, shown(layers), tables, rows, height, names)


def information(report: Mapping[str, Any]) -> Plot:
    """What an assignment's expert tells about its set of data."""
    layers = report["domain_specialisation"]["layers"]
    lines = {"bits": [x["information"] for x in layers]}
    note = "Mutual information of an assignment's expert and its data; dotted: of windows dealt out at random."
    chance = [x["by_chance"] for x in layers]
    return by_layer(report, "information", "data", "What an expert tells about its data", note, lines, chance)


def together(report: Mapping[str, Any]) -> Plot:
    """Tokens that go to both of two experts over what loads explain."""
    layers = report["co_activation"]

    def ratios(layer: Mapping[str, Any]) -> list[list[float]]:
        pairs = zip(layer["together"], layer["expected"], strict=True)
        return [[_ratio(n, m) for n, m in zip(*rows, strict=True)] for rows in pairs]

    tables = [_without_diagonal(ratios(layer)) for layer in shown(layers)]
    rows: list[list[Any]] = [["layer", "expert", "other", "tokens", "expected"]]
    rows += [
        [x["layer"], i, j, n, x["expected"][i][j]]
        for x in layers
        for i, row in enumerate(x["together"])
        for j, n in enumerate(row)
        if i < j
    ]
    note = f"Tokens that go to both experts, over what their loads alone would give.{_of_all(layers)}"
    title = "Experts that are chosen together"
    return _maps("together", "together", title, note, shown(layers), tables, rows, 2.2, label="tokens ÷ expected")


def alike(report: Mapping[str, Any], kind: str) -> Plot:
    """Cosines between the experts of a layer."""
    layers = report["similarity"]["layers"]
    tables = [_without_diagonal(layer[kind]) for layer in shown(layers)]
    rows: list[list[Any]] = [["layer", "expert", "other", "cosine"]]
    rows += [
        [x["layer"], i, j, value]
        for x in layers
        for i, row in enumerate(x[kind])
        for j, value in enumerate(row)
        if i < j
    ]
    largest = max((abs(v) for table in tables for row in table for v in row if not math.isnan(v)), default=0.0)
    limit = max(0.25, largest)
    what = {
        "weights": ("Similarity of weights", "Cosine of all weights of two experts."),
        "outputs": (
            "Similarity of outputs",
            f"Cosine of what two experts make of the same token, mean of {report['similarity']['tokens']} tokens.",
        ),
    }
    title, note = what[kind]
    note += _of_all(layers)
    limits = (-limit, limit)
    return _maps(f"similar-{kind}", "alike", title, note, shown(layers), tables, rows, 2.2, None, "cosine", limits)


def shared(report: Mapping[str, Any]) -> Plot:
    """The shared experts' part of what a layer adds."""
    shares = [layer["share"] for layer in report["shared"]]
    note = "Norm of the shared experts' output over that and the norm of the routed ones', mean over tokens."
    return by_layer(report, "shared", "alike", "Shared experts' part of the output", note, {"share": shares})


def by_layer(
    report: Mapping[str, Any],
    name: str,
    section: str,
    title: str,
    note: str,
    lines: Lines,
    chance: Sequence[float] | None = None,
) -> Plot:
    """Values of every MoE layer as lines from 0 on; ``chance`` is dotted."""
    layers = report["layers"]
    figure, axes = plt.subplots(figsize=(WIDTH, 2.4 + (0.19 * len(lines) if len(lines) > 1 else 0)))
    for (label, values), look in zip(lines.items(), looks([True] * len(lines)), strict=True):
        axes.plot(layers, values, **look, markersize=5, label=label)
    if chance is not None:
        axes.plot(layers, chance, linestyle=":", color=FAINT)
    axes.set(xlabel="layer", ylabel=next(iter(lines)) if len(lines) == 1 else "")
    axes.set_ylim(0, 1.05 * max([*(v for values in lines.values() for v in values), *(chance or ()), 1e-9]))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if len(lines) > 1:
        legend(figure, list(lines))
    rows: list[list[Any]] = [["layer", *lines, *(["by chance"] if chance is not None else [])]]
    columns = [*lines.values(), *([chance] if chance is not None else [])]
    rows += [[layer, *(column[i] for column in columns)] for i, layer in enumerate(layers)]
    return finish(figure, name, section, title, note, rows)


def _maps(
    name: str,
    section: str,
    title: str,
    note: str,
    layers: Sequence[Mapping[str, Any]],
    tables: Sequence[Table],
    rows: list[list[Any]],
    height: float,
    names: Sequence[str] | None = None,
    label: str = "load ÷ mean load",
    limits: tuple[float, float] | None = None,
) -> Plot:
    """A heat map a layer, each ``height`` inches high."""
    figure, panels = plt.subplots(
        len(tables), 1, figsize=(WIDTH, (height + 0.25) * len(tables) + 0.95), sharex=True, squeeze=False
    )
    heat_map(figure, list(panels[:, 0]), tables, names, label, limits)
    for layer, axes in zip(layers, panels[:, 0], strict=True):
        axes.set_title(f"layer {layer['layer']}", fontsize=FONT_SIZE, loc="left")
        if names is None:
            axes.set(ylabel="expert")
    return finish(figure, name, section, title, note, rows)


def _relative(shares: Table) -> list[list[float]]:
    """Shares times the number of experts: 1 is balanced."""
    return [[share * len(row) for share in row] for row in shares]


def _ratio(value: float, expected: float) -> float:
    return value / expected if expected > 0 else math.nan


def _without_diagonal(table: Table) -> list[list[float]]:
    return [[math.nan if i == j else value for j, value in enumerate(row)] for i, row in enumerate(table)]


def _of_all(layers: Sequence[Any]) -> str:
    number = len(shown(layers))
    return "" if number == len(layers) else f" {number} of {len(layers)} layers; the CSV has all."
