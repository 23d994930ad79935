"""The same weights in other libraries: transformers, which is in the ``bench`` extra, and litgpt where it is installed.

litgpt asks for a ``huggingface-hub`` that transformers 5 is too new for, so that no extra can name both:
``pip install --no-deps litgpt`` puts it beside what is there.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.bench.rows import Options
from zoo.config import ModelSpec
from zoo.model import Decoder
from zoo.weights import export_checkpoint, save_model
from zoo.weights.source import TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""How transformers may compute experts on any device."""

GATHERED_BYTES = 2**30
"""transformers' ``batched_mm`` copies the weights of each row's expert: it is not tried where they take more."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference between ours and a peer's result, over the range of the peer's."""


@contextmanager
def exported(model: Decoder, spec: ModelSpec) -> Iterator[Path]:
    """A directory that holds ``model`` in its published layout while the block runs."""
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        save_model(model, spec, work / "zoo")
        export_checkpoint(work / "zoo", work / "hf")
        yield work / "hf"


def in_transformers(published: Path, options: Options) -> PreTrainedModel:
    """The model of a published directory as transformers loads it, in eval mode, of the options' dtype and device."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(published, dtype=options.dtype)
    nn.Module.to(model, options.device)
    return model.eval()


def in_litgpt(published: Path, spec: ModelSpec, options: Options) -> nn.Module | None:
    """The model of a published directory in litgpt; None where that is not installed or lacks the family."""
    if importlib.util.find_spec("litgpt") is None or spec.family not in ("mixtral", "qwen3_moe"):
        return None
    from litgpt import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama, copy_weights_qwen_3

    with TensorSource(published) as source:
        weights = {name: source.read(name) for name in source.entries}
    state: dict[str, Tensor] = {}
    config = _litgpt_config(spec)
    (copy_weights_hf_llama if spec.family == "mixtral" else copy_weights_qwen_3)(config, {}, state, weights)
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(state, assign=True)
    model.cos, model.sin = model.rope_cache(device="cpu")
    return model.to(device=options.device, dtype=options.dtype).eval()


def _litgpt_config(spec: ModelSpec) -> Any:
    from litgpt import Config

    model = spec.model
    assert model.attention is not None and model.rope is not None and model.moe is not None
    return Config(
        block_size=model.max_position_embeddings,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.vocab_size,
        n_layer=model.num_layers,
        n_embd=model.hidden_size,
        n_head=model.attention.num_heads,
        n_query_groups=model.attention.num_kv_heads,
        head_size=model.attention.head_dim,
        norm_qk=model.attention.qk_norm is not None,
        rotary_percentage=1.0,
        rope_base=int(model.rope.theta),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=model.norm_eps,
        mlp_class_name="LLaMAMoE",
        intermediate_size=model.moe.moe_intermediate_size,
        moe_intermediate_size=model.moe.moe_intermediate_size,
        n_expert=model.moe.num_experts,
        n_expert_per_token=model.moe.top_k,
    )


def check_equal(case: str, way: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Raise where a peer that computes in ``dtype`` gets something else: its time would say nothing then.

    Raises:
        RuntimeError: naming case and way, and the difference over the range of ``theirs``.
    """
    ours, theirs = ours.detach().float(), theirs.detach().float()
    span = max(float(theirs.max() - theirs.min()), float(theirs.abs().max()))
    difference = float((ours - theirs).abs().max()) / span
    if not difference <= TOLERANCE[dtype]:
        raise RuntimeError(f"{case}: {way} differs from ours by {difference:.1e} of its range")
