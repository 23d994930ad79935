"""A training step of a whole model: ours as ``zoo fit`` runs it, transformers' with each way of computing experts.

A step is forward, next-token loss, backward and fused AdamW on random tokens; ours takes the terms of the balance
losses as well, as training logs them. The limit is our step of the dense model with the same FLOPs for a token. Memory
is what a step needs beyond weights and the optimizer's state: activations, gradients, temporaries.

``zoo fit`` has the process keep freed memory, and so have the cases of costs; in the others, which are about peers, the
C library does as it does by default, because transformers has more to gain from that than ours.

Shapes: B batch, S sequence, T = B·S tokens, D model, F FFN, N routed rows, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.accounting import count_parameters, training_flops
from zoo.bench.memory import peak_bytes
from zoo.bench.peers import EXPERTS, GATHERED_BYTES, check_equal, exported, in_litgpt, in_transformers
from zoo.bench.rows import LIMIT, OURS, Options, Row
from zoo.bench.timing import far_behind, interleaved, left_out
from zoo.config import AttentionConfig, MLAConfig, ModelSpec, MoEConfig, save_spec
from zoo.harness.match import dense_config, derived
from zoo.model import Decoder
from zoo.registry import find_spec
from zoo.training.memory import freed_memory_kept
from zoo.training.module import ZooModule
from zoo.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer

TOKENS = 2048
"""Of a step."""
LENGTHS = (256, 1024)
VOCABULARIES = (2048, 32768)
SMALL = VOCABULARIES[0]


@dataclass(frozen=True)
class Case:
    """A model and the batch of its step."""

    name: str
    spec: ModelSpec
    batch: int
    length: int
    sweep: tuple[str, int] | None = None
    """What varies over a series of cases, and its value here."""


def rows(options: Options) -> Iterator[Row]:
    """Seconds of a step of every case that ``options`` asks for."""
    for case in cases():
        if options.wants(case.name):
            with nullcontext() if case.sweep is None else freed_memory_kept():
                yield measured(case, options)


def cases() -> Iterator[Case]:
    """Three styles of model, two lengths and two vocabularies; then what a token costs when one size varies."""
    for spec in (mixtral(), deepseek(), qwen()):
        for length in LENGTHS:
            for vocab_size in VOCABULARIES:
                sized = replace(spec, model=replace(spec.model, vocab_size=vocab_size))
                name = f"{spec.name}, sequence {length}, vocabulary {vocab_size:,}"
                yield Case(name, sized, TOKENS // length, length)
    for experts in (8, 16, 32, 64):
        spec = mixtral(num_experts=experts)
        yield Case(f"cost, {experts} experts", spec, TOKENS // 256, 256, ("experts", experts))
    for parts in (1, 2, 4, 8):
        spec = mixtral(num_experts=8 * parts, top_k=2 * parts, width=512 // parts)
        yield Case(f"cost, granularity {parts}", spec, TOKENS // 256, 256, ("granularity", parts))
    for length in (128, 256, 512, 1024, 2048):
        yield Case(f"cost, sequence {length}", mixtral(), TOKENS // length, length, ("sequence", length))
    for batch in (1, 2, 4, 8, 16):
        yield Case(f"cost, batch {batch}", mixtral(), batch, 256, ("batch", batch))


def mixtral(num_experts: int = 8, top_k: int = 2, width: int = 512) -> ModelSpec:
    """Grouped-query attention and experts of ``width``; by default coarse ones, as Mixtral's."""
    moe = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        moe_intermediate_size=width,
        score_func="softmax",
        norm_topk_prob=True,
    )
    return _sized("mixtral", attention=_GQA, intermediate_size=width, moe=moe)


def deepseek() -> ModelSpec:
    """Latent attention, 64 fine experts of which a token goes through 6 and 2 shared ones, the first layer dense."""
    mla = MLAConfig(
        num_heads=8, kv_lora_rank=128, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    )
    moe = find_spec("deepseek-v3-tiny").model.moe
    assert moe is not None
    moe = replace(moe, num_experts=64, top_k=6, moe_intermediate_size=128, num_shared_experts=2)
    return _sized("deepseek-v3", mla=mla, intermediate_size=1024, moe=moe)


def qwen() -> ModelSpec:
    """Grouped-query attention with normalised heads, 64 fine experts, 8 for a token, none shared."""
    moe = find_spec("qwen3-moe-tiny").model.moe
    assert moe is not None
    moe = replace(moe, num_experts=64, top_k=8, moe_intermediate_size=128)
    return _sized("qwen3-moe", attention=replace(_GQA, qk_norm="head"), intermediate_size=1024, moe=moe)


_GQA = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=32)


def _sized(style: str, **blocks: Any) -> ModelSpec:
    """The tiny model of ``style`` with 4 layers of width 256 and ``blocks``."""
    tiny = find_spec(f"{style}-tiny")
    model = replace(tiny.model, hidden_size=256, num_layers=4, vocab_size=SMALL, **blocks)
    return replace(tiny, name=style, model=model)


