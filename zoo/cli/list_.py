"""``zoo list``: the models that ``configs/models`` describes, and the checkpoints that have a name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the models of the zoo: name, family, parameters, active parameters, published weights. Below them stand\n"
        "the checkpoints that are here to run under a name (`checkpoints/NAME`), with what they scored."
    )
    parser.epilog = "example:\n  zoo list --json"
    parser.add_argument("--json", action="store_true", help="print JSON with exact numbers")


def run(args: argparse.Namespace) -> int:
    from zoo.cli.text import columns
    from zoo.registry import checkpoints, model_names

    models = [_model(name) for name in model_names()]
    trained = [_checkpoint(name, directory) for name, directory in checkpoints().items()]
    if args.json:
        print(json.dumps({"models": models, "checkpoints": trained}, indent=2))
        return 0
    print(columns([("name", "family", "source", "total", "active"), *map(_model_row, models)], left=3))
    if trained:
        header = ("checkpoint", "family", "total", "active", "size", "knowledge", "comprehension")
        print("\n" + columns([header, *map(_checkpoint_row, trained)], left=2))
    return 0


def _model(name: str) -> dict[str, Any]:
    from zoo.accounting import count_parameters
    from zoo.registry import find_spec

    spec = find_spec(name)
    parameters = count_parameters(spec.model)
    return {
        "name": name,
        "family": spec.family,
        "total": parameters.total,
        "active": parameters.active,
        "source": spec.source,
    }


def _checkpoint(name: str, directory: Path) -> dict[str, Any]:
    """What is in ``directory``; scores only where the zoo released it."""
    from zoo.accounting import count_parameters
    from zoo.registry import RELEASE_FILE, find_spec, read_json

    spec = find_spec(directory)
    parameters = count_parameters(spec.model)
    release = directory / RELEASE_FILE
    return {
        "name": name,
        "family": spec.family,
        "total": parameters.total,
        "active": parameters.active,
        "directory": str(directory),
        "bytes": sum(path.stat().st_size for path in directory.iterdir() if path.is_file()),
        "scores": read_json(release)["scores"] if release.is_file() else None,
    }


def _model_row(model: Mapping[str, Any]) -> tuple[str, ...]:
    from zoo.cli.text import short

    names = (model["name"], model["family"] or "-", model["source"] or "-")
    return (*names, short(model["total"]), short(model["active"]))


def _checkpoint_row(checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    from zoo.cli.text import short

    scores = checkpoint["scores"]
    shown = (f"{100 * scores[skill]['value']:.1f}%" if scores else "-" for skill in ("knowledge", "comprehension"))
    sizes = (short(checkpoint["total"]), short(checkpoint["active"]), f"{checkpoint['bytes'] / 1e6:.1f} MB")
    return (checkpoint["name"], checkpoint["family"] or "-", *sizes, *shown)
