"""What ``zoo card`` prints of an encoder-decoder."""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.encoder_decoder_config import EncoderDecoderSpec

BLOCKS = (
    "norms",
    "self_attention",
    "cross_attention",
    "dense_ffn",
    "router",
    "routed_experts",
    "total",
    "active",
)


def show(spec: EncoderDecoderSpec, args: argparse.Namespace) -> None:
    """Print the card of ``spec`` in the form that the arguments of ``zoo card`` ask for.

    Raises:
        ValueError: they ask for a drawing.
    """
    from zoo.cli.text import columns
    from zoo.describe.markdown import table
    from zoo.encoder_decoder_accounting import stack_summary

    if args.svg:
        raise ValueError(f"--svg {args.svg}: only blocks of decoders are drawn; leave it out for {spec.name}")
    origin = {"family": spec.family, "source": spec.source, "reference": spec.reference}
    card = {"name": spec.name, **origin, **stack_summary(spec.model, args.sequence_length)}
    rows = [(key, value) for key, value in origin.items() if value]
    if args.json:
        print(json.dumps(card, indent=2))
    elif args.markdown:
        sizes = [("", "", "exactly"), *_counts(card), *((*cost, "") for cost in _costs(card))]
        parts = [f"# {spec.name}", table([("", ""), *rows], left=2), "## Sizes and costs", table(sizes)]
        print("\n\n".join([*parts, "## Parameters by layer", table(_layer_rows(card))]))
    else:
        tables = [columns(rows, left=2), columns(_counts(card)), columns(_costs(card)), columns(_layer_rows(card))]
        print("\n\n".join([spec.name, *tables]))


def _counts(card: dict[str, Any]) -> list[tuple[str, str, str]]:
    from zoo.cli.text import short

    parameters = card["parameters"]
    labels = {"total": "parameters", "active": "active"}
    return [(label, short(parameters[key]), f"{parameters[key]:,}") for key, label in labels.items()]


def _costs(card: dict[str, Any]) -> list[tuple[str, str]]:
    from zoo.cli.text import binary, short

    flops, cache, weights = card["forward_flops"], card["cache_bytes_per_token"], card["weight_bytes"]
    length = f"{flops['source_and_target_length']:,}"
    kept = f"{binary(cache['fp32'])} / {binary(cache['bf16'])}"
    return [
        (f"forward FLOPs of a source and a target of {length} tokens", short(flops["example"])),
        ("KV cache per target token, fp32 / bf16", kept),
        ("keys and values per source token, fp32 / bf16", kept),
        ("weights, fp32 / bf16", f"{binary(weights['fp32'])} / {binary(weights['bf16'])}"),
    ]


def _layer_rows(card: dict[str, Any]) -> list[list[str]]:
    """Parameters by layer and block; equal layers that follow each other share a row."""
    parameters, blank = card["parameters"], [""] * (len(BLOCKS) - 2)
    rows = [["layers", *BLOCKS], _row("embedding", parameters["embedding"], blank)]
    for stack in ("encoder", "decoder"):
        rows.append(_row(f"{stack} position bias", parameters["position_bias"], blank))
        for layer, group in groupby(enumerate(parameters[stack]), key=lambda item: item[1]):
            indices = [index for index, _ in group]
            places = str(indices[0]) if len(indices) == 1 else f"{indices[0]} to {indices[-1]}, each"
            rows.append([f"{stack} {places}", *(f"{layer[block]:,}" if layer[block] else "-" for block in BLOCKS)])
        rows.append(_row(f"{stack} final norm", parameters["final_norm"], blank))
    head = f"{parameters['lm_head']:,}" if parameters["lm_head"] else "tied"
    return [*rows, ["lm_head", *blank, head, head]]


def _row(label: str, count: int, blank: list[str]) -> list[str]:
    return [label, *blank, f"{count:,}", f"{count:,}"]
