"""``zoo export``: a zoo checkpoint goes back into the layout that its family is published in."""

from __future__ import annotations

import argparse

EXAMPLE = """example:
  zoo export checkpoints/mixtral-tiny exported/mixtral-tiny
  python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('exported/mixtral-tiny')"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Convert a zoo checkpoint into config.json and safetensors that transformers loads."
    parser.epilog = EXAMPLE
    parser.add_argument("source", metavar="CKPT", help="zoo checkpoint directory")
    parser.add_argument("out", metavar="HFDIR", help="directory to make; it must not exist")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from zoo.weights.convert import export_checkpoint

    result = export_checkpoint(args.source, args.out, progress=not args.json)
    print(result.as_json() if args.json else result.as_text())
    return 0
