"""DeepSeek-V3 (arXiv 2412.19437): sigmoid scores, groups scored by their two best, loss-free balancing, and modules of
multi-token prediction.

Files number the modules on from the last layer, and hold the embedding and the output head again in each of them.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection
from typing import Any

from zoo.config import ModelConfig
from zoo.families.base import Family, Layout
from zoo.families.deepseek_moe import read_experts, write_experts
from zoo.families.fields import Fields
from zoo.families.parts import read_decoder, read_mla, read_rope, write_decoder, write_mla
from zoo.families.tensors import decoder_map, layer_map
from zoo.weights.ops import Copies, Op, Rename


def _read(fields: Fields) -> ModelConfig:
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    interleaved = fields.take(bool, "rope_interleave", True)
    return read_decoder(
        fields,
        rope=read_rope(fields, layout="interleaved" if interleaved else "split"),
        mla=read_mla(fields),
        moe=read_experts(
            fields,
            score_func="sigmoid",
            norm_topk_prob=fields.take(bool, "norm_topk_prob", True),
            routed_scaling_factor=fields.take(float, "routed_scaling_factor", 1.0),
            num_groups=fields.take(int, "n_group", 1),
            top_k_groups=fields.take(int, "topk_group", 1),
            group_score="top2_sum",
            router_bias=True,
        ),
        mtp_depth=fields.take(int, "num_nextn_predict_layers", 0),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    attention = write_mla(config)
    assert config.rope is not None, "mla has rotary positions"
    published = {
        **write_decoder(config),
        **attention,
        **write_experts(config),
        "rope_interleave": config.rope.layout == "interleaved",
        "num_nextn_predict_layers": config.mtp_depth,
    }
    moe = config.moe
    if moe is None:
        return published
    if moe.num_shared_experts == 0:
        raise ValueError("moe.num_shared_experts = 0: this family always has shared experts")
    return published | {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": moe.num_groups,
        "topk_group": moe.top_k_groups,
        "routed_scaling_factor": moe.routed_scaling_factor,
    }


def _map(config: ModelConfig, layout: Layout) -> list[Op]:
    head = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    ops, again = decoder_map(config, layout), defaultdict[str, list[str]](list)
    for k in range(config.mtp_depth):
        layer, ours = config.num_layers + k, f"mtp.{k}"
        theirs = f"model.layers.{layer}"
        again["embed_tokens.weight"].append(f"{theirs}.embed_tokens.weight")
        again[head].append(f"{theirs}.shared_head.head.weight")
        ops.extend(Rename(f"{theirs}.{part}.weight", f"{ours}.{part}.weight") for part in ("enorm", "hnorm", "eh_proj"))
        ops.extend(layer_map(config, layer, layout, ours))
        ops.append(Rename(f"{theirs}.shared_head.norm.weight", f"{ours}.norm.weight"))
    return [Copies((*op.sources, *again[t]), t) if (t := op.targets[0]) in again else op for op in ops]


def _stored(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """transformers drops the modules when it saves a model, and goes on announcing them."""
    modules = tuple(f"model.layers.{config.num_layers + k}." for k in range(config.mtp_depth))
    return config if any(name.startswith(modules) for name in names) else dataclasses.replace(config, mtp_depth=0)


FAMILY = Family(
    name="deepseek_v3",
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    read=_read,
    write=_write,
    quantizations=("fp8",),
    map_weights=_map,
    stored=_stored,
)
