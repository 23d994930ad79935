"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): latent attention, group-limited routing, no renormalisation."""

from __future__ import annotations

from typing import Any

from zoo.config import ModelConfig
from zoo.families.base import Family
from zoo.families.deepseek_moe import read_experts, write_experts
from zoo.families.fields import Fields
from zoo.families.parts import read_decoder, read_mla, read_rope, write_decoder, write_mla
from zoo.families.tensors import decoder_map


def _read(fields: Fields) -> ModelConfig:
    fields.expect("scoring_func", "softmax")
    # The published code and transformers disagree about V2 with renormalised weights, which no checkpoint has.
    fields.expect("norm_topk_prob", False)
    fields.expect("topk_method", "greedy", "group_limited_greedy")
    grouped = fields.raw("topk_method") == "group_limited_greedy"
    num_groups, top_k_groups = fields.optional(int, "n_group"), fields.optional(int, "topk_group")
    return read_decoder(
        fields,
        rope=read_rope(fields, layout="interleaved"),
        mla=read_mla(fields),
        moe=read_experts(
            fields,
            score_func="softmax",
            norm_topk_prob=False,
            routed_scaling_factor=fields.take(float, "routed_scaling_factor", 1.0),
            num_groups=num_groups if grouped else 1,
            top_k_groups=top_k_groups if grouped else 1,
        ),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    published = {**write_decoder(config), **write_mla(config), **write_experts(config)}
    moe = config.moe
    if moe is None:
        return published
    if moe.num_shared_experts == 0:
        raise ValueError("moe.num_shared_experts = 0: this family always has shared experts")
    return published | {
        "scoring_func": "softmax",
        "topk_method": "greedy" if moe.num_groups == 1 else "group_limited_greedy",
        "n_group": moe.num_groups,
        "topk_group": moe.top_k_groups,
        "routed_scaling_factor": moe.routed_scaling_factor,
    }


FAMILY = Family(
    name="deepseek_v2",
    model_type="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    read=_read,
    write=_write,
    map_weights=decoder_map,
)
