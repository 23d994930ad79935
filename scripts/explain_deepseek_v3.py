"""What each difference between ``zoo.parallel`` and DeepSeek-V3's own training costs, by the planner's cost model.

    python scripts/explain_deepseek_v3.py

From the fastest layout of ``zoo plan`` for their 2,048 H800 and batch, one assumption after the other is replaced with
what they did (arXiv 2412.19437, sections 3.2 to 3.4), down to the published cost. What is left then is the share of the
peak that their matrix products reached: the planner assumes the same for all.
"""

from __future__ import annotations

import math
from dataclasses import replace

from zoo.accounting import attention_flops
from zoo.cli.text import columns
from zoo.parallel.estimate import Estimate, Workload, rank_flops
from zoo.parallel.footprint import resolve_units
from zoo.parallel.hardware import find_gpu
from zoo.parallel.mesh import MeshSizes
from zoo.parallel.plan import load_plan
from zoo.parallel.planner import search
from zoo.registry import find_spec

PUBLISHED = 180_000
"""GPU hours for a trillion tokens (arXiv 2412.19437, section 1)."""
STAGES, STEP_TOKENS, LENGTH = 16, 62_914_560, 4096
FP8_OVER_BF16 = 2.0
"""Rates of dense products on H800."""


def flops_per_token(work: Workload) -> dict[str, float]:
    """FLOPs that one token takes in training, by kind."""
    config = work.config
    mla, moe = config.mla, config.moe
    assert mla is not None and mla.q_lora_rank is not None and moe is not None
    units, _ = resolve_units(config, load_plan("ep_fsdp"), work.precision)
    whole = rank_flops(config, units, MeshSizes(), LENGTH)
    head = 3 * 2.0 * config.vocab_size * config.hidden_size
    attention = 3.0 * config.num_layers * attention_flops(config, LENGTH)
    layers = sum(map(config.is_moe_layer, range(config.num_layers)))
    router = 3 * 2.0 * layers * moe.num_experts * config.hidden_size
    of_query = mla.q_lora_rank * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    of_latent = mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
    up = 2.0 * config.num_layers * mla.num_heads * (of_query + of_latent)
    block = (whole - head) / config.num_layers
    return {
        "whole": whole,
        "in bf16": head + attention + router,
        "up-projections": up,
        "prediction module": block + head + 3 * 2.0 * 2 * config.hidden_size**2,
    }


def seconds_of(work: Workload, flops: float) -> float:
    """Time of a step of which each GPU computes its part of ``flops`` a token, and nothing else."""
    return work.tokens / work.gpus * flops / (work.peak_flops * work.efficiency)


def layout_of(one: Estimate) -> str:
    """For the reader."""
    sizes = one.layout.sizes
    return f"{sizes.data} data x {sizes.tensor} tensor ranks, {sizes.expert} for experts"


def explain(work: Workload) -> list[tuple[str, float]]:
    """(what is assumed, seconds of a step), each line with the assumptions of those before."""
    own = search(work).fitting[0]
    hidden = own.seconds["optimizer"] + max(own.seconds["compute"], own.seconds["exposed"])
    flops = flops_per_token(work)
    kept = flops["whole"] + flops["up-projections"]
    in_fp8 = flops["in bf16"] + (kept - flops["in bf16"]) / FP8_OVER_BF16
    predicted = in_fp8 + flops["prediction module"]
    # (PP / 2 - 1) (F&B + B - 3 W) of table 2; backward for weights takes as long as forward, all backward twice that.
    bubble = (STAGES / 2 - 1) * (1 + 2 / 3 - 3 * 1 / 3)
    micro_batches = work.global_batch / (work.gpus / STAGES)
    return [
        (f"zoo plan: {layout_of(own)}", own.step_seconds),
        ("tokens travel behind computation", hidden),
        ("up-projections alone recomputed, no tensor ranks", seconds_of(work, kept)),
        ("fp8, but for attention, routers and head", seconds_of(work, in_fp8)),
        ("a module that predicts a second token", seconds_of(work, predicted)),
        (f"the bubble of {STAGES} stages", seconds_of(work, predicted) * (1 + bubble / micro_batches)),
    ]


def main() -> None:
    """Print the table."""
    work = Workload(
        config=replace(find_spec("deepseek-v3").model, mtp_depth=0),
        gpu=find_gpu("h800"),
        gpus=2048,
        sequence_length=LENGTH,
        global_batch=STEP_TOKENS // LENGTH,
    )
    hours = work.gpus / 3600 * 1e12 / work.tokens
    rows = [("assumed, each with those above", "step", "GPU h/T tokens", "change")]
    before = math.nan
    for text, seconds in explain(work):
        change = "" if math.isnan(before) else f"{seconds / before - 1:+.0%}"
        rows.append((text, f"{seconds:.1f} s", f"{hours * seconds:,.0f}", change))
        before = seconds
    rows.append(("published", f"{PUBLISHED / hours:.1f} s", f"{PUBLISHED:,}", f"{PUBLISHED / hours / before - 1:+.0%}"))
    print(columns(rows))
    print(f"\nThe last is what {work.efficiency * hours * before / PUBLISHED:.0%} of the peak give in place of 50%.")


if __name__ == "__main__":
    main()
