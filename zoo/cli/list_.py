"""``zoo list``: the models that ``configs/models`` describes, and the checkpoints that have a name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.encoder_decoder_config import AnySpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the models of the zoo: name, family, parameters, active parameters, published weights. Below them stand\n"
        "the checkpoints that are here to run under a name (`checkpoints/NAME`), with what they scored."
    )
    parser.epilog = "example:\n  zoo list --json"
    parser.add_argument("--json", action="store_true", help="print JSON with exact numbers")


def run(args: argparse.Namespace) -> int:
    from zoo.cli.text import columns
    from zoo.registry import all_names, checkpoints

    models = [_model(name) for name in all_names()]
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
    from zoo.registry import find_any_spec

    spec = find_any_spec(name)
    return {"name": name, "family": spec.family, **_sizes(spec), "source": spec.source}


def _sizes(spec: AnySpec) -> dict[str, int]:
    from zoo.accounting import count_parameters
    from zoo.encoder_decoder_accounting import count_stack_parameters
    from zoo.encoder_decoder_config import EncoderDecoderSpec

    if isinstance(spec, EncoderDecoderSpec):
        stacks = count_stack_parameters(spec.model)
        return {"total": stacks.total, "active": stacks.active}
    parameters = count_parameters(spec.model)
    return {"total": parameters.total, "active": parameters.active}


def _checkpoint(name: str, directory: Path) -> dict[str, Any]:
    """What is in ``directory``; scores only where the zoo released it."""
    from zoo.registry import RELEASE_FILE, find_any_spec, read_json

    spec = find_any_spec(directory)
    release = directory / RELEASE_FILE
    return {
        "name": name,
        "family": spec.family,
        **_sizes(spec),
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
