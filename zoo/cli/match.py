"""``zoo match``: the dense twin of a sparse model, and sparse variants of a dense one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.config import ModelSpec
    from zoo.harness.match_time import TimedMatch

BY = ("active", "total", "flops", "time")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "With --by, find the dense model of the same depth, width, attention and vocabulary that equals a sparse\n"
        "one in active parameters, total parameters, training FLOPs per token, or the time that a training step\n"
        "takes on this machine, within 1%. The width of its FFN is solved for.\n\n"
        "With --experts, find the sparse variants of a dense model that have as many active parameters, within 1%,\n"
        "for every combination of the numbers given. The width of an expert is solved for. Of granularity * experts\n"
        "- shared routed experts a token goes through granularity * active - shared, and through the shared ones\n"
        "(arXiv 2401.06066, section 3)."
    )
    parser.epilog = (
        "examples:\n"
        "  zoo match mixtral-8x7b --by active --out mixtral-dense.yaml\n"
        "  zoo match mixtral-tiny --by time --batch-size 8 --sequence-length 256\n"
        "  zoo match llama-3-8b --experts 8,16,32 --granularity 1,4 --shared 0,1 --out variants/"
    )
    parser.add_argument("name", metavar="NAME", help="name from `zoo list`, YAML file, or checkpoint directory")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--by", choices=BY, help="find the dense twin of NAME, equal in this")
    what.add_argument("--experts", type=_integers, metavar="N,...", help="find variants of NAME with so many experts")
    parser.add_argument(
        "--active", type=_integers, default=(2,), metavar="K,...", help="of them for a token (default 2)"
    )
    parser.add_argument(
        "--granularity", type=_integers, default=(1,), metavar="M,...", help="parts of each expert (default 1)"
    )
    parser.add_argument("--shared", type=_integers, default=(0,), metavar="S,...", help="shared parts (default 0)")
    parser.add_argument(
        "--sequence-length", type=int, default=4096, metavar="N", help="tokens of a training sequence (default 4096)"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="B", help="sequences of a timed step (default 1)")
    out = "write YAML that other commands take as NAME: a file, or with --experts a directory"
    parser.add_argument("--out", type=Path, metavar="PATH", help=out)
    parser.add_argument("--json", action="store_true", help="print JSON with exact numbers")


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers such as 8 or 8,16,32") from None


def run(args: argparse.Namespace) -> int:
    return _variants(args) if args.experts else _twin(args)


def _twin(args: argparse.Namespace) -> int:
    from zoo.cli.text import columns, short
    from zoo.config import save_spec
    from zoo.config_reading import to_dict
    from zoo.harness.match import DESCRIPTIONS, match, measure
    from zoo.registry import find_spec

    spec = find_spec(args.name)
    timed: TimedMatch | None = None
    if args.by == "time":
        from zoo.harness.match_time import match_time

        timed = match_time(spec, args.sequence_length, args.batch_size, progress=True)
        twin = timed.spec
    else:
        twin = match(spec, args.by, args.sequence_length)
    costs = {
        by: (measure(spec.model, by, args.sequence_length), measure(twin.model, by, args.sequence_length))
        for by in DESCRIPTIONS
    }
    if args.out:
        save_spec(twin, args.out)
    if args.json:
        quantities = {by: {"sparse": sparse, "dense": dense} for by, (sparse, dense) in costs.items()}
        result = {"spec": to_dict(twin), "sequence_length": args.sequence_length, "quantities": quantities}
        print(json.dumps(result | ({"time": timed.as_dict()} if timed else {}), indent=2))
        return 0
    print(f"{_title(twin)}: intermediate_size = {twin.model.intermediate_size:,}\n")
    rows = [("", spec.name, twin.name, "difference")]
    for by, (sparse, dense) in costs.items():
        mark = " (matched)" if by == args.by else ""
        rows.append((DESCRIPTIONS[by] + mark, short(sparse), short(dense), f"{dense / sparse - 1:+z.2%}"))
    if timed:
        times = (f"{1000 * timed.sparse_seconds:,.1f} ms", f"{1000 * timed.dense_seconds:,.1f} ms")
        rows.append(("time of a training step (matched)", *times, f"{timed.ratio - 1:+z.2%}"))
    print(columns(rows))
    if timed:
        print(f"\ndense / sparse, step by step in turn: {timed.ratio:.3f} ({timed.low:.3f} to {timed.high:.3f})")
    if args.out:
        print(f"\nwritten to {args.out}")
    return 0


def _variants(args: argparse.Namespace) -> int:
    from itertools import product

    from zoo.cli.text import columns, short
    from zoo.config import save_spec
    from zoo.config_reading import to_dict
    from zoo.harness.match import Sparsity, measure, sparsify
    from zoo.registry import find_spec

    spec = find_spec(args.name)
    dials = product(args.experts, args.active, args.granularity, args.shared)
    variants = [sparsify(spec, Sparsity(experts=n, active=k, granularity=m, shared=s)) for n, k, m, s in dials]
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for variant in variants:
            save_spec(variant, args.out / f"{variant.name}.yaml")
    if args.json:
        print(json.dumps([to_dict(variant) for variant in variants], indent=2))
        return 0
    active = measure(spec.model, "active", 1)
    rows: list[tuple[str, ...]] = [("", "routed", "top-k", "shared", "expert width", "active", "difference", "total")]
    rows.append((spec.name, "", "", "", f"{spec.model.intermediate_size:,} (FFN)", short(active), "", short(active)))
    for variant in variants:
        moe, own = variant.model.moe, measure(variant.model, "active", 1)
        assert moe is not None
        counts = (moe.num_experts, moe.top_k, moe.num_shared_experts, moe.moe_intermediate_size)
        total = short(measure(variant.model, "total", 1))
        rows.append((variant.name, *(f"{n:,}" for n in counts), short(own), f"{own / active - 1:+z.2%}", total))
    print(columns(rows))
    if args.out:
        print(f"\nwritten to {args.out}")
    return 0


def _title(spec: ModelSpec) -> str:
    return f"{spec.name} ({f'family {spec.family}' if spec.family else 'in no published layout'})"
