"""One new token against a cache: MLA, whose absorbed form never expands the latent, and grouped-query attention.

Two layers whose FFNs are narrow, so that attention takes the time. transformers keeps the latent as well and expands
it to keys and values of every head in each step; it is measured with the cache that grows and the preallocated one.
The limit is reading as many bytes as the weights and the filled cache hold.

Shapes: B batch, L tokens in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.accounting import cache_elements_per_token, count_parameters
from zoo.bench.memory import peak_bytes
from zoo.bench.peers import check_equal, exported, in_transformers
from zoo.bench.rows import LIMIT, OURS, Options, Row
from zoo.bench.timing import interleaved, reading
from zoo.config import AttentionConfig, MLAConfig, ModelConfig, ModelSpec, RopeConfig
from zoo.model import Decoder, build
from zoo.registry import find_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXTS = (512, 4096)
BATCHES = (1, 4)


def rows(options: Options) -> Iterator[Row]:
    """Seconds of a step of every case that ``options`` asks for."""
    for name, spec in specs().items():
        cases = {
            f"{name}, context {context}, batch {batch}": (batch, context) for context in CONTEXTS for batch in BATCHES
        }
        wanted = {case: sizes for case, sizes in cases.items() if options.wants(case)}
        if wanted:
            ours = build(spec.model, dtype=options.dtype, device=options.device).eval()
            with exported(ours, spec) as published:
                theirs = in_transformers(published, options)
            for case, (batch, context) in wanted.items():
                yield measured(case, ours, theirs, batch, context, options)


def specs() -> dict[str, ModelSpec]:
    """DeepSeek-V2-Lite's heads, whose latent is 576 numbers in the place of 5,120 keys and values, and Llama's."""
    mla = MLAConfig(
        num_heads=16, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    gqa = AttentionConfig(num_heads=16, num_kv_heads=4, head_dim=64)
    deepseek, llama = find_spec("deepseek-v3-tiny"), find_spec("llama-tiny")
    return {
        "MLA": replace(deepseek, model=_sized(replace(deepseek.model, moe=None, mla=mla), interleaved=True)),
        "GQA": replace(llama, model=_sized(replace(llama.model, attention=gqa), interleaved=False)),
    }


def _sized(model: ModelConfig, interleaved: bool) -> ModelConfig:
    return replace(
        model,
        hidden_size=1024,
        num_layers=2,
        intermediate_size=256,
        vocab_size=256,
        max_position_embeddings=2 * CONTEXTS[-1],
        rope=RopeConfig(theta=10000.0, layout="interleaved" if interleaved else "split"),
        tie_word_embeddings=False,
    )


def measured(case: str, ours: Decoder, theirs: PreTrainedModel, batch: int, context: int, options: Options) -> Row:
    """One token for each of ``batch`` rows with ``context`` tokens in the cache; the logits agree before it counts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ours.config.vocab_size, (batch, context + 1), generator=generator).to(options.device)
    steps = {
        OURS: _our_step(ours, ids),
        "transformers dynamic cache": _growing(theirs, ids),
        "transformers static cache": _preallocated(theirs, ids),
    }
    expected = steps[OURS]()
    for way, step in steps.items():
        check_equal(case, way, expected, step(), options.dtype)
    element = ours.embed_tokens.weight.element_size()
    cached = cache_elements_per_token(ours.config) * batch * context
    weights = count_parameters(ours.config).active_without_embedding
    needed = element * (weights + cached)
    ways: dict[str, Callable[[], object]] = {**steps, LIMIT: reading(needed, needed, ids.device)}
    seconds = interleaved(ways, options.rounds, warmups=2, repeat=5)
    peaks = {way: peak_bytes(step, options.device) for way, step in steps.items()}
    return Row("attention", case, seconds, peaks, {"cache_bytes": cached * element, "weight_bytes": weights * element})


def _our_step(model: Decoder, ids: Tensor) -> Callable[[], Tensor]:
    context = ids.shape[1] - 1
    cache = model.new_cache(*ids.shape)
    with torch.inference_mode():
        model(ids[:, :-1], cache=cache, logits_to_keep=1)

    @torch.inference_mode()
    def step() -> Tensor:
        logits = model(ids[:, -1:], cache=cache).logits
        cache.crop(context)
        return logits

    return step


def _growing(model: PreTrainedModel, ids: Tensor) -> Callable[[], Tensor]:
    """A step with the cache that transformers makes by itself."""
    with torch.inference_mode():
        cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def step() -> Tensor:
        logits: Tensor = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return step


def _preallocated(model: PreTrainedModel, ids: Tensor) -> Callable[[], Tensor]:
    from transformers import StaticCache

    cache: Any = StaticCache(model.config, max_cache_len=ids.shape[1])
    with torch.inference_mode():
        model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def step() -> Tensor:
        logits: Tensor = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)
        return logits

    return step
