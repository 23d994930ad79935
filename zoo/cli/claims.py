"""``zoo claims``: claims of the literature as experiments, with verdicts."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Put claims about mixtures of experts to the test: train the arms of each with several seeds and say whether\n"
        "it holds here, does not, or cannot be decided at this size. Without a name, list the claims. What is trained\n"
        "in the directory is not trained again, and arms that several claims share are trained once: a run that was\n"
        "stopped goes on with the same command."
    )
    parser.epilog = (
        "examples:\n"
        "  zoo claims\n"
        "  zoo claims balancing --out runs/claims\n"
        "  zoo claims all --text general=wikitext.txt domain=stories.txt"
    )
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="a name of the list, a YAML file, or `all`")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/claims"), metavar="DIR", help="of all claims (default runs/claims)"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="NAME=SOURCE",
        help="a file or hub id to read in place of what the claims name as that text; several are read one after the "
        "other",
    )
    parser.add_argument("--smoke", action="store_true", help="each claim's smoke size: a check of a minute or two")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="arms trained side by side (default: one a core; with a GPU 1)"
    )
    parser.add_argument("--json", action="store_true", help="print what was found, or the list, as JSON")
    parser.add_argument(
        "--write-docs", action="store_true", help="put what was found on the board in docs/claims.md of the checkout"
    )


def run(args: argparse.Namespace) -> int:
    import json
    import os
    import sys
    import time

    # Of the trainings: measuring memory would make torch write of what it cannot see.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if args.write_docs and args.smoke:
        raise ValueError("--write-docs with --smoke: a smoke size shows nothing; leave one of them out")

    from zoo.claims.board import RESULTS, keep, kept, result, seen, write_docs
    from zoo.claims.claim import load_claim
    from zoo.cli.text import columns
    from zoo.registry import configs_dir

    folder = configs_dir() / "studies" / "claims"
    paths = _paths(args.claims, folder)
    if not paths:
        return _list(folder, kept(args.out / RESULTS), args.json)

    import torch

    from zoo.claims.run import plan, run_claim
    from zoo.harness.compare import cores

    claims = [load_claim(path, args.smoke, _sources(args.text)) for path in paths]
    began = time.monotonic()

    def notify(message: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        print(f"{minutes}:{seconds:02d}  {message}\n", end="", file=sys.stderr, flush=True)

    jobs = args.jobs or (1 if torch.cuda.is_available() else cores())
    results = []
    for claim in claims:
        measures = run_claim(claim, args.out, notify, jobs)
        results.append(result(claim, measures, plan(claim, args.out.absolute())))
        keep(results[-1], args.out)
    if args.write_docs:
        print(f"written: {write_docs(configs_dir().parent / 'docs', results)}", file=sys.stderr)
    if args.json:
        print(json.dumps(results, indent=1))
        return 0
    for found in results:
        lines = [[finding["outcome"], seen(finding)] for finding in (*found["given"], *found["expect"])]
        print(f"\n{found['claim']}: {found['says']}\n{found['verdict']}\n{columns(lines, left=2)}")
    return 0


def _paths(names: list[str], folder: Path) -> list[Path]:
    """Files of the claims that are named."""
    from zoo.claims.claim import claim_files

    known = {path.stem: path for path in claim_files(folder)}
    paths = []
    for name in names:
        if name == "all":
            paths += list(known.values())
        elif name in known:
            paths.append(known[name])
        elif Path(name).suffix in (".yaml", ".yml"):
            paths.append(Path(name))
        else:
            raise ValueError(f"claim {name!r}: use a YAML file, all, or one of {', '.join(known)}")
    return list(dict.fromkeys(paths))


def _sources(texts: list[str]) -> dict[str, list[str]]:
    """Name of a text → its sources."""
    sources: dict[str, list[str]] = {}
    name = ""
    for text in texts:
        before, equals, source = text.partition("=")
        if equals:
            name = before
        elif not name:
            raise ValueError(f"--text {text}: give NAME=SOURCE, such as general=wikitext.txt")
        sources.setdefault(name, []).append(source if equals else text)
    return sources


def _list(folder: Path, results: list[dict[str, object]], as_json: bool) -> int:
    import json

    from zoo.claims.claim import claim_files, load_claim
    from zoo.cli.text import columns

    verdicts = {str(found["claim"]): str(found["verdict"]) for found in results}
    rows = []
    for path in claim_files(folder):
        claim = load_claim(path)
        rows.append({"claim": claim.name, "says": claim.says, "verdict": verdicts.get(claim.name)})
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print(
            columns([[str(row["claim"]), str(row["verdict"] or "not run"), str(row["says"])] for row in rows], left=3)
        )
    return 0
