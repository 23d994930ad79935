"""``zoo compare``: train and evaluate the models of a study, write a report."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train the models of a study on the same tokens in the same order, evaluate each, and write a report as\n"
        "Markdown, HTML and JSON. What is finished in the directory of the study is not done again: a study that was\n"
        "stopped goes on with the same command."
    )
    parser.epilog = "example:\n  zoo compare configs/studies/quickstart.yaml --out runs/quickstart"
    parser.add_argument("study", metavar="STUDY", help="YAML file, or name of a study of the zoo such as quickstart")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the study (default runs/<name>)")
    parser.add_argument("--smoke", action="store_true", help="the study's smoke size: a check of a minute or two")
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="mirror of evaluation data sets, for a study that makes none"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="models trained side by side, each with an equal share of the cores (default: one a core; with a GPU 1)",
    )
    parser.add_argument("--json", action="store_true", help="print the report's JSON in place of its headline")


def run(args: argparse.Namespace) -> int:
    import json
    import shlex
    import sys
    import time

    import torch

    from zoo.harness.compare import cores, run_study
    from zoo.harness.report import write_report
    from zoo.harness.study import load_study
    from zoo.harness.summary import summarise
    from zoo.registry import configs_dir

    path = Path(args.study)
    if not path.suffix and not path.exists():
        path = configs_dir() / "studies" / f"{args.study}.yaml"
    study = load_study(path, args.smoke)
    out = args.out or Path("runs") / (f"{study.name}-smoke" if args.smoke else study.name)
    began = time.monotonic()

    def notify(message: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        print(f"{minutes}:{seconds:02d}  {message}", file=sys.stderr, flush=True)

    jobs = args.jobs or (1 if torch.cuda.is_available() else cores())
    runs = run_study(study, out, args.data_root, notify, jobs)
    notify("writing the report")
    report = summarise(study, runs, out, shlex.join(["zoo", *sys.argv[1:]]))
    written = write_report(report, out)
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print("\n".join(["", *report["headline"], "", *(str(path) for path in written)]))
    return 0
