"""The decoder: caches against full recomputation, padding, packing, MLA's two forms; rows 14 to 16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from zoo.config import AttentionConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnScaling
from zoo.layers.mla import MLA
from zoo.layers.sequence import sequence_layout
from zoo.model import Decoder, build
from zoo.registry import find_spec, model_names, paper_names

MLA_CONFIG = MLAConfig(
    num_heads=4, kv_lora_rank=16, q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
)
YARN = YarnScaling(
    factor=4.0, original_max_position=8, beta_fast=32.0, beta_slow=1.0, attention_factor=0.93, mscale_all_dim=1.3
)


def config(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 3,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "norm_eps": 1e-6,
        "rope": RopeConfig(theta=1e4),
        "initializer_range": 0.2,
    }
    return ModelConfig(**{**base, **changes})


MODELS = {
    "gqa": config(attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)),
    "bias, norm, window": config(
        attention=AttentionConfig(
            num_heads=4, num_kv_heads=4, head_dim=8, qkv_bias=True, output_bias=True, qk_norm="head", sliding_window=5
        ),
        tie_word_embeddings=True,
    ),
    "mla, yarn, moe": config(
        mla=MLA_CONFIG,
        rope=RopeConfig(theta=1e4, layout="interleaved", yarn=YARN),
        moe=MoEConfig(
            num_experts=8,
            top_k=2,
            moe_intermediate_size=16,
            score_func="sigmoid",
            norm_topk_prob=True,
            num_groups=4,
            top_k_groups=2,
            group_score="top2_sum",
            router_bias=True,
            num_shared_experts=1,
            first_k_dense=1,
        ),
    ),
    "mla without q latent": config(mla=replace(MLA_CONFIG, q_lora_rank=None)),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Decoder:
    return build(MODELS[request.param], dtype=torch.float64)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 64, shape)


@torch.no_grad()
def test_cached_steps_equal_recomputation(model: Decoder) -> None:
    tokens = ids(2, 14)
    full = model(tokens).logits
    cache = model.new_cache(2, 14)
    steps = [model(part, cache=cache).logits for part in tokens.split([6, 3, 1, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full)
    assert cache.length == 14


@torch.no_grad()
def test_cropping_the_cache_forgets(model: Decoder) -> None:
    tokens, other = ids(1, 10), ids(1, 4)
    cache = model.new_cache(1, 10)
    model(tokens, cache=cache)
    cache.crop(6)
    expected = model(torch.cat((tokens[:, :6], other), dim=1)).logits[:, 6:]
    torch.testing.assert_close(model(other, cache=cache).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: Decoder, side: str) -> None:
    tokens, lengths = ids(3, 9), [9, 5, 1]
    mask = torch.zeros(3, 9, dtype=torch.long)
    spans = []
    for row, length in enumerate(lengths):
        span = slice(9 - length, 9) if side == "left" else slice(0, length)
        mask[row, span] = 1
        spans.append(span)
    logits = model(tokens, mask).logits
    assert logits.isfinite().all()
    for row, span in enumerate(spans):
        torch.testing.assert_close(logits[row, span], model(tokens[row : row + 1, span]).logits[0])


@torch.no_grad()
def test_left_padded_rows_decode_as_if_alone(model: Decoder) -> None:
    tokens, mask = ids(2, 6), torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    cache = model.new_cache(2, 9)
    model(tokens, mask, cache=cache)
    new = ids(2, 3)
    steps = torch.cat([model(token, cache=cache).logits for token in new.split(1, dim=1)], dim=1)
    for row, start in ((0, 0), (1, 3)):
        alone = torch.cat((tokens[row, start:], new[row]))[None]
        torch.testing.assert_close(steps[row], model(alone).logits[0, -3:])


def test_packed_documents_equal_separate_ones_in_value_and_gradient(model: Decoder) -> None:
    tokens = ids(1, 12)
    documents = torch.tensor([[0] * 3 + [1] * 7 + [2] * 2])
    weights = torch.randn(12, 64, dtype=torch.float64)
    packed = model(tokens, document_ids=documents).logits[0]
    got = torch.autograd.grad((packed * weights).sum(), list(model.parameters()), allow_unused=True)
    separate = torch.cat([model(part).logits[0] for part in tokens.split([3, 7, 2], dim=1)])
    want = torch.autograd.grad((separate * weights).sum(), list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(packed, separate)
    torch.testing.assert_close(got, want)


@torch.no_grad()
def test_no_later_token_changes_an_earlier_output(model: Decoder) -> None:
    tokens = ids(1, 10)
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 64
    torch.testing.assert_close(model(changed).logits[:, :7], model(tokens).logits[:, :7])


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones(model: Decoder) -> None:
    tokens = ids(2, 7)
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, model(tokens).logits[:, -2:])


@pytest.mark.parametrize("name", [name for name in (*model_names(), *paper_names()) if name.endswith("-tiny")])
@torch.no_grad()
def test_the_last_positions_alone_are_as_among_all(name: str) -> None:
    small = replace(find_spec(name).model, vocab_size=64, initializer_range=0.1)
    model = build(small, dtype=torch.float64).eval()
    tokens = ids(3, 12)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    whole = model(tokens, mask)
    for last in (1, 3, 12):
        part = model(tokens, mask, last=last)
        torch.testing.assert_close(part.hidden[mask[:, -last:] != 0], whole.hidden[:, -last:][mask[:, -last:] != 0])
        torch.testing.assert_close(part.logits[:, -1], whole.logits[:, -1])

    routing = small.moe.routing if small.moe else None
    if routing is not None and (not routing.causal or routing.eval_capacity_factor is not None):
        return  # places in the experts are given among the tokens of one forward
    caches = [model.new_cache(3, 14) for _ in range(2)]
    for cache, last in zip(caches, (2, None), strict=True):
        model(tokens[:, :5], mask[:, :5], cache=cache, last=last)
        part = model(tokens[:, 5:], mask[:, 5:], cache=cache, last=last)
        torch.testing.assert_close(part.hidden[:, -2:], whole.hidden[:, -2:])
    torch.testing.assert_close(*(model(tokens[:, :2], cache=cache).logits for cache in caches))


@torch.no_grad()
def test_the_last_positions_are_refused_where_all_are_needed(model: Decoder) -> None:
    with pytest.raises(ValueError, match="last = 2 with mtp or document_ids"):
        model(ids(1, 4), document_ids=torch.zeros(1, 4, dtype=torch.long), last=2)


def test_cache_refuses_what_does_not_fit(model: Decoder) -> None:
    cache = model.new_cache(2, 4)
    with pytest.raises(ValueError, match="max_length >= 5"):
        model(ids(2, 5), cache=cache)
    with pytest.raises(ValueError, match="batch_size = 2"):
        model(ids(1, 2), cache=cache)
    with pytest.raises(ValueError, match="length = 3"):
        cache.crop(3)


def test_row_16_mla_caches_the_latent_only() -> None:
    model = build(MODELS["mla, yarn, moe"])
    cache = model.new_cache(2, 10)
    assert cache.bytes == 3 * 2 * 10 * (16 + 4) * 4
    assert build(MODELS["gqa"]).new_cache(2, 10).bytes == 3 * 2 * 10 * 2 * (2 * 8) * 4


@pytest.mark.parametrize("name", ["mla, yarn, moe", "mla without q latent"])
@pytest.mark.parametrize("padded", [False, True])
def test_row_16_absorbed_equals_expanded(name: str, padded: bool) -> None:
    layer = build(MODELS[name], dtype=torch.float64).layers[0].mixer
    assert isinstance(layer, MLA)
    batch, past, new = 2, 5, 3
    valid = torch.ones(batch, past, dtype=torch.bool)
    valid[1, :2] = not padded
    layout = sequence_layout(
        torch.zeros(batch, new, dtype=torch.long),
        attention_mask=None,
        document_ids=None,
        past=past,
        past_valid=valid if padded else None,
    )
    q_nope, q_rope = torch.randn(batch, new, 4, 8).double(), torch.randn(batch, new, 4, 4).double()
    keys = torch.randn(batch, past + new, 20).double()
    torch.testing.assert_close(
        layer.absorbed(q_nope, q_rope, keys, layout), layer.expanded(q_nope, q_rope, keys, layout)
    )


def test_row_15_softmax_scale_has_the_squared_mscale() -> None:
    layer = build(MODELS["mla, yarn, moe"]).layers[0].mixer
    assert isinstance(layer, MLA)
    mscale = 0.1 * 1.3 * torch.tensor(4.0).log().item() + 1
    assert layer.scale == pytest.approx(mscale**2 / 12**0.5, rel=1e-6)


def test_meta_device_allocates_nothing_and_counts_everything() -> None:
    with torch.device("meta"):
        model = Decoder(MODELS["mla, yarn, moe"])
    assert all(p.is_meta for p in model.parameters())
    real = build(MODELS["mla, yarn, moe"])
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


def test_router_outputs_are_one_per_moe_layer() -> None:
    out = build(MODELS["mla, yarn, moe"])(ids(2, 5))
    assert [tuple(r.logits.shape) for r in out.router_outputs] == [(10, 8)] * 2
    assert build(MODELS["gqa"])(ids(2, 5)).router_outputs == ()
