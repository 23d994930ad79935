"""What an inspection says in tables, and how its numbers are to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.harness.contents import Section, Table
from zoo.harness.headline import percent
from zoo.inspect.inspection import MOST_TYPES


def sections(report: Mapping[str, Any]) -> list[Section]:
    """All of the page but headline, figures and reading; a section may have no table."""
    header, *rows = by_layer(report)
    data = _domains(report) if report["domain_specialisation"] else []
    return [
        Section("balance", "Balance", "Who gets the tokens.", [Table("By MoE layer", header, rows)]),
        Section("stability", "Stability", "Whether tokens keep their experts.", _stability(report)),
        Section("tokens", "Which tokens go to an expert", _tokens_note(report), _specialists(report)),
        *data,
        Section("together", "Experts that are chosen together", _TOGETHER, _together(report)),
        Section("alike", "How alike experts are", _alike_note(report), []),
    ]


_TOGETHER = (
    "Tokens that go to both of two experts, over as many as the experts' loads alone would give "
    "(quasi-independence: a uniform choice has 1 everywhere)."
)

_READING = (
    "Load is the share of assignments, of which a token makes {top_k} in a layer with {num_experts} experts; an equal "
    "share is 1. Load entropy is over its maximum: 1 is uniform. Effective experts are its exponential: so many equal "
    "shares are as uneven. Routing entropy is that of one token's scores, 1 where the router has no preference; z is "
    "the mean of logsumexp(logits)², which the z-loss lowers. An expert with less than {dead:g} of an equal share is "
    "called dead. Overlap is Jaccard's: experts in both sets over experts in either; by chance is the overlap with "
    "the experts of a token half a batch away. Experts are compared by number, so checkpoints of different runs agree "
    "by chance only. PMI is log2 of how many times more often than on average a token's occurrences go to the expert; "
    "of tokens, only those are listed whose counts are above chance, by Fisher's exact test corrected by Holm for all "
    "layers, token types and experts. This test and that of pairs of experts take occurrences as independent: a token "
    "whose occurrences share their context may owe its experts to that, and a frequent token may decide for a pair. "
    "Which data uses which experts is tested by dealing out whole windows at random {permutations}; it speaks about "
    "other windows of the same texts. The cosine of weights compares hidden units by their order, so that only copies "
    "are alike in it; that of outputs compares what experts make of the same tokens. MTP modules are left out."
)


def reading(report: Mapping[str, Any]) -> str:
    """How the numbers are to be read."""
    domains = report["domain_specialisation"]
    times = f"{domains['permutations']:,} times" if domains else "many times"
    return _READING.format(
        top_k=report["top_k"],
        num_experts=report["num_experts"],
        dead=report["settings"]["dead_below"],
        permutations=times,
    )


def provenance(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What it takes to repeat the inspection."""
    settings = report["settings"]
    data = [
        f"{entry['name']}: the first {entry['tokens']:,} tokens of {entry['source']}, {entry['documents']:,} documents"
        for entry in report["data"]
    ]
    experts = f"{report['top_k']} of {report['num_experts']} experts a token"
    shared = f", {report['num_shared_experts']} shared" if report["num_shared_experts"] else ""
    return [
        ("model", report["model"]),
        ("experts", f"{experts}{shared}, in layers {', '.join(map(str, report['layers']))}"),
        ("data", "; ".join(data)),
        ("windows", f"of {settings['sequence_length']} tokens; attention stays within documents"),
        ("noise", f"{settings['noise']:g} times the norm of each embedding, in a random direction"),
        ("seed", str(settings["seed"])),
    ]


def by_layer(report: Mapping[str, Any]) -> list[list[str]]:
    """The balance of each MoE layer under a row of headings."""
    loads = ["highest load", "lowest load", "load entropy", "effective experts"]
    rows = [["layer", *loads, "dead", "routing entropy", "z", "dropped"]]
    for layer in report["balance"]:
        load = [share * len(layer["load"]) for share in layer["load"]]
        dead = "?" if layer["dead"] is None else str(len(layer["dead"]))
        rows.append(
            [
                str(layer["layer"]),
                *(f"{value:.2f}" for value in (max(load), min(load))),
                f"{layer['entropy']:.3f}",
                f"{layer['effective_experts']:.2f}",
                dead,
                f"{layer['routing_entropy']:.2f}",
                f"{layer['z']:.3g}",
                "–" if layer["dropped"] is None else percent(layer["dropped"]),
            ]
        )
    return rows


