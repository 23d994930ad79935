"""``zoo data``: make token data and tokenizers out of text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.training.data.sources import Source
    from zoo.training.data.store import Manifest

_SOURCE_HELP = (
    ".txt, .jsonl or .parquet file, a local directory in hub layout, or a hub id; "
    "the last two may name a configuration: owner/name:config"
)
_BUILD_EXAMPLE = """examples:
  zoo data build --tokenizer tokenizer/ --out data/books --separator '\\n\\n' books.txt more.jsonl
  zoo data build --tokenizer tokenizer/ --out data/chats --instructions chats.jsonl
"""
_TRAIN_EXAMPLE = """example:
  zoo data train-tokenizer --vocab-size 4096 --out tokenizer/ books.txt more.jsonl
"""
_MAKE_EXAMPLE = """example:
  zoo data make phone_book --out data/phone_book --set entries=50000 seed=1
"""
_GENERATORS = ("facts", "phone_book", "shortest_path")
_INFO_EXAMPLE = """example:
  zoo data info data/books --verify
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define ``zoo data build | train-tokenizer | make | info``."""
    parser.description = "Make token data and tokenizers out of text files and hub data sets."
    parser.epilog = _BUILD_EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    build = _command(commands, "build", "tokenise documents into a data directory for zoo fit", _BUILD_EXAMPLE)
    build.add_argument("--tokenizer", required=True, metavar="PATH", help="tokenizer directory or file")
    _add_sources(build, "*")
    build.add_argument(
        "--instructions",
        action="append",
        default=[],
        metavar="FILE",
        help="in place of SOURCE: .jsonl with {messages: [{role, content}, ...]} or {prompt, completion} in a line, of "
        "which only the answers are learned; may be repeated",
    )
    build.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja that writes conversations, in place of the tokenizer's own",
    )
    build.add_argument("--out", required=True, type=Path, metavar="DIR", help="data directory to make")
    build.add_argument(
        "--validation-fraction", type=float, default=0.01, metavar="X", help="documents held out by hash (default 0.01)"
    )
    build.add_argument(
        "--validation",
        action="append",
        default=[],
        metavar="SOURCE",
        help="held-out source of its own, of the same kind; may be repeated",
    )
    build.add_argument("--overwrite", action="store_true", help="replace DIR if it is a data directory")
    build.add_argument("--json", action="store_true", help="print the manifest")

    train = _command(commands, "train-tokenizer", "train a sentencepiece tokenizer", _TRAIN_EXAMPLE)
    _add_sources(train, "+")
    train.add_argument("--vocab-size", required=True, type=int, metavar="V", help="number of pieces, bytes included")
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="tokenizer directory to make")
    train.add_argument("--json", action="store_true", help="print size and fingerprint as JSON")

    make = _command(commands, "make", "generate training text with the questions of a task", _MAKE_EXAMPLE)
    make.add_argument("generator", choices=_GENERATORS, help="what to generate")
    make.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of its config, such as seed=1")
    make.add_argument("--out", required=True, type=Path, metavar="DIR", help="train.jsonl, and hub/ for --data-root")
    make.add_argument("--json", action="store_true", help="print the config")

    info = _command(commands, "info", "show what a data directory holds", _INFO_EXAMPLE)
    info.add_argument("directory", type=Path, metavar="DIR", help="data directory")
    info.add_argument("--verify", action="store_true", help="read every file and compare it with its SHA-256")
    info.add_argument("--json", action="store_true", help="print the manifest")


def run(args: argparse.Namespace) -> int:
    """Run the chosen command."""
    commands = {"build": _build, "train-tokenizer": _train_tokenizer, "make": _make, "info": _info}
    return commands[args.data_command](args)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, example: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_sources(parser: argparse.ArgumentParser, number: str) -> None:
    parser.add_argument("sources", nargs=number, metavar="SOURCE", help=_SOURCE_HELP)
    parser.add_argument("--text-column", default="text", metavar="NAME", help="field or column with the text")
    parser.add_argument(
        "--separator",
        metavar="TEXT",
        help="what ends a document in .txt files; \\n and \\t are understood (default: a file is one document)",
    )
    parser.add_argument("--hub-split", default="train", metavar="NAME", help="split of hub data sets (default train)")


def _sources(locations: list[str], args: argparse.Namespace) -> list[Source]:
    from zoo.training.data.sources import Source

    separator = args.separator
    if separator is not None:
        separator = separator.replace("\\n", "\n").replace("\\t", "\t")
        if not separator:
            raise ValueError("--separator '': give the text that ends a document, such as '\\n\\n'")
    return [Source(location, args.text_column, separator, args.hub_split) for location in locations]


def _build(args: argparse.Namespace) -> int:
    from zoo.tokenizer import Tokenizer
    from zoo.training.data.builder import build
    from zoo.training.data.instructions import Instructions

    if bool(args.sources) == bool(args.instructions):
        raise ValueError("give sources of text or --instructions: one of the two, as they are trained on differently")
    tokenizer = Tokenizer.load(args.tokenizer)
    sources: list[Source] | list[Instructions]
    validation: list[Source] | list[Instructions]
    if args.instructions:
        sources, validation = ([Instructions(file) for file in files] for files in (args.instructions, args.validation))
        if args.chat_template:
            tokenizer = tokenizer.with_chat_template(args.chat_template.read_text(encoding="utf-8"))
    else:
        if args.chat_template:
            raise ValueError(f"--chat-template {args.chat_template}: text is not written by a template; drop it")
        sources, validation = _sources(args.sources, args), _sources(args.validation, args)
    manifest = build(
        sources,
        tokenizer,
        args.out,
        validation_fraction=args.validation_fraction,
        validation_sources=validation,
        overwrite=args.overwrite,
    )
    _print_manifest(args.out, manifest, args.json)
    return 0


def _train_tokenizer(args: argparse.Namespace) -> int:
    from zoo.training.data.tokenizer_training import train_tokenizer

    tokenizer = train_tokenizer(_sources(args.sources, args), args.vocab_size, args.out)
    if args.json:
        print(
            json.dumps(
                {"directory": str(args.out), "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
            )
        )
    else:
        print(f"{args.out}: {tokenizer.vocab_size} pieces, fingerprint {tokenizer.fingerprint[:12]}")
    return 0


def _make(args: argparse.Namespace) -> int:
    from zoo.harness.suites.generators import generate

    config = generate(args.generator, args.set, args.out)
    print(json.dumps(config) if args.json else f"{args.generator} in {args.out}: {json.dumps(config)}")
    return 0


def _info(args: argparse.Namespace) -> int:
    from zoo.training.data.store import SPLITS, TokenSplit, read_manifest, verify

    manifest = read_manifest(args.directory)
    if args.verify:
        verify(args.directory)
    else:
        for name in SPLITS:
            TokenSplit(args.directory, name)
    _print_manifest(args.directory, manifest, args.json)
    if args.verify:
        print("every file is as it was built", file=sys.stderr)
    return 0


def _print_manifest(directory: Path, manifest: Manifest, as_json: bool) -> None:
    if as_json:
        print(manifest.to_json(), end="")
        return
    print(f"{directory}: vocabulary {manifest.vocab_size:,}, tokens stored as {manifest.dtype}")
    for name, split in manifest.splits.items():
        answers = "" if split.answers is None else f" {split.answers:>16,} of them answers"
        print(f"  {name:<10} {split.documents:>12,} documents {split.tokens:>16,} tokens{answers}")
    for source in manifest.sources:
        print(f"  from {source.name} ({source.split}): {source.documents:,} documents, {source.bytes:,} bytes")
