"""``config.json`` as published on the hub, all fields, against the zoo's own configs and transformers.

They were written from knowledge, and on 2026-11-22 compared with copies in public code. Whole files: DeepSeek-V2-Lite,
DeepSeek-V3, gpt-oss, Mixtral (maxtext, ``hf_model_configs.py``), Mistral (mlc-llm, ``model_preset.py``), Jamba 1.5
(onnx-diagnostic), Grok-1 and but for its depth Maverick (TensorRT-LLM), Gemma-2-27B, OLMoE, DeepSeek-R1, DeepSeek-Coder
1.3B (a log of veRL's, as transformers 4.48 completes it). Sizes alone: Qwen3, Llama 2 and 3.1, DBRX, OLMo-2-1B,
Gemma-2-9B, DeepSeek-Coder 6.7B and 33B (arXiv 2401.14196, table 2; positions: section 3.6). Not found: Jamba v0.1, and
Scout after its instruction tuning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from zoo.families import FAMILIES, expressible, family_of, get_family
from zoo.registry import find_spec, model_names
from zoo.weights.convert import parameter_shapes
from zoo.weights.ops import source_shapes

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}

_DEEPSEEK_CODER = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 32013,
    "eos_token_id": 32014,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5504,
    "max_position_embeddings": 16384,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
    "rope_theta": 100000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "vocab_size": 32256,
}

_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}

_QWEN_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

_DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}

_DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}

_DEEPSEEK_R1 = {k: v for k, v in _DEEPSEEK_V3.items() if k not in ("aux_loss_alpha", "pretraining_tp", "seq_aux")} | {
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "transformers_version": "4.46.3",
}

_DEEPSEEK_V2 = _DEEPSEEK_V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}

_QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

_OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

_OLMO2 = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0",
    "use_cache": True,
    "vocab_size": 100352,
}

_GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "initializer_range": 0.02,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
}

_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
_DBRX: dict[str, Any] = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "auto_map": {"AutoConfig": "configuration_dbrx.DbrxConfig"},
    "d_model": 6144,
    "emb_pdrop": 0.0,
    "ffn_config": {
        "ffn_hidden_size": 10752,
        "model_type": "",
        "moe_jitter_eps": 0.01,
        "moe_loss_weight": 0.05,
        "moe_num_experts": 16,
        "moe_top_k": 4,
    },
    "initializer_range": 0.02,
    "max_seq_len": 32768,
    "model_type": "dbrx",
    "n_heads": 48,
    "n_layers": 40,
    "output_router_logits": False,
    "resid_pdrop": 0.0,
    "router_aux_loss_coef": 0.05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.2",
    "use_cache": True,
    "vocab_size": 100352,
}

_LLAMA4 = {
    "_attn_implementation_autoset": True,
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "floor_scale": 8192,
    "for_llm_compressor": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10485760,
    "model_type": "llama4_text",
    "no_rope_layers": [1, 1, 1, 0] * 12,
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "output_router_logits": False,
    "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 202048,
}
"""``text_config`` of the published file."""

_JAMBA = {
    "architectures": ["JambaForCausalLM"],
    "attention_dropout": 0.0,
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "bos_token_id": 1,
    "calc_logits_for_entire_prompt": False,
    "eos_token_id": 2,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 256,
    "mamba_expand": 2,
    "mamba_inner_layernorms": True,
    "mamba_proj_bias": False,
    "max_position_embeddings": 262144,
    "model_type": "jamba",
    "n_ctx": 262144,
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mamba_kernels": True,
    "vocab_size": 65536,
}

PUBLISHED = {
    "llama-3.1-8b": _LLAMA,
    "deepseek-coder-1.3b": _DEEPSEEK_CODER,
    "mixtral-8x7b": _MIXTRAL,
    "qwen1.5-moe-a2.7b": _QWEN_MOE,
    "qwen3-8b": _QWEN3,
    "qwen3-30b-a3b": _QWEN3_MOE,
    "gpt-oss-20b": _GPT_OSS,
    "dbrx": _DBRX,
    "llama-4-scout": _LLAMA4,
    "jamba-v0.1": _JAMBA,
    "jamba-1.5-mini": {**_JAMBA, "num_logits_to_keep": 1},
    "olmo-2-7b": _OLMO2,
    "gemma-2-27b": _GEMMA2,
    "olmoe-1b-7b": _OLMOE,
    "deepseek-v2": _DEEPSEEK_V2,
    "deepseek-v2-lite": _DEEPSEEK_V2_LITE,
    "deepseek-v3": _DEEPSEEK_V3,
}


_CLASS_DEFAULTS = {
    "chunk_size_feed_forward": 0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "length_penalty": 1.0,
    "max_length": 20,
    "num_beams": 1,
    "output_hidden_states": False,
    "pruned_heads": {},
    "return_dict": True,
    "temperature": 1.0,
    "tie_word_embeddings": True,
    "top_k": 50,
    "torch_dtype": None,
    "typical_p": 1.0,
}
"""What transformers 4.39 wrote into each config within another one."""

SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama-2-7b": (
        _LLAMA,
        {
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 32,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "vocab_size": 32000,
        },
    ),
    "llama-3-8b": (_LLAMA, {"max_position_embeddings": 8192, "rope_scaling": None}),
    "deepseek-coder-6.7b": (
        _DEEPSEEK_CODER,
        {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
        | {"num_key_value_heads": 32},
    ),
    "deepseek-coder-33b": (
        _DEEPSEEK_CODER,
        {"hidden_size": 7168, "intermediate_size": 19200, "num_attention_heads": 56, "num_hidden_layers": 62}
        | {"num_key_value_heads": 8},
    ),
    "mixtral-8x22b": (
        _MIXTRAL,
        {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "max_position_embeddings": 65536,
            "num_attention_heads": 48,
            "num_hidden_layers": 56,
            "router_aux_loss_coef": 0.001,
        },
    ),
    "qwen3-235b-a22b": (
        _QWEN3_MOE,
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_window_layers": 94,
            "moe_intermediate_size": 1536,
            "num_attention_heads": 64,
            "num_hidden_layers": 94,
        },
    ),
    "qwen3-32b": (
        _QWEN3,
        {"hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64, "num_hidden_layers": 64},
    ),
    "gpt-oss-120b": (
        _GPT_OSS,
        {
            "layer_types": ["sliding_attention", "full_attention"] * 18,
            "num_hidden_layers": 36,
            "num_local_experts": 128,
        },
    ),
    "llama-4-maverick": (
        _LLAMA4,
        {
            "interleave_moe_layer_step": 2,
            "max_position_embeddings": 1048576,
            "no_rope_layers": [],
            "num_local_experts": 128,
            "rope_scaling": None,
            "use_qk_norm": False,
        },
    ),
    "gemma-2-9b": (
        _GEMMA2,
        {
            "_attn_implementation": "eager",
            "head_dim": 256,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "query_pre_attn_scalar": 256,
            "sliding_window_size": 4096,
        },
    ),
    "olmo-2-1b": (
        _OLMO2,
        {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16}
        | {"num_hidden_layers": 16},
    ),
    "dbrx": (
        _DBRX,
        {
            "attn_config": _CLASS_DEFAULTS | {"attn_pdrop": 0} | _DBRX["attn_config"],
            "ffn_config": _CLASS_DEFAULTS
            | _DBRX["ffn_config"]
            | {
                "ffn_act_fn": {"name": "silu"},
                "moe_jitter_eps": 0,
                "moe_normalize_expert_weights": 1,
                "uniform_expert_assignment": False,
            },
        },
    ),
}
"""Size of a family → the file of another one, and what is different: further sizes, and files that say more."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_the_one_of_the_zoo(name: str) -> None:
    family = family_of(PUBLISHED[name])
    assert family.name == find_spec(name).family
    assert family.from_hf(PUBLISHED[name]) == find_spec(name).model


