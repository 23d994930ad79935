"""``zoo plan``: how to spread a model over GPUs, without having any."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.config import ModelConfig
    from zoo.parallel.estimate import Estimate, Workload
    from zoo.parallel.planner import Rejected, Result, Sizes

DEFAULT_LENGTH = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "How to train a model on a number of GPUs, from its config alone: every layout of data, tensor and expert\n"
        "parallelism, with the memory it takes, the bytes it sends and the time of a step on each GPU. Those that fit\n"
        "are ranked, fastest first; for those that do not, the reason is given. Nothing is run: the time is that of\n"
        "a cost model, which docs/plan.md states and compares with published runs. No pipeline parallelism is planned\n"
        "and MTP modules are left out: they need room besides."
    )
    parser.epilog = (
        "examples:\n  zoo plan mixtral-8x7b --gpus 64 --gpu h100\n"
        "  zoo plan deepseek-v3 --gpus 2048 --gpu h800 --layout ep_fsdp,expert=64,replicate=4"
    )
    parser.add_argument("name", metavar="NAME", help="name from `zoo list`, YAML file, or checkpoint directory")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    parser.add_argument("--gpu", default="h100", metavar="KIND", help="a100, h100, h800, h200 or b200 (default h100)")
    parser.add_argument(
        "--sequence-length", type=int, metavar="S", help=f"tokens of a sequence (default {DEFAULT_LENGTH}, or fewer)"
    )
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument("--global-batch", type=int, metavar="B", help="sequences of a step (default one a GPU)")
    batch.add_argument("--tokens-per-step", type=int, metavar="T", help="tokens of a step, instead of sequences")
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), default="bf16-mixed")
    parser.add_argument(
        "--efficiency", type=float, metavar="X", help="share of the peak that matrix products reach (default 0.5)"
    )
    parser.add_argument(
        "--layout", metavar="PLAN[,SIZE=N...]", help="only this plan, with sizes tensor, expert, replicate (default 1)"
    )
    parser.add_argument("--show", type=int, default=8, metavar="N", help="layouts to show (default 8)")
    parser.add_argument("--json", action="store_true", help="print all layouts as JSON: bytes, seconds")


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from tqdm import tqdm

    from zoo.parallel.planner import search
    from zoo.registry import find_spec

    config = find_spec(args.name).model
    name = f"{args.name} without its MTP modules" if config.mtp_depth else args.name
    work = _workload(args, replace(config, mtp_depth=0))

    def track(sizes: list[Sizes], plan: str) -> Any:
        return tqdm(sizes, desc=plan, unit="layout", leave=False, disable=None)

    result = search(work, _layout(args.layout) if args.layout else None, track)
    print(json.dumps(_json(name, work, result), indent=2) if args.json else _text(name, args.show, work, result))
    return 0 if result.fitting else 1


def _workload(args: argparse.Namespace, config: ModelConfig) -> Workload:
    from zoo.parallel.estimate import EFFICIENCY, Workload
    from zoo.parallel.hardware import find_gpu

    length = args.sequence_length
    if length is None:
        length = min(DEFAULT_LENGTH, config.max_position_embeddings)
    batch = args.gpus if args.global_batch is None else args.global_batch
    if args.tokens_per_step is not None:
        if length < 1 or args.tokens_per_step % length:
            raise ValueError(
                f"--tokens-per-step {args.tokens_per_step}: give a multiple of the sequence length, {length}"
            )
        batch = args.tokens_per_step // length
    return Workload(
        config=config,
        gpu=find_gpu(args.gpu),
        gpus=args.gpus,
        sequence_length=length,
        global_batch=batch,
        precision=args.precision,
        efficiency=EFFICIENCY if args.efficiency is None else args.efficiency,
    )


def _layout(text: str) -> tuple[str, Sizes]:
    """``PLAN[,SIZE=N...]`` → (plan, sizes)."""
    plan, *parts = text.split(",")
    sizes = {}
    for part in parts:
        name, _, value = part.partition("=")
        if name not in ("tensor", "expert", "replicate") or not value.isdecimal():
            raise ValueError(f"--layout {text}: {part!r} is none of tensor=N, expert=N, replicate=N")
        sizes[name] = int(value)
    return plan, sizes


def _json(name: str, work: Workload, result: Result) -> dict[str, Any]:
    from dataclasses import asdict

    from zoo.parallel.estimate import gpu_hours_per_trillion, utilisation

    fitting = [
        {
            "plan": one.layout.plan,
            "sizes": asdict(one.layout.sizes),
            **asdict(one.setting),
            "memory_bytes": {**one.memory, "total": one.total_memory},
            "exchange_hops": one.hops,
            "sent_bytes_per_step": one.sent,
            "sent_between_nodes_per_step": one.between_nodes,
            "seconds": {**one.seconds, "step": one.step_seconds},
            "tokens_per_second_per_gpu": work.tokens / one.step_seconds / work.gpus,
            "model_flops_utilisation": utilisation(work, one),
            "gpu_hours_per_trillion_tokens": gpu_hours_per_trillion(work, one),
        }
        for one in result.fitting
    ]
    return {
        "name": name,
        "gpu": asdict(work.gpu),
        "gpus": work.gpus,
        "sequence_length": work.sequence_length,
        "global_batch": work.global_batch,
        "tokens_per_step": work.tokens,
        "precision": work.precision,
        "efficiency": work.efficiency,
        "fitting": fitting,
        "rejected": [asdict(one) for one in result.rejected],
    }


def _text(name: str, show: int, work: Workload, result: Result) -> str:
    parts = [
        f"{name} on {work.gpus:,} {work.gpu.name}: {work.global_batch:,} sequences of {work.sequence_length:,} "
        f"tokens a step, {work.precision}, {work.efficiency:.0%} of the peak"
    ]
    if result.fitting:
        parts += [_ranking(work, result.fitting[:show]), _details(result.fitting[0])]
    if len(result.fitting) > show:
        parts.insert(2, f"and {len(result.fitting) - show:,} slower ones that fit")
    if result.rejected:
        parts.append(_reasons(result.rejected))
    return "\n\n".join(parts)


def _ranking(work: Workload, estimates: Sequence[Estimate]) -> str:
    from zoo.cli.text import columns
    from zoo.parallel.estimate import gpu_hours_per_trillion, utilisation

    head = ["plan", "replicate", "shard", "tensor", "expert", "hops", "batch", "recompute", "reshard", "reduce"]
    rows = [[*head, "memory", "step", "tokens/s/GPU", "MFU", "GPU h/T tokens"]]
    for one in estimates:
        sizes, setting = one.layout.sizes, one.setting
        mesh = (sizes.data_replicate, sizes.data_shard, sizes.tensor, sizes.expert)
        rows.append(
            [
                one.layout.plan,
                *map(str, mesh),
                str(one.hops or "-"),
                f"{setting.micro_batches} x {setting.micro_batch}",
                setting.recompute,
                "yes" if setting.reshard else "no",
                "each" if setting.reduce_each else "last",
                f"{one.total_memory / 1e9:.1f} GB",
                _seconds(one.step_seconds),
                f"{work.tokens / one.step_seconds / work.gpus:,.0f}",
                f"{utilisation(work, one):.1%}",
                f"{gpu_hours_per_trillion(work, one):,.0f}",
            ]
        )
    return columns(rows)


def _details(one: Estimate) -> str:
    """What each GPU holds, sends and waits for in the fastest layout."""
    from zoo.cli.text import columns

    sent = [
        (kind.replace("_", " "), _bytes(size), f"{_bytes(one.between_nodes.get(kind, 0))} between nodes")
        for kind, size in one.sent.items()
    ]
    tables: list[tuple[str, Sequence[Sequence[str]]]] = [
        ("memory at its fullest moment", [(part, _bytes(size)) for part, size in one.memory.items()]),
        ("sent in a step", sent),
        ("time of a step", [(_TIME[part], _seconds(time)) for part, time in one.seconds.items()]),
    ]
    blocks = [f"{title}, each GPU of the first:\n{columns(rows)}" for title, rows in tables if rows]
    return "\n\n".join(blocks)


_TIME = {
    "compute": "computation",
    "exposed": "communication that nothing hides",
    "hidden": "(communication beside the computation)",
    "waiting": "waiting for it",
    "optimizer": "optimizer",
}


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{1000 * time:.1f} ms"


def _reasons(rejected: Sequence[Rejected]) -> str:
    """How many layouts cannot be used for each kind of reason, and the nearest of each."""
    lines = ["layouts that cannot be used:"]
    for kind in ("plan", "sizes", "batch", "memory"):
        group = [one for one in rejected if one.kind == kind]
        if group:
            nearest = min(group, key=lambda one: one.needed or 0)
            layout = ",".join([nearest.plan, *(f"{name}={size}" for name, size in nearest.sizes.items())])
            lines.append(f"  {len(group):,} for their {kind}, such as {layout}: {nearest.reason}")
    return "\n".join(lines)
