"""``zoo eval``: score a checkpoint on lm-eval tasks."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Score a checkpoint on lm-eval tasks. Data sets come from the hub, or from a local mirror in the hub's layout\n"
        "(--data-root), which needs no network. Beside lm-eval's own tasks, those of this project are known."
    )
    parser.epilog = (
        "example:\n  zoo eval checkpoints/mixtral-tiny --tasks triviaqa,boolq,copa,cb,sglue_rte,wic,wsc \\\n"
        "    --data-root mirror --output results/mixtral-tiny"
    )
    parser.add_argument("source", metavar="CKPT", help="checkpoint directory, hub id, or name from `zoo list`")
    parser.add_argument("--tasks", required=True, metavar="A,B", help="names of tasks, groups or tags")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="mirror of data sets: DIR/aps/super_glue/…")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder with further task YAMLs")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="requests in one forward (default 8)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="solved examples before each question")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write lm-eval's results and samples here")
    parser.add_argument("--seed", type=int, metavar="N", help="of examples and sampling; lm-eval's own by default")
    parser.add_argument("--dtype", default="float32", help="torch dtype of the weights, or auto (default float32)")
    parser.add_argument("--device", metavar="DEVICE", help="such as cuda; the GPU by default if there is one")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON in place of a table")


def run(args: argparse.Namespace) -> int:
    import json

    from rich.console import Console

    from zoo.harness.runner import evaluate, results_table, summary_rows
    from zoo.weights.loading import load_with_tokenizer

    model, tokenizer = load_with_tokenizer(args.source, dtype=args.dtype, device=args.device, progress=True)
    results = evaluate(
        model,
        tokenizer,
        [task.strip() for task in args.tasks.split(",") if task.strip()],
        data_root=args.data_root,
        limit=args.limit,
        include_path=args.include_path,
        batch_size=args.batch_size,
        num_fewshot=args.num_fewshot,
        output=args.output,
        seed=args.seed,
        name=args.source,
    )
    if args.json:
        print(json.dumps(summary_rows(results), indent=2))
        return 0
    Console().print(results_table(results))
    truncated = results["config"]["truncated_requests"]
    if truncated:
        length = model.config.max_position_embeddings
        print(f"{truncated:,} requests were longer than the model's {length:,} positions and lost their beginning")
    if args.output is not None:
        print(f"written to {args.output}")
    return 0
