"""``zoo bench``: our times beside those of peers and of the limit."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.bench.rows import Options

SUBJECTS = {
    "layer": "one MoE layer, forward and backward",
    "experts": "the ways of computing experts, each beside the one taken by itself",
    "train": "a training step of whole models, and what a token costs when one size varies",
    "generate": "greedy decoding",
    "load": "reading a sharded checkpoint, with peak memory, and the time to a first token",
    "loss": "cross-entropy over a vocabulary",
    "eval": "log-likelihoods of lm-eval tasks",
    "attention": "one token against a cache",
}


def subjects() -> dict[str, str]:
    """Those that can be measured, with a line on each."""
    return {name: line for name, line in SUBJECTS.items() if importlib.util.find_spec(f"zoo.bench.{name}")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = subjects()
    width = max(map(len, known)) + 2
    lines = "\n".join(f"  {name:<{width}}{line}" for name, line in known.items())
    parser.description = (
        "Time ours beside peers (transformers; litgpt where it is installed) and beside the limit: a dense model with\n"
        "as many active FLOPs, or reading the bytes that are needed. All ways compute the same on the same weights in\n"
        "one process, which is checked, and take turns in every round, so that ratios hold on a machine whose speed\n"
        f"drifts.\n\nsubjects:\n{lines}\n  {'all':<{width}}each of these"
    )
    parser.epilog = (
        "examples:\n"
        "  zoo bench train --case 'vocabulary 2,048' --threads 1 2\n"
        "  zoo bench load --checkpoint-size 200000000 --json\n"
        "  zoo bench all --data-root mirror --write-docs"
    )
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help="what to measure; `all` for everything")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N", help="of torch (default 1)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of which medians are taken (default 7)")
    parser.add_argument(
        "--case", nargs="+", default=[], metavar="PART", help="only cases whose names have one of these in them"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help="float32 (default) or bfloat16")
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="for eval: local mirror of data sets, as of `zoo eval`"
    )
    parser.add_argument(
        "--checkpoint-size",
        type=int,
        default=10**9,
        metavar="BYTES",
        help="for load: of how many bytes about (default 1e9)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="for load: where that is kept (default ~/.cache/moe-zoo/bench)"
    )
    parser.add_argument("--json", action="store_true", help="print machine, versions and the times of all rounds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep results there, a JSON file for each subject")
    parser.add_argument(
        "--write-docs", action="store_true", help="write docs/performance.md, without subjects from kept results alone"
    )


def run(args: argparse.Namespace) -> int:
    # Set before torch is imported; measuring memory would make it write of what it cannot see.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    chosen, options = _chosen(args), _options(args)

    from zoo.bench import document
    from zoo.bench.results import as_json
    from zoo.bench.run import measure
    from zoo.bench.tables import caption, text_table

    docs = document.docs_dir() if args.write_docs else None
    folders = [folder for folder in (args.out, docs and docs / document.FOLDER) if folder]
    measured = measure(chosen, options, args.threads, folders, show=sys.stderr.isatty()) if chosen else []
    if args.json:
        print(json.dumps([as_json(results) for results in measured], indent=1))
    else:
        for results in measured:
            for one in results.runs:
                print(f"{results.bench}: {caption(one)}\n\n{text_table(one.rows)}\n")
    if docs:
        document.write(docs)
        print(f"written: {docs / document.DOCUMENT}", file=sys.stderr)
    return 0


def _chosen(args: argparse.Namespace) -> list[str]:
    known = subjects()
    for name in args.subjects:
        if name not in known and name != "all":
            raise ValueError(f"subject {name!r}: use one of {', '.join(known)}, all")
    if not args.subjects and not args.write_docs:
        raise ValueError(f"no subject is given: use one or more of {', '.join(known)}, all")
    return [name for name in known if name in args.subjects or "all" in args.subjects]


def _options(args: argparse.Namespace) -> Options:
    import torch

    from zoo.bench.rows import Options

    least = {"threads": min(args.threads), "rounds": args.rounds, "checkpoint-size": args.checkpoint_size}
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"--{name} {value}: give a positive number")
    if args.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype {args.dtype}: use float32 or bfloat16")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise ValueError(f"--device {args.device}: give a torch device, such as cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: there is no CUDA device here; use cpu")
    cache = {} if args.cache is None else {"cache": args.cache}
    return Options(
        rounds=args.rounds,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        cases=tuple(args.case),
        checkpoint_bytes=args.checkpoint_size,
        data_root=args.data_root,
        **cache,
    )