@pytest.mark.parametrize("name", SIZES)
def test_further_sizes_are_those_of_the_zoo(name: str) -> None:
    other, change = SIZES[name]
    assert family_of(other).from_hf(other | change) == find_spec(name).model


def test_deepseek_r1_is_deepseek_v3_with_other_weights() -> None:
    """Its file, to the byte: the hash is the one that users of the model have written down of theirs."""
    file = json.dumps(_DEEPSEEK_R1, indent=2, sort_keys=True) + "\n"
    sha256 = hashlib.sha256(file.encode()).hexdigest()
    assert sha256 == "79ddea672a62e95d3f0be27be434375538e1988975971cffcf87c96c1de84a65"
    assert family_of(_DEEPSEEK_R1).from_hf(_DEEPSEEK_R1) == find_spec("deepseek-v3").model


@pytest.mark.parametrize("name", PUBLISHED)
def test_spelling_of_transformers_5_means_the_same(name: str) -> None:
    respelled = json.loads(AutoConfig.for_model(**PUBLISHED[name]).to_json_string())
    assert ("rope_parameters" in respelled) == (find_spec(name).model.rope is not None)
    assert "rope_scaling" not in respelled
    assert family_of(respelled).from_hf(respelled) == find_spec(name).model


@pytest.mark.parametrize("name", model_names())
def test_every_config_goes_to_its_family_and_back(name: str) -> None:
    spec = find_spec(name)
    family = get_family(spec.family)
    assert family.from_hf(family.to_hf(spec.model)) == spec.model
    assert expressible(spec.model) in FAMILIES


