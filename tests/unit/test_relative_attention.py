"""Attention with a bias for every head and distance, against its equation written out token by token.

Buckets are those of transformers' T5. Shapes: B batch, S sequence, H heads, d head size.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from zoo.config import AttentionConfig, ModelConfig, RelativePositionConfig
from zoo.generation import generate
from zoo.layers.relative_attention import RelativeAttention
from zoo.layers.sequence import sequence_layout
from zoo.model import Decoder, build

BUCKETS, FURTHEST = 8, 12
"""So small that sequences of the tests reach the last bucket."""

HEADS = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    relative_positions=RelativePositionConfig(num_buckets=BUCKETS, max_distance=FURTHEST),
)
CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    intermediate_size=24,
    max_position_embeddings=64,
    norm_eps=1e-6,
    rope=None,
    attention=HEADS,
    initializer_range=0.4,
)
LENGTH = 20

MASK = torch.ones(3, LENGTH, dtype=torch.int64)
MASK[1, :5], MASK[2, -4:], MASK[2, 6] = 0, 0, 0
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 11, [3] * 20, [1] * 4 + [2] * 3 + [3] * 13])

LAYOUTS = {
    "whole": {},
    "padded left, right and between": {"attention_mask": MASK},
    "packed": {"document_ids": DOCUMENTS},
    "packed and padded": {"document_ids": DOCUMENTS, "attention_mask": MASK},
}


def written_out(layer: RelativeAttention, x: Tensor, mask: Tensor, documents: Tensor, scale: float) -> Tensor:
    """Σ_j softmax_j(scale · q_i · k_j + b[bucket(p_i - p_j)]) v_j over tokens j ≤ i of the same document, then o.

    Positions p count the tokens of a document, padding left out. Rows of padding are 0.
    """
    out = torch.zeros_like(x)
    for row in range(len(x)):
        q, k, v = (
            projection(x[row]).unflatten(-1, (-1, layer.head_dim))
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        group = q.shape[1] // k.shape[1]
        for i in [i for i in range(x.shape[1]) if mask[row, i]]:
            seen = [j for j in range(i + 1) if mask[row, j] and documents[row, j] == documents[row, i]]
            behind = torch.tensor([sum(int(mask[row, between]) for between in range(j, i)) for j in seen])
            bucket = T5Attention._relative_position_bucket(-behind, False, BUCKETS, FURTHEST)
            heads = []
            for head in range(q.shape[1]):
                scores = scale * k[seen, head // group] @ q[i, head] + layer.position_bias.weight[bucket, head]
                heads.append(scores.softmax(-1) @ v[seen, head // group])
            out[row, i] = layer.o_proj(torch.cat(heads))
    return out


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_equation_and_every_gradient(case: str) -> None:
    given = LAYOUTS[case]
    mask = given.get("attention_mask", torch.ones_like(MASK))
    documents = given.get("document_ids", torch.zeros_like(MASK))
    layer = RelativeAttention(CONFIG, 0).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layout = sequence_layout(
        torch.zeros_like(MASK),
        attention_mask=given.get("attention_mask"),
        document_ids=given.get("document_ids"),
        past=0,
        past_valid=None,
    )
    x = torch.randn(3, LENGTH, CONFIG.hidden_size, dtype=torch.float64, requires_grad=True)
    valid = mask.bool().unsqueeze(-1)
    ours = layer(x, layout, (x, x), None) * valid
    theirs = written_out(layer, x, mask, documents, HEADS.head_dim**-0.5)
    torch.testing.assert_close(ours, theirs)
    leaves, upstream = [x, *layer.parameters()], torch.randn_like(ours) * valid
    for got, want in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(got, want)
    assert torch.autograd.grad((layer(x, layout, (x, x), None) * upstream).sum(), layer.position_bias.weight)[0].all()


def test_unscaled_scores_are_those_of_a_query_scale_of_1() -> None:
    layer = RelativeAttention(dataclasses.replace(CONFIG, attention=dataclasses.replace(HEADS, query_scale_dim=1)), 0)
    for parameter in layer.double().parameters():
        torch.nn.init.normal_(parameter)
    x, mask = torch.randn(1, 5, CONFIG.hidden_size, dtype=torch.float64), torch.ones(1, 5, dtype=torch.int64)
    layout = sequence_layout(mask, attention_mask=None, document_ids=None, past=0, past_valid=None)
    torch.testing.assert_close(layer(x, layout, (x, x), None), written_out(layer, x, mask, mask, 1.0))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return build(CONFIG, dtype=torch.float64).eval()


@torch.no_grad()
def test_the_cache_gives_what_full_recomputation_does_at_every_step(model: Decoder) -> None:
    ids = torch.randint(40, (3, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :6] = 0
    whole = model(ids, mask).logits
    for prompt in (7, 1):
        cache = model.new_cache(3, LENGTH)
        steps = [model(ids[:, :prompt], mask[:, :prompt], cache=cache).logits]
        for i in range(prompt, LENGTH):
            steps.append(model(ids[:, i : i + 1], mask[:, i : i + 1], cache=cache).logits)
            torch.testing.assert_close(steps[-1][:, 0], model(ids[:, : i + 1], mask[:, : i + 1]).logits[:, -1])
        torch.testing.assert_close(torch.cat(steps, 1)[mask.bool()], whole[mask.bool()])
    late = model.new_cache(3, LENGTH)
    model(ids[:, :9], mask[:, :9], cache=late)
    torch.testing.assert_close(model(ids[:, 9:], mask[:, 9:], cache=late, last=4).logits, whole[:, -4:])


def test_padded_prompts_generate_what_they_do_alone(model: Decoder) -> None:
    prompts = [torch.randint(40, (length,)).tolist() for length in (3, 9, 14)]
    together = generate(model, prompts, max_new_tokens=LENGTH)
    assert together == [generate(model, [prompt], max_new_tokens=LENGTH)[0] for prompt in prompts]


@torch.no_grad()
def test_packed_documents_are_as_they_are_alone(model: Decoder) -> None:
    ids = torch.randint(40, (1, LENGTH))
    packed = model(ids, document_ids=DOCUMENTS[:1]).logits
    torch.testing.assert_close(packed[:, :9], model(ids[:, :9]).logits)
    torch.testing.assert_close(packed[:, 9:], model(ids[:, 9:]).logits)


@torch.no_grad()
def test_order_and_distance_matter_up_to_the_last_bucket(model: Decoder) -> None:
    """To one layer, tokens in the last bucket are a set; those nearer are not."""
    ids = torch.randint(40, (1, LENGTH))
    far, near = ids.clone(), ids.clone()
    far[0, [0, 1]], near[0, [-2, -3]] = ids[0, [1, 0]], ids[0, [-3, -2]]
    single = dataclasses.replace(CONFIG, num_layers=1)
    alone = build(single, dtype=torch.float64).eval()
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("layers.1.")})
    last = alone(ids).hidden[:, -1]
    torch.testing.assert_close(alone(far).hidden[:, -1], last)
    assert not torch.allclose(alone(near).hidden[:, -1], last)
