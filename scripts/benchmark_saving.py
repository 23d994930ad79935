"""Time how long a sharded checkpoint keeps training from going on, written in the background or not.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 scripts/benchmark_saving.py

Rounds of equally many steps take turns, because absolute times on a shared machine drift: without a checkpoint, with
one that training waits for, and with one that is written meanwhile. Printed are medians over the rounds: after how long
the call that saves returns, and how much longer than one without a checkpoint a round is.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from zoo.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from zoo.model import Decoder
from zoo.parallel import init
from zoo.parallel.apply import parallelize
from zoo.parallel.checkpoint import Saver, optimizer_state, remove
from zoo.parallel.mesh import build_meshes
from zoo.parallel.plan import load_plan

MODES = ("none", "foreground", "background")
TIMEOUT = timedelta(minutes=5)


def build_training(width: int) -> tuple[Callable[[], None], Callable[[], dict[str, Any]]]:
    """(one optimizer step, what is saved) of a decoder with 8 experts, fully sharded."""
    config = ModelConfig(
        vocab_size=1024,
        hidden_size=width,
        num_layers=2,
        intermediate_size=2 * width,
        max_position_embeddings=128,
        norm_eps=1e-6,
        rope=RopeConfig(theta=10_000.0),
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=width // 4),
        moe=MoEConfig(num_experts=8, top_k=2, moe_intermediate_size=width, score_func="softmax", norm_topk_prob=True),
    )
    plan = load_plan("fsdp")
    with torch.device("meta"):
        model = Decoder(config)
    parallelize(model, build_meshes("cpu", plan.sizes(dist.get_world_size())), plan)
    init.initialize(model.to_empty(device="cpu"), seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    names = {parameter: name for name, parameter in model.named_parameters()}
    ids = torch.randint(config.vocab_size, (2, 65))

    def step() -> None:
        logits = model(ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def state() -> dict[str, Any]:
        return {"state_dict": model.state_dict(), "optimizer_states": [optimizer_state(optimizer, names)]}

    return step, state


def run_round(
    step: Callable[[], None], state: Callable[[], dict[str, Any]], saver: Saver | None, path: Path, steps: int
) -> tuple[float, float]:
    """(seconds until the call that saves returns, seconds until the last step is made)."""
    step()
    dist.barrier()
    begin = time.perf_counter()
    if saver is not None:
        saver.save(path, state())
    blocked = time.perf_counter() - begin
    for _ in range(steps):
        step()
    whole = time.perf_counter() - begin
    if saver is not None:
        saver.wait()
        if dist.get_rank() == 0:
            remove(path)
    return blocked, whole


@contextlib.contextmanager
def shared_directory() -> Iterator[Path]:
    """A temporary directory of all ranks."""
    with tempfile.TemporaryDirectory() as mine:
        chosen = [mine]
        dist.broadcast_object_list(chosen, src=0)
        yield Path(chosen[0])
        dist.barrier()


def held_bytes(checkpoint: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank saves."""
    tensors = [*checkpoint["state_dict"].values(), *checkpoint["optimizer_states"][0]["state"].values()]
    return sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors)


def main() -> None:
    """Run the rounds and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="hidden size of the model")
    parser.add_argument("--steps", type=int, default=15, help="steps of a round; more than fit into one save")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    step, state = build_training(args.width)
    savers = {mode: Saver(TIMEOUT, background=mode == "background") for mode in MODES[1:]}
    seconds: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    with shared_directory() as directory:
        # The first round is not counted: it makes the optimizer's state and the memory of the copy.
        for round_ in range(args.rounds + 1):
            for mode in MODES:
                times = run_round(step, state, savers.get(mode), directory / "checkpoint", args.steps)
                if round_:
                    seconds[mode].append(times)
    if dist.get_rank() == 0:
        print(json.dumps(report(seconds, args.steps, held_bytes(state()))))
    dist.destroy_process_group()


def report(seconds: dict[str, list[tuple[float, float]]], steps: int, held: int) -> dict[str, Any]:
    """Medians over the rounds, in milliseconds."""
    without = [whole for _, whole in seconds["none"]]

    def median(values: list[float]) -> float:
        return round(1000 * statistics.median(values), 1)

    return {
        "rank_megabytes": round(held / 1e6, 1),
        "step_ms": median([whole / steps for whole in without]),
        **{
            mode: {
                "blocked_ms": median([blocked for blocked, _ in seconds[mode]]),
                "longer_ms": median([whole - base for (_, whole), base in zip(seconds[mode], without, strict=True)]),
            }
            for mode in MODES[1:]
        },
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
