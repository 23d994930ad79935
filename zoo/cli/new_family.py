"""``zoo new-family``: the beginning of a family, from the config.json of a published model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.scaffold.proposal import Proposal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read a published config.json as the nearest family of the zoo would, say which field of ours follows which\n"
        "of the file, what the file does not say and what the zoo cannot express yet, and write the files to start\n"
        "from: the family's module, its model and its parity test. Nothing is overwritten."
    )
    parser.epilog = "example:\n  zoo new-family qwen4_moe --from-hf Qwen4-30B-A3B/config.json"
    parser.add_argument("name", metavar="NAME", help="of the new module in zoo/families")
    parser.add_argument("--from-hf", type=Path, required=True, metavar="CONFIG.json", help="as published with weights")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write there (default: this checkout)")
    parser.add_argument("--json", action="store_true", help="print the proposal as JSON")


def run(args: argparse.Namespace) -> int:
    from zoo.config_reading import to_dict
    from zoo.registry import read_json
    from zoo.scaffold.proposal import propose
    from zoo.scaffold.stub import checkout, write_stubs

    hf = read_json(args.from_hf)
    proposal = propose(hf)
    root = args.out or checkout()
    written = [str(path.relative_to(root)) for path in write_stubs(args.name, hf, proposal, root)]
    if args.json:
        found = dataclasses.asdict(proposal) | {"config": to_dict(proposal.config)}
        found["notes"].pop("asked")
        print(json.dumps(found | {"written": written}, indent=2))
    else:
        print(_text(args.name, proposal, written))
    return 0


def _text(name: str, proposal: Proposal, written: list[str]) -> str:
    from zoo.cli.text import columns

    notes, base = proposal.notes, proposal.family
    parts = [f"{name}: read as {base}, the nearest family"]
    values = _values(proposal)
    rows = [(f"  {path}", values[path], proposal.origins[path]) for path in values if path in proposal.origins]
    parts.append("From the file:\n" + columns(rows, left=3))
    if proposal.assumed:
        rows = [(f"  {path}", _shown(value), "") for path, value in proposal.assumed.items()]
        parts.append(f"Not in the file, as in {base}; compare with the paper:\n" + columns(rows, left=3))
    if notes.unread:
        known = {key: ", ".join(families[:3]) for key, families in proposal.known_to.items()}
        rows = [
            (f"  {key}", _shown(value), known[key] and f"known to {known[key]}") for key, value in notes.unread.items()
        ]
        parts.append(f"What {base} cannot express:\n" + columns(rows, left=3))
    else:
        parts.append(f"Nothing in the file is unknown to {base}.")
    parts.append("Written:\n" + "\n".join(f"  {path}" for path in written))
    parts.append(
        f"Next: add {name} to zoo/families/__init__.py, run tests/parity/test_{name}.py, and go on with\n"
        "docs/adding-a-family.md."
    )
    return "\n\n".join(parts)


def _values(proposal: Proposal) -> dict[str, str]:
    """Path → value of every field of the proposed config."""
    found: dict[str, str] = {}

    def walk(block: Any, prefix: str) -> None:
        for field in dataclasses.fields(block):
            value = getattr(block, field.name)
            if dataclasses.is_dataclass(value):
                walk(value, f"{prefix}{field.name}.")
            else:
                found[prefix + field.name] = _shown(value)

    walk(proposal.config, "")
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"