def _stability(report: Mapping[str, Any]) -> list[Table]:
    header = ["layer", "all experts kept", "overlap", "overlap by chance"]
    cases = {f"Noise of {report['settings']['noise']:g} on embeddings": report["stability"]["noise"]}
    cases |= {f"Against {name}": layers for name, layers in report["stability"]["checkpoints"].items()}
    return [
        Table(
            title,
            header,
            [
                [str(layer["layer"]), percent(layer["equal"]), f"{layer['jaccard']:.2f}", f"{layer['by_chance']:.2f}"]
                for layer in layers
            ],
        )
        for title, layers in cases.items()
    ]


def _tokens_note(report: Mapping[str, Any]) -> str:
    found = report["token_specialisation"]
    return (
        f"Of {found['types']:,} token types with {found['minimum_occurrences']} or more occurrences (at most the "
        f"{MOST_TYPES} most frequent), those that go to an expert more often than chance, at most eight an expert, the "
        "furthest above chance first: occurrences that go there, of all, and PMI in bits."
    )


def _specialists(report: Mapping[str, Any]) -> list[Table]:
    """One table a layer, one row an expert that has any; at most four layers, which the JSON is not limited to."""
    tables = []
    for layer in shown(report["token_specialisation"]["layers"]):
        rows = [[str(expert), *map(_spelled, found)] for expert, found in enumerate(layer["experts"]) if found]
        width = max(map(len, rows), default=0)
        if rows:
            header = ["expert", *(f"token type {i}" for i in range(1, width))]
            tables.append(Table(f"Layer {layer['layer']}", header, [row + [""] * (width - len(row)) for row in rows]))
    return tables


def _spelled(token: Mapping[str, Any]) -> str:
    piece = token["token"] if token["token"].isprintable() else ascii(token["token"])
    return f"{piece} {token['count']}/{token['occurrences']} ({token['pmi']:+.1f})"


def _domains(report: Mapping[str, Any]) -> list[Section]:
    found = report["domain_specialisation"]
    parts = [f"{count} of {entry['name']}" for count, entry in zip(found["windows"], report["data"], strict=True)]
    header = ["layer", "bits", "bits by chance", "Holm p"]
    rows = [
        [str(x["layer"]), f"{x['information']:.4f}", f"{x['by_chance']:.4f}", f"{x['p_holm']:.2g}"]
        for x in found["layers"]
    ]
    table = Table("What an assignment's expert tells about its data", header, rows)
    return [Section("data", "Which data goes to an expert", f"Windows: {', '.join(parts)}.", [table])]


def _together(report: Mapping[str, Any]) -> list[Table]:
    """The pairs furthest from what loads explain, of those that the test tells apart; at most four layers."""
    tables = []
    for layer in shown(report["co_activation"] or []):
        pairs = [(pair["experts"], pair["p_holm"]) for pair in layer["told_apart"]]
        times = {(a, b): layer["together"][a][b] / layer["expected"][a][b] for (a, b), _ in pairs}
        ordered = sorted(pairs, key=lambda pair: times[tuple(pair[0])])
        rows = [
            [f"{a} and {b}", f"{layer['together'][a][b]:,}", f"{layer['expected'][a][b]:,.0f}", f"{times[a, b]:.2f}"]
            for (a, b), _ in [*reversed(ordered[-5:]), *reversed(ordered[:-5][:5])]
        ]
        if rows:
            title = f"Layer {layer['layer']}: {len(pairs)} pairs told apart, the most and the least attracted"
            tables.append(Table(title, ["experts", "tokens", "expected", "ratio"], rows))
    return tables


def _alike_note(report: Mapping[str, Any]) -> str:
    tokens = report["similarity"]["tokens"]
    return f"Cosines of the weights of two experts, and of what they make of the same {tokens} tokens."


def shown(layers: Sequence[Any]) -> list[Any]:
    """At most four of the layers, from the first to the last."""
    if len(layers) <= 4:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / 3)] for i in range(4)]
