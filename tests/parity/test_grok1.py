"""Grok-1, which transformers lacks, against the published code's equations written out by hand.

The reference reads the published tensor names and shares no code with the zoo. Row 18 of the correctness table:
scores are scaled, capped and only then masked; scores of experts come from a softmax over all of them and stay as they
are; embedding and logits are multiplied; norms stand before and after both halves of a block.

Shapes: S sequence, D model, F expert width, E experts, K top-k, H query heads, G key/value heads, d size of a head.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_cases import relative_difference
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo.accounting import count_parameters
from zoo.families import get_family
from zoo.model import Decoder
from zoo.registry import find_spec, read_json
from zoo.weights import export_checkpoint, import_checkpoint

VOCAB, D, FFN, E, K, HEADS, GROUPS, HEAD = 200, 48, 24, 6, 2, 4, 2, 12
CAP, EMBEDDING, OUTPUT = 2.0, 5.0, 0.5773502691896257

CONFIG = {
    "architectures": ["Grok1ModelForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_grok1.Grok1Config"},
    "model_type": "grok-1",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": FFN,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "num_experts": E,
    "num_experts_per_tok": K,
    "attn_output_multiplier": HEAD**-0.5,
    "max_attn_value": CAP,
    "embedding_multiplier_scale": EMBEDDING,
    "output_multiplier_scale": OUTPUT,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "torch_dtype": "float32",
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Weights = dict[str, Tensor]


def random_weights() -> Weights:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 0.2) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    weights = {"model.embed_tokens.weight": draw(VOCAB, D), "model.norm.scale": 1 + draw(D)}
    for layer in range(3):
        name = f"model.layers.{layer}"
        for norm in ("pre_attn", "post_attn", "pre_moe", "post_moe"):
            weights[f"{name}.{norm}_norm.scale"] = 1 + draw(D)
        for part, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            weights[f"{name}.attn.{part}_proj.weight"] = draw(heads * HEAD, D)
        weights[f"{name}.attn.o_proj.weight"] = draw(D, HEADS * HEAD)
        weights[f"{name}.moe_block.gate.weight"] = draw(E, D)
        for expert in range(E):
            for part, shape in (("linear", (FFN, D)), ("linear_v", (FFN, D)), ("linear_1", (D, FFN))):
                weights[f"{name}.moe_block.experts.{expert}.{part}.weight"] = draw(*shape)
    return weights


def reference(weights: Weights, ids: Tensor) -> Tensor:
    """Logits [S, V] of one sequence of ids [S]."""
    embedding = weights["model.embed_tokens.weight"]
    h = embedding[ids] * EMBEDDING
    for layer in range(3):
        name = f"model.layers.{layer}"
        pre_attn, post_attn, pre_moe, post_moe = (
            weights[f"{name}.{norm}_norm.scale"] for norm in ("pre_attn", "post_attn", "pre_moe", "post_moe")
        )
        h = h + rms_norm(attention(weights, f"{name}.attn", rms_norm(h, pre_attn)), post_attn)
        h = h + rms_norm(moe(weights, f"{name}.moe_block", rms_norm(h, pre_moe)), post_moe)
    return rms_norm(h, weights["model.norm.scale"]) @ embedding.T * OUTPUT


def attention(weights: Weights, name: str, x: Tensor) -> Tensor:
    q, k, v = (x @ weights[f"{name}.{part}_proj.weight"].T for part in "qkv")
    heads = []
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        own, shared = slice(head * HEAD, (head + 1) * HEAD), slice(group * HEAD, (group + 1) * HEAD)
        scores = rotated(q[:, own]) @ rotated(k[:, shared]).T / math.sqrt(HEAD)
        scores = CAP * torch.tanh(scores / CAP)
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        heads.append(torch.softmax(scores.masked_fill(future, -1e30), dim=-1) @ v[:, shared])
    return torch.cat(heads, dim=-1) @ weights[f"{name}.o_proj.weight"].T


def moe(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Every expert computes every token: Σ over e of p(e) · expert(x), p of all but the K best set to 0."""
    probabilities = torch.softmax(x @ weights[f"{name}.gate.weight"].T, dim=1)
    worst_chosen = probabilities.sort(dim=1, descending=True).values[:, K - 1 : K]
    gates = torch.where(probabilities >= worst_chosen, probabilities, 0.0)
    return sum((gates[:, e, None] * expert(weights, f"{name}.experts.{e}", x) for e in range(E)), torch.zeros(D))


def expert(weights: Weights, name: str, x: Tensor) -> Tensor:
    gate = x @ weights[f"{name}.linear.weight"].T
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (gelu * (x @ weights[f"{name}.linear_v.weight"].T)) @ weights[f"{name}.linear_1.weight"].T