@pytest.mark.parametrize("name", [n for n in model_names() if find_spec(n).family not in ("deepseek_moe", "grok1")])
def test_every_tensor_has_its_name_and_shape_in_transformers(name: str) -> None:
    """At full width; four layers are enough to have each kind, or as many as there are up to an attention layer."""
    spec = find_spec(name)
    layers = spec.model.mamba.attention_offset + 1 if spec.model.mamba else 4
    # Without MTP modules, which transformers does not keep in the model: tests/parity/test_mtp_weights.py.
    config, family = dataclasses.replace(spec.model, num_layers=layers, mtp_depth=0), get_family(spec.family)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family.to_hf(config))).state_dict()
    if config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    ours = source_shapes(family.weight_map(config, "fused"), parameter_shapes(config))
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("mixtral-8x7b", {"hidden_act": "gelu"}),
    ("mixtral-8x7b", {"router_jitter_noise": 0.1}),
    ("mixtral-8x7b", {"attention_chunk_size": 8192}),
    ("mixtral-8x7b", {"partial_rotary_factor": 0.5}),
    ("mixtral-8x7b", {"final_logit_softcapping": 30.0}),
    ("mixtral-8x7b", {"quantization_config": {"quant_method": "fp8"}}),
    ("mixtral-8x7b", {"num_hidden_layers": "32"}),
    ("mixtral-8x7b", {"rms_norm_eps": None}),
    ("llama-3.1-8b", {"mlp_bias": True}),
    ("llama-3.1-8b", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("llama-3.1-8b", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}),
    ("qwen1.5-moe-a2.7b", {"decoder_sparse_step": 2}),
    ("qwen1.5-moe-a2.7b", {"mlp_only_layers": [3]}),
    ("qwen1.5-moe-a2.7b", {"use_sliding_window": True}),
    ("qwen1.5-moe-a2.7b", {"shared_expert_intermediate_size": 5000}),
    ("gemma-2-27b", {"layer_types": ["full_attention"] * 46}),
    ("gemma-2-27b", {"attn_logit_softcapping": None}),
    ("gpt-oss-20b", {"swiglu_alpha": 1.0}),
    ("gpt-oss-20b", {"experts_per_token": 2}),
    ("dbrx", {"resid_pdrop": 0.1}),
    ("dbrx", {"rope_theta": 10000.0}),
    ("llama-4-scout", {"no_rope_layers": [1] * 48}),
    ("llama-4-scout", {"moe_layers": [3]}),
    ("jamba-v0.1", {"expert_layer_offset": 0}),
    ("jamba-v0.1", {"mamba_proj_bias": True}),
    ("jamba-v0.1", {"mamba_inner_layernorms": False}),
    ("jamba-v0.1", {"rope_theta": 10000.0}),
    ("llama-4-scout", {"attn_temperature_tuning": False}),
    ("olmoe-1b-7b", {"clip_qkv": 8.0}),
    ("deepseek-v2-lite", {"topk_method": "noaux_tc"}),
    ("deepseek-v2-lite", {"norm_topk_prob": True}),
    ("deepseek-v2-lite", {"moe_layer_freq": 2}),
    ("deepseek-v2-lite", {"rms_norm_eps": 1e-5}),
    ("deepseek-v3", {"scoring_func": "softmax"}),
    ("deepseek-v3", {"attention_bias": True}),
]


@pytest.mark.parametrize(("name", "change"), REFUSED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else v)
def test_what_the_blocks_do_not_have_is_refused_by_name(name: str, change: dict[str, Any]) -> None:
    hf = PUBLISHED[name] | change
    with pytest.raises(ValueError) as caught:
        family_of(hf).from_hf(hf, "src/config.json")
    message = str(caught.value)
    (field,) = change
    assert "src/config.json" in message
    assert (field if field != "rope_scaling" else "rope_type") in message
    assert "\n" not in message


WRONG: list[Any] = [
    "x",
    "",
    -1,
    0,
    1.5,
    True,
    [],
    ["x"],
    [0, 0],
    {},
    {"x": 1},
    {"rope_type": "yarn"},
    10**30,
    float("nan"),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_wrong_value_is_refused_or_read(name: str) -> None:
    """No value of any field ends in anything but a model or a ``ValueError`` of one line."""
    for field in PUBLISHED[name]:
        for value in WRONG:
            hf = PUBLISHED[name] | {field: value}
            try:
                family = family_of(hf)
                family.from_hf(hf)
                family.ignored(hf)
            except ValueError as error:
                assert "\n" not in str(error), (field, value)


def test_unknown_model_type_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type = 'gpt2' is not supported; it must be one of llama,"):
        family_of({"model_type": "gpt2"})


def test_export_refuses_what_a_family_cannot_express() -> None:
    with pytest.raises(ValueError, match=r"family mistral cannot express .*moe"):
        get_family("mistral").to_hf(find_spec("mixtral-tiny").model)
    with pytest.raises(ValueError, match=r"family llama cannot express attention.qkv_bias = True|output_bias"):
        get_family("llama").to_hf(find_spec("qwen2-tiny").model)
