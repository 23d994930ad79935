"""``zoo compare``: train and evaluate the models of a study, write a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.harness.study import Study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train the models of a study on the same tokens in the same order, evaluate each, and write a report as\n"
        "Markdown, HTML and JSON. What is finished in the directory of the study is not done again: a study that was\n"
        "stopped goes on with the same command."
    )
    parser.epilog = (
        "examples:\n  zoo compare configs/studies/quickstart.yaml --out runs/quickstart\n"
        "  zoo compare full/trivia_vs_superglue --dry-run"
    )
    parser.add_argument("study", metavar="STUDY", help="YAML file, or name of a study of the zoo such as quickstart")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the study (default runs/<name>)")
    parser.add_argument("--smoke", action="store_true", help="the study's smoke size: a check of a minute or two")
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="mirror of evaluation data sets, for a study that makes none"
    )
    parser.add_argument(
        "--text", nargs="+", metavar="SOURCE", help="real text to train on in place of the study's: files or hub ids"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="models trained side by side, each with an equal share of the cores (default: one a core; with a GPU 1)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: show every model's size, time and cost, and where every data set is read from",
    )
    parser.add_argument("--json", action="store_true", help="print the report (or the dry run) as JSON")


def run(args: argparse.Namespace) -> int:
    import json
    import shlex
    import sys
    import time
    from dataclasses import replace

    import torch

    from zoo.harness.compare import cores, run_study
    from zoo.harness.report import write_report
    from zoo.harness.study import load_study
    from zoo.harness.summary import summarise
    from zoo.harness.tasks import with_leaf_tasks
    from zoo.registry import configs_dir

    path = Path(args.study)
    if not path.suffix and not path.exists():
        path = configs_dir() / "studies" / f"{args.study}.yaml"
    study = load_study(path, args.smoke)
    if args.text:
        study = replace(study, data=replace(study.data, sources=tuple(args.text)))
    if args.dry_run:
        return _dry_run(study, args)
    out = args.out or Path("runs") / (f"{study.name}-smoke" if args.smoke else study.name)
    began = time.monotonic()

    def notify(message: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        # In one piece, as several threads have something to say.
        print(f"{minutes}:{seconds:02d}  {message}\n", end="", file=sys.stderr, flush=True)

    jobs = args.jobs or (1 if torch.cuda.is_available() else cores())
    runs = run_study(study, out, args.data_root, notify, jobs)
    notify("writing the report")
    report = summarise(with_leaf_tasks(study), runs, out, shlex.join(["zoo", *sys.argv[1:]]))
    written = write_report(report, out)
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print("\n".join(["", *report["headline"], "", *(str(path) for path in written)]))
    return 0


def _dry_run(study: Study, args: argparse.Namespace) -> int:
    import json
    import sys

    from zoo.cli.text import columns, short
    from zoo.harness.dry_run import dry_run

    plan = dry_run(study, args.data_root, lambda message: print(message, file=sys.stderr, flush=True))
    if args.json:
        print(json.dumps(plan, indent=2))
        return 0
    seeds, cluster = len(plan["seeds"]), study.cluster
    on = f", on {cluster.gpus} {cluster.gpu}" if cluster else ""
    print(f"{study.name}: {len(plan['models'])} models x {seeds} seeds, {short(plan['tokens'])} tokens each{on}\n")
    head = ["model", "parameters", "active", "training FLOPs"]
    rows = [[*head, "layout", "batch", "recompute", "memory", "step", "GPU hours", "cost"] if cluster else head]
    for model in plan["models"]:
        parameters = (short(model["total_parameters"]), short(model["active_parameters"]))
        row = [model["name"], *parameters, f"{model['training_flops']:.2e}"]
        if cluster:
            sizes = [f"{key}={n}" for key in ("tensor", "expert", "replicate") if (n := model["layout"][key]) > 1]
            layout = ",".join([model["layout"]["strategy"], *sizes])
            batch = f"{model['micro_batches']} x {model['micro_batch']}"
            memory, step = f"{model['memory_bytes'] / 1e9:.1f} GB", f"{model['step_seconds']:.1f} s"
            row += [
                layout,
                batch,
                model["layout"]["recompute"],
                memory,
                step,
                f"{model['gpu_hours']:,.0f}",
                f"${model['dollars']:,.0f}",
            ]
        rows.append(row)
    if cluster:
        hours, dollars = (sum(model[key] for model in plan["models"]) for key in ("gpu_hours", "dollars"))
        rows.append(["all", *[""] * 8, f"{hours:,.0f}", f"${dollars:,.0f}"])
    print(columns(rows))
    if cluster:
        print(f"\nof all seeds, at ${cluster.dollars_per_gpu_hour:g} a GPU hour; evaluation is not counted")
    pairs = [[first, "-", second, f"equal {by}" if by else ""] for first, second, by in plan["compare"]]
    if pairs:
        print("\ncompared:\n" + columns(pairs, left=4))
    sources = [[source["name"], source["from"]] for source in plan["sources"]]
    tasks = [[task["name"], task["data_set"], task["from"]] for task in plan["tasks"]]
    if sources:
        print("\ntraining text:\n" + columns(sources, left=2))
    print("\ntasks:\n" + columns(tasks, left=3))
    return 0
