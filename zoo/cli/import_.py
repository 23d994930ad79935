"""``zoo import``: a published checkpoint becomes a zoo checkpoint."""

from __future__ import annotations

import argparse

EXAMPLE = """example:
  zoo import deepseek-ai/DeepSeek-V2-Lite checkpoints/deepseek-v2-lite
  zoo import ./Mixtral-8x7B-v0.1 checkpoints/mixtral-8x7b --dtype float32 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Convert a published checkpoint (config.json and safetensors) into a zoo checkpoint."
    parser.epilog = EXAMPLE
    parser.add_argument("source", metavar="SRC", help="directory in the published layout, or a hub id")
    parser.add_argument("out", metavar="OUT", help="zoo checkpoint directory to make; it must not exist")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the parameters (default: as in the source, and bfloat16 for quantised ones)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    import torch

    from zoo.weights.convert import import_checkpoint

    dtype = getattr(torch, args.dtype) if args.dtype else None
    result = import_checkpoint(args.source, args.out, dtype=dtype, progress=not args.json)
    print(result.as_json() if args.json else result.as_text())
    return 0
