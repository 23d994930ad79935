"""``zoo card``: what a model costs, from its config alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.config import ModelConfig

EXAMPLE = """examples:
  zoo card mixtral-8x7b --sequence-length 8192
  zoo card deepseek-v3 --markdown > deepseek-v3.md
  zoo card deepseek-v3 --svg deepseek-v3.svg
"""

BLOCKS = ("norms", "mixer", "dense_ffn", "router", "routed_experts", "shared_experts")
SUMS = ("total", "active")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sizes and costs of a model, from its config alone: parameters in total, active for one token and by layer,\n"
        "FLOPs per token, bytes of weights and of the KV cache. Nothing is built or downloaded.\n\n"
        "Active parameters are all but the routed experts that a token does not go through; both vocabulary\n"
        "matrices count. FLOPs are those of matrix products (a multiply-add is two), attention averaged over a causal\n"
        "sequence; training is three times the forward pass. MTP modules are counted apart from all but training."
    )
    parser.epilog = EXAMPLE
    parser.add_argument("name", metavar="NAME", help="name from `zoo list`, YAML file, or checkpoint directory")
    parser.add_argument(
        "--sequence-length", type=int, default=4096, metavar="N", help="tokens of a sequence, for FLOPs (default 4096)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON with exact numbers")
    form.add_argument("--markdown", action="store_true", help="print Markdown, with a drawing of one block")
    parser.add_argument(
        "--svg", type=Path, metavar="FILE", help="write the drawing of one block to an SVG file as well"
    )


def run(args: argparse.Namespace) -> int:
    from zoo.accounting import summary
    from zoo.encoder_decoder_config import EncoderDecoderSpec
    from zoo.registry import find_any_spec

    spec = find_any_spec(args.name)
    if isinstance(spec, EncoderDecoderSpec):
        from zoo.cli.encoder_decoder_card import show

        show(spec, args)
        return 0
    card = {
        "name": spec.name,
        "family": spec.family,
        "source": spec.source,
        "reference": spec.reference,
        "published": dataclasses.asdict(spec.published) if spec.published else None,
        **summary(spec.model, args.sequence_length),
    }
    if args.svg:
        from zoo.describe.block import block_drawing
        from zoo.describe.svg import svg_drawing
        from zoo.files import write_text

        write_text(args.svg, svg_drawing(block_drawing(spec.model), spec.name))
    if args.json:
        print(json.dumps(card, indent=2))
    else:
        print(_markdown(card, spec.model) if args.markdown else _text(card))
    return 0


def _text(card: dict[str, Any]) -> str:
    from zoo.cli.text import columns

    tables = [columns(_origin(card), left=2), columns(_counts(card)), columns(_costs(card)), columns(_layer_rows(card))]
    return "\n\n".join([card["name"], *tables])


def _markdown(card: dict[str, Any], config: ModelConfig) -> str:
    from zoo.describe.block import block_drawing
    from zoo.describe.markdown import table
    from zoo.describe.text_drawing import text_drawing

    sizes = [(label, short, exact) for label, short, exact in _counts(card)]
    sizes += [(label, cost, "") for label, cost in _costs(card)]
    parts = [
        f"# {card['name']}",
        table([("", ""), *_origin(card)], left=2),
        "## One block\n\n```text\n" + text_drawing(block_drawing(config)) + "\n```",
        "## Sizes and costs",
        table([("", "", "exactly"), *sizes]),
        "## Parameters by layer",
        table(_layer_rows(card)),
    ]
    return "\n\n".join(parts)


def _origin(card: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(key, card[key]) for key in ("family", "source", "reference") if card[key]]
    return rows + ([("published", _published(**card["published"]))] if card["published"] else [])


def _counts(card: dict[str, Any]) -> list[tuple[str, str, str]]:
    from zoo.cli.text import short

    labels = {"total": "parameters", "active": "active", "active_without_embedding": "active without input embedding"}
    parameters = card["parameters"]
    counts = [(label, parameters[key]) for key, label in labels.items()]
    if parameters["mtp"]:
        counts.append(("of MTP modules, not counted above", sum(module["total"] for module in parameters["mtp"])))
    return [(label, short(count), f"{count:,}") for label, count in counts]


def _costs(card: dict[str, Any]) -> list[tuple[str, str]]:
    from zoo.cli.text import binary, short

    flops, cache, weights = card["flops_per_token"], card["cache_bytes_per_token"], card["weight_bytes"]
    at = f"at {flops['sequence_length']:,} tokens"
    state = card["state_elements"]
    return [
        (f"forward FLOPs per token {at}", short(flops["forward"])),
        (f"training FLOPs per token {at}", short(flops["training"])),
        ("KV cache per token, fp32 / bf16", f"{binary(cache['fp32'])} / {binary(cache['bf16'])}"),
        *([("recurrent state per sequence", f"{state:,} numbers")] if state else []),
        ("weights, fp32 / bf16", f"{binary(weights['fp32'])} / {binary(weights['bf16'])}"),
    ]


def _published(total: str, active: str | None, input_embedding: bool, cut: bool) -> str:
    """The authors' sizes, and how they counted and rounded where that differs from the rows below."""
    if active is None:
        return f"{total} total"
    how = ["without input embedding"] * (not input_embedding) + ["digits cut off"] * cut
    return f"{total} total, {active} active" + (f" ({', '.join(how)})" if how else "")


def _layer_rows(card: dict[str, Any]) -> list[list[str]]:
    """Parameters by layer and block; equal layers that follow each other share a row."""
    parameters = card["parameters"]
    blocks = (*BLOCKS, "mtp_input") if parameters["mtp"] else BLOCKS

    def whole(label: str, count: int | str) -> list[str]:
        """A row of something that is no layer."""
        shown = count if isinstance(count, str) else f"{count:,}"
        return [label, *[""] * len(blocks), *[shown] * len(SUMS)]

    rows = [["layers", *blocks, *SUMS], whole("embedding", parameters["embedding"])]
    named = [*enumerate(parameters["layers"]), *((f"MTP {k}", m) for k, m in enumerate(parameters["mtp"], start=1))]
    for (layer, _), group in groupby(named, key=lambda item: (item[1], isinstance(item[0], str))):
        names = [name for name, _ in group]
        label = str(names[0]) if len(names) == 1 else f"{names[0]} to {names[-1]}, each"
        rows.append([label, *[f"{layer[block]:,}" if layer[block] else "-" for block in (*blocks, *SUMS)]])
    rows.append(whole("final norm", parameters["final_norm"]))
    return [*rows, whole("lm_head", parameters["lm_head"] or "tied")]
