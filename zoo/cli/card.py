"""``zoo card``: what a model costs, from its config alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
from itertools import groupby
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sizes and costs of a model, from its config alone: parameters in total, active for one token and by layer,\n"
        "FLOPs per token, bytes of weights and of the KV cache. Nothing is built or downloaded.\n\n"
        "Active parameters are all but the routed experts that a token does not go through; both vocabulary\n"
        "matrices count. FLOPs are those of matrix products (a multiply-add is two), attention averaged over a causal\n"
        "sequence; training is three times the forward pass."
    )
    parser.epilog = "example:\n  zoo card mixtral-8x7b --sequence-length 8192"
    parser.add_argument("name", metavar="NAME", help="name from `zoo list`, YAML file, or checkpoint directory")
    parser.add_argument(
        "--sequence-length", type=int, default=4096, metavar="N", help="tokens of a sequence, for FLOPs (default 4096)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON with exact numbers")


def run(args: argparse.Namespace) -> int:
    from zoo.accounting import summary
    from zoo.registry import find_spec

    spec = find_spec(args.name)
    card = {
        "name": spec.name,
        "family": spec.family,
        "source": spec.source,
        "reference": spec.reference,
        "published": dataclasses.asdict(spec.published) if spec.published else None,
        **summary(spec.model, args.sequence_length),
    }
    print(json.dumps(card, indent=2) if args.json else _text(card))
    return 0


def _text(card: dict[str, Any]) -> str:
    from zoo.cli.text import binary, columns, short

    parameters, flops = card["parameters"], card["flops_per_token"]
    cache, weights = card["cache_bytes_per_token"], card["weight_bytes"]
    origin = [(key, card[key]) for key in ("family", "source", "reference") if card[key]]
    counts = [
        (label, short(parameters[key]), f"{parameters[key]:,}")
        for label, key in (
            ("parameters", "total"),
            ("active", "active"),
            ("active without input embedding", "active_without_embedding"),
        )
    ]
    at = f"at {flops['sequence_length']:,} tokens"
    costs = [
        (f"forward FLOPs per token {at}", short(flops["forward"])),
        (f"training FLOPs per token {at}", short(flops["training"])),
        ("KV cache per token, fp32 / bf16", f"{binary(cache['fp32'])} / {binary(cache['bf16'])}"),
        ("weights, fp32 / bf16", f"{binary(weights['fp32'])} / {binary(weights['bf16'])}"),
    ]
    if card["published"]:
        origin.append(("published", _published(**card["published"])))
    tables = [columns(origin, left=2), columns(counts), columns(costs), columns(_layer_rows(parameters))]
    return "\n\n".join([card["name"], *tables])


def _published(total: str, active: str, input_embedding: bool, cut: bool) -> str:
    """The authors' sizes, and how they counted and rounded where that differs from the rows below."""
    how = ["without input embedding"] * (not input_embedding) + ["digits cut off"] * cut
    return f"{total} total, {active} active" + (f" ({', '.join(how)})" if how else "")


def _layer_rows(parameters: dict[str, Any]) -> list[list[str]]:
    """Parameters by layer and block; equal layers that follow each other share a row."""
    blocks = ["norms", "mixer", "dense_ffn", "router", "routed_experts", "shared_experts", "total", "active"]
    rows = [["layers", *blocks], ["embedding", *[""] * 6, *[f"{parameters['embedding']:,}"] * 2]]
    layers = list(enumerate(parameters["layers"]))
    for layer, group in groupby(layers, key=lambda item: item[1]):
        indices = [index for index, _ in group]
        label = str(indices[0]) if len(indices) == 1 else f"{indices[0]} to {indices[-1]}, each"
        rows.append([label, *[f"{layer[block]:,}" if layer[block] else "-" for block in blocks]])
    rows.append(["final norm", *[""] * 6, *[f"{parameters['final_norm']:,}"] * 2])
    head = f"{parameters['lm_head']:,}" if parameters["lm_head"] else "tied"
    return [*rows, ["lm_head", *[""] * 6, head, head]]
