"""``zoo upcycle``: a dense checkpoint as the beginning of a sparse model."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """examples:
  zoo upcycle checkpoints/llama --experts 8 --top-k 2 --out checkpoints/llama-8x
  zoo upcycle checkpoints/llama --experts 8 --granularity 4 --shared 1 --drop 0.5 --out checkpoints/llama-fine
  zoo upcycle checkpoints/llama --to my-sparse.yaml --out checkpoints/llama-sparse --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a sparse checkpoint whose experts are copies of a dense model's FFN, or of parts of it. With normalised\n"
        "weights of a token's experts its first forward equals the dense model's; how far it is from it is printed.\n"
        "`zoo fit` trains it on as any other checkpoint.\n\n"
        "With --experts, the FFN is cut into --granularity parts: --shared of them go into shared experts; there are\n"
        "--experts copies of each of the others, of which a token goes through --top-k. With --to, the sparse config\n"
        "is given; it may differ from the dense one in its moe block only."
    )
    parser.epilog = EXAMPLE
    parser.add_argument(
        "source", metavar="DENSE", help="zoo checkpoint or its name, directory in a published layout, or a hub id"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--to", metavar="CONFIG", help="sparse model: name from `zoo list` or YAML file")
    target.add_argument("--experts", type=int, metavar="N", help="derive the sparse config: so many copies")
    parser.add_argument("--top-k", type=int, metavar="K", help="of them for a token (default 2)")
    parser.add_argument("--granularity", type=int, metavar="G", help="parts of the dense FFN (default 1)")
    parser.add_argument("--shared", type=int, metavar="S", help="of them in shared experts (default 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint to make; it must not exist")
    change = parser.add_mutually_exclusive_group()
    change.add_argument(
        "--noise", type=float, default=0.0, metavar="X", help="noise on experts, in standard deviations of each matrix"
    )
    change.add_argument(
        "--drop", type=float, default=0.0, metavar="R", help="part of each expert's hidden units to draw anew"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of router, noise and drop (default 0)")
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare logits, for which both models are loaded in fp64"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from zoo.registry import find_spec
    from zoo.upcycle import Recipe, derive, upcycle
    from zoo.weights.loading import checkpoint_directory

    recipe = Recipe(noise=args.noise, drop=args.drop, seed=args.seed)
    numbers = {name: getattr(args, name) for name in ("top_k", "granularity", "shared")}
    given = {name: value for name, value in numbers.items() if value is not None}
    if args.to and given:
        flag = next(iter(given)).replace("_", "-")
        raise ValueError(f"--{flag}: belongs to --experts; {args.to} says itself how many experts there are")
    directory = checkpoint_directory(args.source)
    target = find_spec(args.to) if args.to else derive(find_spec(directory), experts=args.experts, **given)
    result = upcycle(directory, target, args.out, recipe, check=not args.no_check, progress=not args.json)
    print(result.as_json() if args.json else result.as_text())
    return 0
