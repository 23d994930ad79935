"""Random small models of transformers, one a family and variant, that parity tests compare the zoo with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

CONTEXT = 64
"""Original context of the cases with extended positions; the tests go past it."""

VOCAB = 320

_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 4 * CONTEXT,
    "rms_norm_eps": 1e-6,
}
_GQA: dict[str, Any] = {**_DECODER, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_MLA: dict[str, Any] = {
    **_DECODER,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": CONTEXT,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}


def _deepseek_yarn(mscale: float) -> dict[str, Any]:
    return {**_YARN, "beta_fast": 32, "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale}


_V2 = {
    **_MLA,
    "model_type": "deepseek_v2",
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
_V3 = {
    **_V2,
    "model_type": "deepseek_v3",
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "rope_scaling": _deepseek_yarn(1.0),
}
_QWEN_MOE = {**_GQA, "num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 24}

CASES: dict[str, dict[str, Any]] = {
    "llama": {**_GQA, "model_type": "llama"},
    "llama-tied-biased": {**_GQA, "model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "llama-3.1": {**_GQA, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": _LLAMA3},
    "llama-linear": {**_GQA, "model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-yarn": {**_GQA, "model_type": "llama", "rope_scaling": _YARN},
    "mistral": {**_GQA, "model_type": "mistral", "sliding_window": 20},
    "qwen2": {**_GQA, "model_type": "qwen2"},
    "qwen3": {**_GQA, "model_type": "qwen3"},
    "olmo2": {**_GQA, "model_type": "olmo2", "pad_token_id": None},
    "gemma2": {
        **_GQA,
        "model_type": "gemma2",
        "sliding_window": 20,
        "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "pad_token_id": None,
    },
    "mixtral": {
        **_GQA,
        "model_type": "mixtral",
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen2-moe": {**_QWEN_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 48},
    "qwen2-moe-dense-first": {
        **_QWEN_MOE,
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "qwen3-moe": {**_QWEN_MOE, "model_type": "qwen3_moe", "norm_topk_prob": True},
    "qwen3-moe-dense": {**_QWEN_MOE, "model_type": "qwen3_moe", "mlp_only_layers": [0, 1, 2]},
    "olmoe": {
        **{k: v for k, v in _GQA.items() if k != "head_dim"},
        "model_type": "olmoe",
        "hidden_size": 64,
        "intermediate_size": 24,
        "num_experts": 10,
        "num_experts_per_tok": 3,
        "pad_token_id": None,
    },
    "gpt-oss": {
        **_GQA,
        "model_type": "gpt_oss",
        "intermediate_size": 24,
        "num_local_experts": 10,
        "num_experts_per_tok": 3,
        "sliding_window": 20,
        "swiglu_limit": 0.5,
        "rope_scaling": {**_YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    },
    "dbrx": {
        "model_type": "dbrx",
        "vocab_size": VOCAB,
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "max_seq_len": 4 * CONTEXT,
        "rope_theta": 500_000.0,
        "attn_config": {"clip_qkv": 0.5, "kv_n_heads": 2, "rope_theta": 500_000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 10, "moe_top_k": 3},
    },
    "llama4": {
        **_GQA,
        "model_type": "llama4_text",
        "num_hidden_layers": 4,
        "intermediate_size": 24,
        "intermediate_size_mlp": 80,
        "num_local_experts": 6,
        "attention_chunk_size": 20,
        # Past the longest padded batch: transformers counts padding as positions here.
        "floor_scale": CONTEXT + 12,
        "attn_scale": 1.0,
        "rope_scaling": _LLAMA3,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "llama4-interleaved": {
        **_GQA,
        "model_type": "llama4_text",
        "num_hidden_layers": 4,
        "intermediate_size": 24,
        "intermediate_size_mlp": 80,
        "num_local_experts": 6,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "attention_chunk_size": 20,
        "floor_scale": CONTEXT + 12,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "jamba": {
        **{k: v for k, v in _GQA.items() if k != "head_dim"},
        "model_type": "jamba",
        "num_hidden_layers": 4,
        "num_experts": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 6,
        "mamba_dt_rank": 5,
        "pad_token_id": None,
    },
    "deepseek-v2": {
        **_V2,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 4.0,
        "rope_scaling": _deepseek_yarn(0.707),
    },
    "deepseek-v2-lite": {**_V2, "q_lora_rank": None, "topk_method": "greedy", "rope_scaling": _deepseek_yarn(0.707)},
    "deepseek-v2-dense": {**_V2, "first_k_dense_replace": 3},
    "deepseek-v3": _V3,
    "deepseek-v3-split": {**_V3, "rope_interleave": False},
}
"""Name → config.json fields, in the spelling of the hub."""


def random_model(case: str, seed: int = 0) -> PreTrainedModel:
    """A transformers model with every tensor drawn, wide enough that routing and attention are far from uniform."""
    config = AutoConfig.for_model(**CASES[case])
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "rotary_emb" in name or name.endswith("embed_scale"):  # constants
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight", "norm_f.weight")):
                tensor.copy_(1 + 0.2 * noise)
            elif name.endswith(("bias", "correction_bias")):
                tensor.copy_(0.2 * noise)
            else:
                tensor.copy_(noise * (0.3 if ".gate." in name else 0.12))
    return model


def saved_model(case: str, directory: Path, **save_options: Any) -> PreTrainedModel:
    """``random_model``, saved to ``directory`` as transformers saves it."""
    model = random_model(case)
    model.save_pretrained(directory, **save_options)
    return model


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random ids [batch, length]."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, relative to the range of ``theirs``."""
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))
