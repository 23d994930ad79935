"""DeepSeek-V3 (arXiv 2412.19437): sigmoid scores, groups scored by their two best, loss-free balancing.

Without multi-token prediction: the layers that published files put after the last one are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.config import ModelConfig
from zoo.families.base import ROTARY_BUFFERS, Family
from zoo.families.deepseek_moe import read_experts, write_experts
from zoo.families.fields import Fields
from zoo.families.parts import read_decoder, read_mla, read_rope, write_decoder, write_mla
from zoo.families.tensors import decoder_map


def _read(fields: Fields) -> ModelConfig:
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    _mtp_layers(fields)
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
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    attention = write_mla(config)
    assert config.rope is not None, "mla has rotary positions"
    published = {
        **write_decoder(config),
        **attention,
        **write_experts(config),
        "rope_interleave": config.rope.layout == "interleaved",
        "num_nextn_predict_layers": 0,
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


def _mtp_layers(fields: Fields) -> range:
    """Numbers of the multi-token-prediction layers, which follow the decoder's own."""
    first, count = fields.size("num_hidden_layers"), fields.take(int, "num_nextn_predict_layers", 0)
    if not 0 <= count <= first:
        raise ValueError(f"{fields.where}: num_nextn_predict_layers = {count}: give a number from 0 to {first}")
    return range(first, first + count)


def _ignored(hf: Mapping[str, Any]) -> tuple[str, ...]:
    return (*ROTARY_BUFFERS, *(rf"model\.layers\.{layer}\..+" for layer in _mtp_layers(Fields(hf))))


FAMILY = Family(
    name="deepseek_v3",
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    read=_read,
    write=_write,
    map_weights=decoder_map,
    ignored=_ignored,
)
