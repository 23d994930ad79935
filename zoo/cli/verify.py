"""``zoo verify``: whether a checkpoint directory is whole, without loading it."""

from __future__ import annotations

import argparse
import json

EXAMPLE = """examples:
  zoo verify checkpoints/mixtral-8x7b
  zoo verify ./Mixtral-8x7B-v0.1 --json
  zoo verify checkpoints/mixtral-8x7b --record
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check a zoo checkpoint or a directory in a published layout without loading it: the index against the files,\n"
        "names, shapes and dtypes against the config, the byte ranges in every file, paths that leave the directory,\n"
        "and hashes where they are recorded (SHA256SUMS, or by the hub's client). Memory does not grow with the\n"
        "weights. Exit code 0: whole; 1: findings, one a line; 2: no such directory."
    )
    parser.epilog = EXAMPLE
    parser.add_argument("directory", metavar="DIR", help="zoo checkpoint, or directory in a published layout")
    parser.add_argument(
        "--record", action="store_true", help="if it is whole, write SHA256SUMS beside the weights for later checks"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    from zoo.weights.verify import record_hashes, verify

    report = verify(args.directory, progress=not args.json)
    if args.record and not report.findings:
        record_hashes(report, progress=not args.json)
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
    elif report.findings:
        print("\n".join(map(str, report.findings)))
    else:
        print(_summary(report.as_dict()))
    return 1 if report.findings else 0


def _summary(report: dict[str, object]) -> str:
    from zoo.cli.text import binary

    files, size = report["files"], report["bytes"]
    assert isinstance(files, list) and isinstance(size, int)
    weights = f"{len(files)} file{'s' if len(files) > 1 else ''}, {report['tensors']:,} tensors, {binary(size)}"
    hashes = f"{report['hashed']} with a recorded hash" if report["hashed"] else "no recorded hashes"
    return f"{report['directory']}: whole: {report['name']} ({report['family'] or 'in no family'}), {weights}, {hashes}"
