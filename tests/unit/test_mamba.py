"""Mamba layers: the chunked scan against one token after the other, and the cache against full recomputation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import AttentionConfig, MambaConfig, ModelConfig, MoEConfig
from zoo.layers.mamba import CHUNK, DT_RANGE, selective_scan, selective_scan_loop
from zoo.layers.sequence import sequence_layout
from zoo.model import Decoder, build

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_layers=4,
    intermediate_size=24,
    max_position_embeddings=128,
    norm_eps=1e-6,
    rope=None,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
    mamba=MambaConfig(attention_interval=3, attention_offset=1, state_size=4, expand=2, conv_width=4, dt_rank=3),
    moe=MoEConfig(
        num_experts=4,
        top_k=2,
        moe_intermediate_size=12,
        score_func="softmax",
        norm_topk_prob=False,
        layer_interval=2,
    ),
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return build(CONFIG, dtype=torch.float64)


def tokens(*shape: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [1, CHUNK, 2 * CHUNK + 5])
@pytest.mark.parametrize("speed", [0.1, 300.0], ids=["slow", "fast"])
def test_the_chunked_scan_is_the_loop(length: int, speed: float) -> None:
    """In values, in the last state and in every gradient; decays of e^-300 overflow nothing."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    u, dt, b, c, state = (
        draw(2, length, 3),
        draw(2, length, 3).exp(),
        draw(2, length, 4),
        draw(2, length, 4),
        draw(2, 3, 4),
    )
    leaves = [tensor.requires_grad_() for tensor in (u, dt, -speed * draw(3, 4).exp(), b, c)]
    kept = (draw(2, length) > -1).double()
    state.requires_grad_()
    grad_y, grad_state = draw(2, length, 3), draw(2, 3, 4)
    expected, found = (
        [*out, *torch.autograd.grad(out, (*leaves, state), (grad_y, grad_state))]
        for out in (scan(*leaves, kept, state) for scan in (selective_scan_loop, selective_scan))
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_what_is_kept_for_the_backward_pass_does_not_hold_the_states() -> None:
    """N = 64 numbers a channel and token, of which only those between chunks may stay."""
    length, channels, states = 8 * CHUNK, 32, 64
    args = [torch.rand(1, length, channels), torch.rand(1, length, channels), -torch.rand(channels, states)]
    args += [torch.rand(1, length, states), torch.rand(1, length, states), torch.ones(1, length)]
    saved: list[int] = []
    leaves = [tensor.requires_grad_() for tensor in args[:-1]]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y, _ = selective_scan(*leaves, args[-1], torch.zeros(1, channels, states))
    assert sum(saved) < length * channels * states / 4
    y.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


@torch.no_grad()
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_every_cached_step_is_the_full_recomputation(model: Decoder, side: str) -> None:
    """Also behind a padded prompt: with padding on the right, tokens go on behind it."""
    prompt, total = 9, CHUNK + 5
    ids, mask = tokens(3, total), torch.ones(3, total, dtype=torch.bool)
    for row, length in enumerate((9, 4, 1) if side != "none" else ()):
        mask[row, slice(0, prompt - length) if side == "left" else slice(length, prompt)] = False
    cache = model.new_cache(3, total)
    logits = [model(ids[:, :prompt], attention_mask=mask[:, :prompt], cache=cache).logits]
    for step in range(prompt, total):
        logits.append(model(ids[:, step : step + 1], cache=cache).logits)
        seen = zip(ids[:, : step + 1], mask[:, : step + 1], strict=True)
        alone = [model(row[valid][None]).logits[0, -1] for row, valid in seen]
        torch.testing.assert_close(logits[-1][:, 0], torch.stack(alone), rtol=1e-9, atol=1e-9)
    full = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.cat(logits, dim=1)[mask], full[mask], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_branch_and_kept_rows_go_on_from_the_state(model: Decoder) -> None:
    ids = tokens(2, 20)
    cache = model.new_cache(2, 20)
    model(ids[:, :12], cache=cache)
    branch = cache.branch(torch.tensor([1, 1, 0]), 20)
    expected = model(ids).logits[:, 12:]
    found = model(ids[[1, 1, 0], 12:], cache=branch).logits
    torch.testing.assert_close(found, expected[[1, 1, 0]], rtol=1e-9, atol=1e-9)
    cache.keep_rows(torch.tensor([1]))
    torch.testing.assert_close(model(ids[1:, 12:], cache=cache).logits, expected[1:], rtol=1e-9, atol=1e-9)


def test_a_state_cannot_be_cropped(model: Decoder) -> None:
    cache = model.new_cache(1, 8)
    model(tokens(1, 4), cache=cache)
    cache.crop(4)
    with pytest.raises(ValueError, match=r"length = 3: a recurrent layer cannot forget tokens"):
        cache.crop(3)


def test_packed_documents_have_the_gradients_of_documents_alone(model: Decoder) -> None:
    """States and convolutions begin anew at each border, wherever in a chunk it lies, and skip padding in between."""
    lengths = (5, CHUNK + 3, 1, 2, 20)
    ids = tokens(1, sum(lengths))
    document_ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    padded = torch.cat((ids[:, :41], tokens(1, 3), ids[:, 41:]), dim=1)
    ids_with_padding = torch.cat((document_ids[:, :41], torch.full((1, 3), 9), document_ids[:, 41:]), dim=1)
    mask = ids_with_padding != 9
    parts = ids.split(lengths, dim=1)
    gradients = []
    for outputs in (
        lambda: model(ids, document_ids=document_ids).logits[0],
        lambda: model(padded, document_ids=ids_with_padding, attention_mask=mask).logits[mask],
        lambda: torch.cat([model(part).logits[0] for part in parts]),
    ):
        model.zero_grad()
        F.cross_entropy(outputs(), ids[0]).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for found in gradients[:2]:
        for name, expected in gradients[2].items():
            torch.testing.assert_close(found[name], expected, rtol=1e-8, atol=1e-10, msg=name)


def test_the_order_puts_padding_last_and_counts_from_each_border() -> None:
    document_ids = torch.tensor([[4, 4, 9, 7, 7, 7]])
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
    layout = sequence_layout(
        torch.zeros_like(mask), attention_mask=mask, document_ids=document_ids, past=0, past_valid=None
    )
    order = layout.recurrent_order
    assert order is not None
    assert order.index.tolist() == [[0, 1, 3, 4, 5, 2]]
    assert order.inverse.tolist() == [[0, 1, 5, 2, 3, 4]]
    assert order.valid.tolist() == [[True] * 5 + [False]]
    assert order.age[0, 2:5].tolist() == [0, 1, 2]
    assert (order.age[0, :2] >= 6).all()


def test_first_values() -> None:
    mixer = build(CONFIG).layers[0].mixer
    assert torch.equal(mixer.state_space.A_log.exp().round(), torch.arange(1.0, 5.0).expand(32, 4))
    dt = F.softplus(mixer.state_space.dt_bias)
    assert (dt >= DT_RANGE[0] * 0.99).all() and (dt <= DT_RANGE[1] * 1.01).all() and dt.std() > 0
    assert torch.equal(mixer.state_space.D, torch.ones(32))
    assert 0.3 < mixer.conv1d.weight.abs().max() <= 0.5
