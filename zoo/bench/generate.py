"""Greedy generation: a whole model's tokens beside transformers and litgpt, and beside reading its weights.

Ours step by step, and with the step compiled before its time is taken.

Shapes: B batch, S tokens of the prompt, D model, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.accounting import cache_elements_per_token, count_parameters
from zoo.bench.peers import EXPERTS, GATHERED_BYTES, exported, in_litgpt, in_transformers
from zoo.bench.rows import LIMIT, OURS, Options, Row
from zoo.bench.timing import far_behind, interleaved, left_out, reading
from zoo.compiled import CompiledStep, most_prompts
from zoo.config import AttentionConfig, MLAConfig, ModelSpec
from zoo.generation import decode_step, generate
from zoo.model import Decoder, build
from zoo.quantize import held_bytes, quantize
from zoo.registry import find_spec

PROMPT, NEW = 32, 128
"""Tokens of a prompt and of its continuation."""
BATCHES = (1, 8)
ROUNDED, KINDS = "mixtral-190m", ("int8", "int4")
"""Whose decoding with weights of few bits is timed beside our own without; docs/performance.md has what they lose."""
TIE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Logits that are as near to each other, over their standard deviation, may come out in either order."""


def rows(options: Options) -> Iterator[Row]:
    """Seconds for ``NEW`` tokens of every case that ``options`` asks for."""
    for name, spec in _specs().items():
        cases = {(batch, False): f"{name}, batch {batch}" for batch in BATCHES}
        if options.device == "cpu":
            cases |= {(batch, True): f"{name}, compiled, batch {batch}" for batch in BATCHES}
        wanted = {way: case for way, case in cases.items() if options.wants(case)}
        rounded = {kind: f"{name}, {kind}, batch 1" for kind in KINDS if name == ROUNDED and options.device == "cpu"}
        rounded = {kind: case for kind, case in rounded.items() if options.wants(case)}
        if wanted or rounded:
            ours = build(spec.model, dtype=options.dtype, device=options.device).eval()
        if wanted:
            with exported(ours, spec) as published:
                theirs, lit = in_transformers(published, options), in_litgpt(published, spec, options)
            for (batch, compiled), case in wanted.items():
                if compiled and batch > most_prompts(ours):
                    continue  # the compiled step leaves them to the other
                ids = _prompts(ours, batch, options)
                peers = {
                    f"transformers {experts}": partial(_their_tokens, theirs, experts, ids)
                    for experts in EXPERTS
                    if experts != "batched_mm" or _gathered_bytes(ours, ids) <= GATHERED_BYTES
                }
                if lit is not None and batch == 1:
                    peers["litgpt"] = partial(_litgpt_tokens, lit, ids)
                yield _row(case, ours, peers, ids, compiled, options)
            del theirs, lit
        for kind, case in rounded.items():
            yield _rounded_row(case, kind, ours, options)


def _row(
    case: str,
    ours: Decoder,
    peers: Mapping[str, Callable[[], list[list[int]]]],
    ids: Tensor,
    compiled: bool,
    options: Options,
) -> Row:
    batch = len(ids)
    step = CompiledStep(ours, several=batch > 1) if compiled else decode_step
    ways: dict[str, Callable[[], Any]] = {OURS: partial(generate, ours, ids, max_new_tokens=NEW, step=step), **peers}
    expected, once, equal = ways[OURS](), dict[str, float](), []
    for name, way in ways.items():
        start = time.perf_counter()
        tokens = way()
        once[name] = time.perf_counter() - start
        equal.append(_check(ours, ids, expected, tokens, name, TIE[options.dtype]))
    slow = far_behind({name: seconds for name, seconds in once.items() if name != OURS})
    ways = {name: way for name, way in ways.items() if name not in slow}
    if batch == 1:
        ways[LIMIT] = _reading(ours)
    seconds = interleaved(ways, options.rounds)
    cache = ours.new_cache(batch, PROMPT + NEW)
    notes = {
        "parameters": count_parameters(ours.config).total,
        "new_tokens": batch * NEW,
        "identical_tokens": all(equal),
        "left_out_seconds": slow,
        "remark": left_out(slow, "a call"),
        "cache_bytes": cache.bytes,
        "cache_bytes_by_formula": cache_elements_per_token(ours.config)
        * batch
        * (PROMPT + NEW)
        * ours.embed_tokens.weight.element_size(),
    }
    return Row("generate", case, seconds, notes=notes)


