"""``zoo inspect``: what the routers of a checkpoint do with a text."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.model import Decoder
    from zoo.tokenizer import Tokenizer

EXAMPLE = """examples:
  zoo inspect facts-mixtral --data book.txt
  zoo inspect runs/tiny/final --data prose=data/prose code=data/code --against runs/older/final --out inspection
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What the routers of a sparse model do with a text: load of every expert, dead experts, entropy, z, experts\n"
        "chosen together, whether tokens keep their experts under noise and in other checkpoints, which tokens and\n"
        "which sets of data go to which experts, how alike experts are. What may be chance is tested, and not ranked.\n"
        "With --out as one HTML page, as JSON, and every figure as PNG and CSV."
    )
    parser.epilog = EXAMPLE
    parser.add_argument("source", metavar="CKPT", help="checkpoint directory, hub id, or name from `zoo list`")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="[NAME=]PATH",
        help="directories of `zoo data build` (their validation split), or .txt, .jsonl or .parquet files; several are "
        "compared with each other",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="CKPT",
        help="checkpoints of the same architecture, such as earlier ones of the run: do tokens keep their experts?",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write inspect.html, inspect.json and figures/ here")
    parser.add_argument("--json", action="store_true", help="print the report as JSON in place of a table")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N", help="of each of the data (default 16384)")
    parser.add_argument("--separator", metavar="TEXT", help="ends a document in .txt files; \\n and \\t are understood")
    parser.add_argument("--sequence-length", type=int, default=128, metavar="N", help="of a window (default 128)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="windows in one forward (default 16)")
    parser.add_argument(
        "--noise", type=float, default=0.1, metavar="X", help="on embeddings, relative to their size (default 0.1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of noise and permutations (default 0)")
    parser.add_argument("--dtype", default="float32", help="torch dtype of the weights, or auto (default float32)")
    parser.add_argument("--device", metavar="DEVICE", help="such as cuda; the GPU by default if there is one")


def run(args: argparse.Namespace) -> int:
    from zoo.inspect.inspection import Settings, check_sparse
    from zoo.inspect.report import inspect, to_json, write_inspection
    from zoo.inspect.text import read_text
    from zoo.weights.loading import load_with_tokenizer

    settings = Settings(args.sequence_length, args.batch_size, args.noise, args.seed)
    if args.tokens < 2:
        raise ValueError(f"--tokens {args.tokens}: give 2 or more")
    model, tokenizer = load_with_tokenizer(args.source, dtype=args.dtype, device=args.device, progress=True)
    check_sparse(model, args.source)
    separator = args.separator and args.separator.replace("\\n", "\n").replace("\\t", "\t")
    texts = [read_text(given, tokenizer, args.tokens, separator) for given in args.data]
    others: dict[str, Callable[[], Decoder]] = {
        other: partial(_load, other, tokenizer, args.dtype, args.device) for other in args.against
    }
    report = inspect(args.source, model, tokenizer, texts, settings, others)
    written = write_inspection(report, args.out) if args.out else []
    if args.json:
        print(to_json(report), end="")
        return 0
    print(_text(report))
    if written:
        print(f"\nwritten: {', '.join(map(str, written))}")
    return 0


def _load(source: str, tokenizer: Tokenizer, dtype: str, device: str | None) -> Decoder:
    """The model of another checkpoint, which must read the same tokens."""
    from zoo.weights.loading import load_with_tokenizer

    model, other = load_with_tokenizer(source, dtype=dtype, device=device)
    if other.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{source}: it has another tokenizer than the model; give a checkpoint of the same run")
    return model


def _text(report: Mapping[str, Any]) -> str:
    from zoo.cli.text import columns
    from zoo.inspect.contents import by_layer

    table: Sequence[Sequence[str]] = by_layer(report)
    return "\n".join([*report["headline"], "", columns(table)])
