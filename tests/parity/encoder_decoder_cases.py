"""Random small encoder-decoders of transformers that parity tests compare the zoo with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

VOCAB = 320

_T5: dict[str, Any] = {
    "model_type": "t5",
    "vocab_size": VOCAB,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 80,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 40,
    "decoder_start_token_id": 0,
}
_SWITCH: dict[str, Any] = {
    **_T5,
    "model_type": "switch_transformers",
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_experts": 6,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "expert_capacity": 5,
}

CASES: dict[str, dict[str, Any]] = {
    "t5": _T5,
    "t5-v1.1": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "switch": _SWITCH,
}
"""Name → config.json fields, in the spelling of the hub."""


def random_model(case: str, seed: int = 0) -> PreTrainedModel:
    """A transformers model with every tensor drawn, wide enough that routing and attention are far from uniform."""
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**CASES[case])).eval()
    if not CASES[case].get("tie_word_embeddings", True):
        # transformers 5 ties the head of a fresh T5 whatever the config says; of a stored one it does not.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * noise)
            else:
                wide = any(part in name for part in ("shared", "relative_attention_bias", "classifier"))
                tensor.copy_(noise * (0.7 if wide else 0.16))
    return model


def saved_model(case: str, directory: Path) -> PreTrainedModel:
    """``random_model``, saved to ``directory`` as transformers saves it."""
    model = random_model(case)
    model.save_pretrained(directory)
    return model
