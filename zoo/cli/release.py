"""``zoo release``: a model of a finished study becomes a checkpoint of the zoo."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """example:
  zoo compare configs/studies/zoo.yaml --out runs/zoo
  zoo release runs/zoo mixtral --to checkpoints/facts-mixtral
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a checkpoint of the zoo from a model of a finished study: weights, tokenizer, config, and a model card\n"
        "with data, training and scores. The scores are those of the weights as they are stored, on every item of the\n"
        "study. Nothing is written if it would exceed 20 MB, or if the data has no known licence."
    )
    parser.epilog = EXAMPLE
    parser.add_argument("study", type=Path, metavar="STUDY_DIR", help="directory of a finished `zoo compare`")
    parser.add_argument("model", metavar="MODEL", help="name of a model of the study")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="directory to make, such as checkpoints/NAME"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which training of the model (default 0)")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights: bfloat16 (default) or float32")
    parser.add_argument("--json", action="store_true", help="print the checkpoint's release.json")


def run(args: argparse.Namespace) -> int:
    import json
    import sys

    from zoo.harness.release import release

    record = release(
        args.study,
        args.model,
        args.to,
        seed=args.seed,
        dtype=args.dtype,
        notify=lambda message: print(message, file=sys.stderr, flush=True),
    )
    print(json.dumps(record, indent=1) if args.json else f"written to {args.to}: its card is {args.to / 'README.md'}")
    return 0
