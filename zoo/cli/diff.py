"""``zoo diff``: how two architectures differ."""

from __future__ import annotations

import argparse
import json

EXAMPLE = """examples:
  zoo diff mixtral-8x7b deepseek-v3
  zoo diff qwen3-30b-a3b my-model.yaml --markdown
  zoo diff llama-3-8b checkpoints/upcycled --all --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print how two architectures differ, from their configs alone: a row for every property in which they do,\n"
        "as papers name it, and what each model costs. A dash is what a model does not have."
    )
    parser.epilog = EXAMPLE
    for name in "AB":
        parser.add_argument(name.lower(), metavar=name, help="name from `zoo list`, YAML file, or checkpoint directory")
    parser.add_argument("--all", action="store_true", help="show the properties that they share as well")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print JSON with exact numbers")


def run(args: argparse.Namespace) -> int:
    from zoo.describe.diff import as_markdown, as_text, diff
    from zoo.registry import find_spec

    a, b = find_spec(args.a), find_spec(args.b)
    pairs = [pair for pair in diff(a.model, b.model) if args.all or pair.differs]
    names = (a.name, b.name)
    if args.json:
        rows = [{"section": p.section, "label": p.label, "a": p.a, "b": p.b} for p in pairs]
        print(json.dumps({"a": a.name, "b": b.name, "rows": rows}, indent=2))
    elif not pairs:
        print(f"{a.name} and {b.name} are the same architecture")
    else:
        print(as_markdown(names, pairs) if args.markdown else as_text(names, pairs))
    return 0