@dataclass(frozen=True)
class Learner:
    """A model in training and how it takes its loss."""

    model: nn.Module
    adamw: torch.optim.AdamW
    loss: Callable[[], Tensor]
    """Mean negative log-likelihood of the next token in nats."""
    logits: Callable[[], Tensor]
    """[S, V] of the first row."""

    def step(self) -> None:
        """Forward, backward and optimizer; without gradients before and after."""
        self.loss().backward()
        self.adamw.step()
        self.adamw.zero_grad()


def measured(case: Case, options: Options) -> Row:
    """Ours, peers and limit on the batch of ``case``; losses and logits agree before any step."""
    model = case.spec.model
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (case.batch, case.length + 1), generator=generator).to(options.device)
    ours = _zoo(case.spec, tokens, options)
    learners = {OURS: ours, **_peers(case, ours, tokens, options)}
    expected = ours.loss(), ours.logits()
    for way, learner in learners.items():
        for mine, other in zip(expected, (learner.loss(), learner.logits()), strict=True):
            check_equal(case.name, way, mine, other, options.dtype)
    steps = {way: learner.step for way, learner in learners.items()}
    once = {way: times[0] for way, times in interleaved(steps, 1).items()}
    slow = far_behind({way: time for way, time in once.items() if way != OURS})
    steps = {way: step for way, step in steps.items() if way not in slow}
    steps[LIMIT] = _zoo(dense(case), tokens, options).step
    seconds = interleaved(steps, options.rounds)
    peaks = {way: peak_bytes(step, options.device) for way, step in steps.items()}
    notes = {
        "tokens": case.batch * case.length,
        "parameters": count_parameters(model).total,
        "active_parameters": count_parameters(model).active,
        "flops": training_flops(model, case.length) * case.batch * case.length,
        "left_out_seconds": slow,
        "remark": left_out(slow, "a step"),
        **({} if case.sweep is None else {"sweep": case.sweep[0], "value": case.sweep[1]}),
    }
    return Row("train", case.name, seconds, peaks, notes)


def dense(case: Case) -> ModelSpec:
    """The model without experts whose training step has as many FLOPs."""
    return derived(case.spec, "dense", dense_config(case.spec.model, "flops", case.length), "equal in FLOPs")


def _zoo(spec: ModelSpec, tokens: Tensor, options: Options) -> Learner:
    """The model as ``zoo fit`` trains it, on rows of one document."""
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        save_spec(spec, file.name)
        module = ZooModule(file.name)
    module.configure_model()
    module.to(options.device, options.dtype)
    decoder = module.model
    assert decoder is not None
    batch = {
        "input_ids": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "document_ids": torch.zeros_like(tokens[:, 1:]),
    }

    def loss() -> Tensor:
        module.step_sums = None
        return module.training_step(batch, 0) / batch["labels"].numel()

    return Learner(decoder, _optimizer(decoder), loss, lambda: decoder(batch["input_ids"][:1]).logits[0])


def _peers(case: Case, ours: Learner, tokens: Tensor, options: Options) -> dict[str, Learner]:
    """The weights of ``ours`` elsewhere."""
    assert isinstance(ours.model, Decoder)
    with exported(ours.model, case.spec) as published:
        theirs = in_transformers(published, options).train()
        litgpt = in_litgpt(published, case.spec, options)
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()

    def computed(experts: str, ids: Tensor) -> Tensor:
        theirs.set_experts_implementation(experts)
        logits: Tensor = theirs(ids, use_cache=False).logits
        return logits

    def loss(forward: Callable[[Tensor], Tensor]) -> Tensor:
        return F.cross_entropy(forward(ids).flatten(0, 1).float(), labels)

    def logits(forward: Callable[[Tensor], Tensor]) -> Tensor:
        return forward(ids[:1])[0]

    shared = _optimizer(theirs)
    peers = {}
    for experts in _ways(case):
        forward = partial(computed, experts)
        peers[f"transformers {experts}"] = Learner(theirs, shared, partial(loss, forward), partial(logits, forward))
    if litgpt is not None:
        litgpt.train()
        peers["litgpt"] = Learner(litgpt, _optimizer(litgpt), partial(loss, litgpt), partial(logits, litgpt))
    return peers


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    """The one that ``zoo fit`` and transformers' Trainer both take."""
    return build_optimizer(model, OptimizerConfig(), ScheduleConfig(), 10**6)[0]


def _ways(case: Case) -> list[str]:
    """transformers' ways of computing experts that fit into memory."""
    model = case.spec.model
    assert model.moe is not None
    weights = 3 * model.hidden_size * model.moe.moe_intermediate_size * torch.float32.itemsize
    fits = case.batch * case.length * model.moe.top_k * weights <= GATHERED_BYTES
    return [way for way in EXPERTS if way != "batched_mm" or fits]
