"""Small models with multi-token prediction."""

from __future__ import annotations

from typing import Any

from zoo.config import AttentionConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig

D, H, HEAD, V, E, K = 16, 2, 8, 50, 4, 2
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=D,
    num_layers=2,
    intermediate_size=24,
    max_position_embeddings=64,
    norm_eps=1e-6,
    rope=RopeConfig(theta=100.0),
    attention=AttentionConfig(num_heads=H, num_kv_heads=H, head_dim=HEAD),
    moe=MoEConfig(
        num_experts=E, top_k=K, moe_intermediate_size=8, score_func="softmax", norm_topk_prob=True, first_k_dense=1
    ),
    mtp_depth=2,
    initializer_range=0.3,
)
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "mla": {
        "attention": None,
        "mla": MLAConfig(
            num_heads=2, kv_lora_rank=8, q_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4
        ),
    },
}