def rotated(x: Tensor) -> Tensor:
    """Pair i with i + d/2 and turn it by position · 10000^(−2i/d)."""
    size = x.shape[1]
    frequencies = torch.tensor([10_000.0 ** (-2 * i / size) for i in range(size // 2)])
    angles = torch.arange(len(x))[:, None] * frequencies
    a, b = x[:, : size // 2], x[:, size // 2 :]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=1)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * scale


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


@pytest.fixture(scope="module")
def directory(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("grok1")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights, directory / "model.safetensors")
    return directory


def tokens(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits(weights: Weights, directory: Path) -> None:
    ids = tokens(250)
    out = zoo.load(directory)(ids[None])
    assert relative_difference(out.logits[0], reference(weights, ids)) < 1e-5
    for routing in out.router_outputs:
        assert len(routing.experts.unique()) == E
        # Renormalised weights would not show in the logits: the norm after the experts takes any factor out again.
        torch.testing.assert_close(routing.weights, routing.logits.softmax(-1).topk(K).values)


def test_every_gradient(weights: Weights, directory: Path) -> None:
    ids = tokens(40)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    F.cross_entropy(reference(leaves, ids)[:-1], ids[1:]).backward()
    model = zoo.load(directory)
    F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}

    def read(name: str) -> Tensor:
        gradient = leaves[name].grad
        assert gradient is not None, name
        return gradient

    for op in get_family("grok1").weight_map(find_spec(directory).model):
        for name, expected in op.to_zoo(read):
            ours = gradients.pop(name)
            assert ours is not None, name
            assert (ours - expected).abs().max() / expected.abs().max() < 1e-4, name
    assert not gradients


@torch.no_grad()
def test_padded_batch_packed_documents_and_cache(weights: Weights, directory: Path) -> None:
    model, lengths = zoo.load(directory), (30, 7, 1, 19)
    parts = list(tokens(sum(lengths)).split(lengths))
    expected = [reference(weights, part) for part in parts]
    document_ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    packed = model(torch.cat(parts)[None], document_ids=document_ids).logits[0]
    assert relative_difference(packed, torch.cat(expected)) < 1e-5
    for side in ("left", "right"):
        ids, mask = torch.zeros(4, 30, dtype=torch.int64), torch.zeros(4, 30, dtype=torch.bool)
        for row, part in enumerate(parts):
            place = slice(30 - len(part), None) if side == "left" else slice(len(part))
            ids[row, place], mask[row, place] = part, True
        assert relative_difference(model(ids, attention_mask=mask).logits[mask], torch.cat(expected)) < 1e-5
    cache = model.new_cache(1, 30)
    steps = [model(token[None, None], cache=cache).logits[0] for token in parts[0]]
    assert relative_difference(torch.cat(steps), expected[0]) < 1e-5


@torch.no_grad()
def test_greedy_generation(weights: Weights, directory: Path) -> None:
    prompt = [3, 141, 59]
    (new,) = zoo.generate(zoo.load(directory), [prompt], max_new_tokens=64)
    logits = reference(weights, torch.tensor(prompt + new))
    assert new == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    ("block", "change"),
    [
        ("attention", {"logit_softcap": None}),
        (None, {"ffn": "swiglu"}),
        (None, {"embedding_multiplier": None}),
        (None, {"logit_multiplier": None}),
    ],
)
def test_a_mistake_would_be_seen(block: str | None, change: dict[str, Any], weights: Weights, directory: Path) -> None:
    right, ids = zoo.load(directory), tokens(60)
    part = dataclasses.replace(getattr(right.config, block), **change) if block else None
    wrong = Decoder(dataclasses.replace(right.config, **({block: part} if block else change)))
    wrong.load_state_dict(right.state_dict())
    assert relative_difference(wrong(ids[None]).logits[0], reference(weights, ids)) > 1e-3


def test_export_gives_back_the_published_directory(directory: Path, tmp_path: Path) -> None:
    import_checkpoint(directory, tmp_path / "zoo")
    export_checkpoint(tmp_path / "zoo", tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "again")
    first, again = (tmp_path / name / "model.safetensors" for name in ("zoo", "again"))
    assert first.read_bytes() == again.read_bytes()
    exported = read_json(tmp_path / "hf" / "config.json")
    not_of_the_model = {"auto_map", "output_router_logits", "router_aux_loss_coef", "use_cache"}
    token_ids = {"pad_token_id", "bos_token_id", "eos_token_id"}  # of the tokenizer, which this directory lacks
    maths = CONFIG.keys() - not_of_the_model - token_ids
    assert {key: exported[key] for key in maths} == {key: CONFIG[key] for key in maths}


def test_published_config() -> None:
    sizes = {
        "vocab_size": 131072,
        "hidden_size": 6144,
        "intermediate_size": 32768,
        "num_hidden_layers": 64,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "attn_output_multiplier": 0.08838834764831845,
        "max_attn_value": 30.0,
        "embedding_multiplier_scale": 78.38367176906169,
        "max_position_embeddings": 8192,
        "num_experts": 8,
    }
    assert get_family("grok1").from_hf(CONFIG | sizes) == find_spec("grok-1").model
    with pytest.raises(ValueError, match=r"attn_output_multiplier = 1\.0 is not supported"):
        get_family("grok1").from_hf(CONFIG | {"attn_output_multiplier": 1.0})


def test_published_size() -> None:
    """The printed 314B are those without the embedding, digits cut off, and the printed quarter that is active is two
    experts of eight: with attention and the output head a token uses 83.8B, 27%."""
    parameters = count_parameters(find_spec("grok-1").model)
    attention = 2 * 6144 * 6144 + 2 * 6144 * 1024
    layer = attention + 8 * 3 * 6144 * 32768 + 8 * 6144 + 4 * 6144
    assert parameters.total == 64 * layer + 6144 + 131072 * 6144 == 315_684_820_992
    assert (parameters.total - parameters.embedding) // 10**9 == 314
    experts = 64 * 8 * 3 * 6144 * 32768
    assert parameters.active == parameters.total - experts + experts // 4 == 83_756_587_008
