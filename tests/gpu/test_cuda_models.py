"""Whole models on a GPU against the same on the CPU, where they are held to transformers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from zoo.generation import generate
from zoo.model import Decoder, build
from zoo.registry import find_spec, model_names

pytestmark = pytest.mark.gpu

TINY = [name for name in model_names() if name.endswith("-tiny")]


@pytest.fixture(scope="module", params=TINY)
def model(request: pytest.FixtureRequest) -> Decoder:
    """In fp32, with weights large enough that experts and layers matter."""
    model = build(find_spec(request.param).model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def loss_and_gradients(model: Decoder, ids: torch.Tensor, documents: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(ids, document_ids=documents).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_fp32_equals_the_cpu(model: Decoder) -> None:
    """Loss and every gradient, over packed documents."""
    ids = torch.randint(model.config.vocab_size, (2, 40))
    documents = torch.tensor([[0] * 17 + [1] * 23, [0] * 40])
    want = loss_and_gradients(model, ids, documents)
    got = loss_and_gradients(copy.deepcopy(model).cuda(), ids.cuda(), documents.cuda())
    assert len(got) == len(want)
    for ours, exact in zip(got, want, strict=True):
        assert (ours.cpu() - exact).norm() <= 1e-4 * exact.norm().clamp(min=1e-8)


def test_greedy_tokens_equal_the_cpus(model: Decoder) -> None:
    """Prompts of unequal length, so with padding, and rows that end early."""
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(model.config.vocab_size, (n,), generator=draw).tolist() for n in (3, 11, 7)]
    want = generate(model, prompts, max_new_tokens=24)
    assert generate(copy.deepcopy(model).cuda(), prompts, max_new_tokens=24) == want


def test_bf16_is_near_fp32_and_as_good_with_a_cache(model: Decoder) -> None:
    """Half of the tokens at least: where routing is at a border, rounding takes another expert."""
    ids = torch.randint(model.config.vocab_size, (2, 40))
    with torch.no_grad():
        exact = model(ids).logits.float()
        half = copy.deepcopy(model).bfloat16().cuda()
        whole = half(ids.cuda()).logits.float().cpu()
        cache = half.new_cache(2, 40)
        parts = [half(part, cache=cache).logits for part in ids.cuda().split([25, 1, 1, 13], dim=1)]
    stepwise = torch.cat(parts, dim=1).float().cpu()
    for logits in (whole, stepwise):
        distance = (logits - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert distance.median() < 0.05
