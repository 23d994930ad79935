"""``zoo match``: the dense twin of a sparse model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Find the dense model of the same depth, width, attention and vocabulary that equals a sparse one in active\n"
        "parameters, total parameters or training FLOPs per token, within 1%. The width of its FFN is solved for."
    )
    parser.epilog = "example:\n  zoo match mixtral-8x7b --by active --out mixtral-dense.yaml"
    parser.add_argument("name", metavar="NAME", help="name from `zoo list`, YAML file, or checkpoint directory")
    parser.add_argument("--by", required=True, choices=("active", "total", "flops"), help="the quantity to match")
    parser.add_argument(
        "--sequence-length", type=int, default=4096, metavar="N", help="tokens of a training sequence (default 4096)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the twin as YAML that other commands take as NAME"
    )
    parser.add_argument("--json", action="store_true", help="print JSON with exact numbers")


def run(args: argparse.Namespace) -> int:
    from zoo.cli.text import columns, short
    from zoo.config import save_spec, to_dict
    from zoo.harness.match import DESCRIPTIONS, match, measure
    from zoo.registry import find_spec

    spec = find_spec(args.name)
    twin = match(spec, args.by, args.sequence_length)
    costs = {
        by: (measure(spec.model, by, args.sequence_length), measure(twin.model, by, args.sequence_length))
        for by in DESCRIPTIONS
    }
    if args.out:
        save_spec(twin, args.out)
    if args.json:
        quantities = {by: {"sparse": sparse, "dense": dense} for by, (sparse, dense) in costs.items()}
        result = {"spec": to_dict(twin), "sequence_length": args.sequence_length, "quantities": quantities}
        print(json.dumps(result, indent=2))
        return 0
    print(f"{twin.name} (family {twin.family}): intermediate_size = {twin.model.intermediate_size:,}\n")
    rows = [("", spec.name, twin.name, "difference")]
    for by, (sparse, dense) in costs.items():
        mark = " (matched)" if by == args.by else ""
        rows.append((DESCRIPTIONS[by] + mark, short(sparse), short(dense), f"{dense / sparse - 1:+z.2%}"))
    print(columns(rows))
    if args.out:
        print(f"\nwritten to {args.out}")
    return 0
