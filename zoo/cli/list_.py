"""``zoo list``: the models that ``configs/models`` describes."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "List the models of the zoo: name, family, parameters, active parameters, published weights."
    parser.epilog = "example:\n  zoo list --json"
    parser.add_argument("--json", action="store_true", help="print JSON with exact numbers")


def run(args: argparse.Namespace) -> int:
    from zoo.accounting import count_parameters
    from zoo.cli.text import columns, short
    from zoo.registry import find_spec, model_names

    specs = [find_spec(name) for name in model_names()]
    counts = [count_parameters(spec.model) for spec in specs]
    if args.json:
        models = [
            {"name": s.name, "family": s.family, "total": c.total, "active": c.active, "source": s.source}
            for s, c in zip(specs, counts, strict=True)
        ]
        print(json.dumps(models, indent=2))
        return 0
    rows = [("name", "family", "source", "total", "active")]
    rows += [
        (s.name, s.family or "-", s.source or "-", short(c.total), short(c.active))
        for s, c in zip(specs, counts, strict=True)
    ]
    print(columns(rows, left=3))
    return 0