def _rounded_row(case: str, kind: str, exact: Decoder, options: Options) -> Row:
    """Ours with weights of few bits, beside ours without."""
    rounded = copy.deepcopy(exact)
    quantize(rounded, kind)
    ids = _prompts(exact, 1, options)
    name = f"{OURS} {str(options.dtype).removeprefix('torch.')}"
    ways = {OURS: partial(generate, rounded, ids, max_new_tokens=NEW)}
    ways[name] = partial(generate, exact, ids, max_new_tokens=NEW)
    return Row(
        "generate",
        case,
        interleaved(ways, options.rounds),
        notes={"new_tokens": NEW, "weight_bytes": held_bytes(rounded)},
    )


def _prompts(model: Decoder, batch: int, options: Options) -> Tensor:
    """[batch, PROMPT] int64"""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(model.config.vocab_size, (batch, PROMPT), generator=generator).to(options.device)


def _gathered_bytes(model: Decoder, ids: Tensor) -> int:
    """Of the weights' copies that transformers' ``batched_mm`` makes in a layer for the prompts."""
    moe = model.config.moe
    assert moe is not None
    matrices = 3 * model.config.hidden_size * moe.moe_intermediate_size
    return ids.numel() * moe.top_k * matrices * model.embed_tokens.weight.element_size()


def _their_tokens(model: Any, experts: str, ids: Tensor) -> list[list[int]]:
    """``NEW`` tokens of each prompt [B, S] by ``generate`` of a transformers model, experts computed as named."""
    model.set_experts_implementation(experts)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return made[:, PROMPT:].tolist()


def _litgpt_tokens(model: Any, ids: Tensor) -> list[list[int]]:
    """``NEW`` tokens of one prompt [1, S] by litgpt's own loop."""
    from litgpt.generate.base import generate as continued

    model.max_seq_length = PROMPT + NEW
    model.set_kv_cache(1, device=ids.device, dtype=model.lm_head.weight.dtype)
    with torch.inference_mode():
        made = continued(model, ids[0], PROMPT + NEW, temperature=0.0, include_prompt=False)
    return [made.tolist()]


def _check(model: Decoder, ids: Tensor, ours: list[list[int]], theirs: list[list[int]], way: str, tie: float) -> bool:
    """Whether the tokens are the same; raises where they part over more than rounding."""
    for prompt, our_row, their_row in zip(ids, ours, theirs, strict=True):
        step = next((i for i, pair in enumerate(zip(our_row, their_row, strict=True)) if len(set(pair)) > 1), None)
        if step is not None:
            with torch.inference_mode():
                logits = model(torch.cat((prompt, prompt.new_tensor(our_row[:step])))[None]).logits[0, -1].float()
            gap = (logits[our_row[step]] - logits[their_row[step]]).abs() / logits.std()
            if gap > tie:
                raise RuntimeError(
                    f"{way}: token {step} is {their_row[step]} and ours {our_row[step]}, whose logits differ by "
                    f"{gap:.1e} of their standard deviation"
                )
    return ours == theirs


def _reading(model: Decoder) -> Callable[[], None]:
    """Reading as many weights as one token needs, ``NEW`` times: the limit of decoding with one row.

    They are taken from as much memory as the model has, in turn, so that no cache holds what the model's would not.
    """
    parameters, weight = count_parameters(model.config), model.embed_tokens.weight
    size = weight.element_size()
    one = reading(size * parameters.active_without_embedding, size * parameters.total, weight.device)

    def read() -> None:
        for _ in range(NEW):
            one()

    return read


def _specs() -> dict[str, ModelSpec]:
    """The tiny models of the zoo, which the host can keep waiting, and two that are larger than most caches."""
    tiny = {name: find_spec(name) for name in ("mixtral-tiny", "deepseek-v3-tiny", "qwen3-moe-tiny")}
    mixtral, deepseek = tiny["mixtral-tiny"], tiny["deepseek-v3-tiny"]
    assert mixtral.model.moe and deepseek.model.moe
    large = replace(
        mixtral.model,
        vocab_size=8192,
        hidden_size=512,
        num_layers=8,
        intermediate_size=1792,
        attention=AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=64),
        moe=replace(mixtral.model.moe, moe_intermediate_size=1792),
    )
    fine = replace(
        deepseek.model,
        vocab_size=8192,
        hidden_size=256,
        num_layers=6,
        intermediate_size=1024,
        mla=MLAConfig(
            num_heads=8, kv_lora_rank=128, q_lora_rank=192, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
        moe=replace(deepseek.model.moe, num_experts=32, moe_intermediate_size=160),
    )
    return {
        **tiny,
        "mixtral-190m": replace(mixtral, name="mixtral-190m", model=large),
        "deepseek-v3-28m": replace(deepseek, name="deepseek-v3-28m", model=fine),
    }
