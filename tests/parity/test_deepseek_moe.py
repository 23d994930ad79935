"""DeepSeekMoE-16B, which transformers lacks, against its paper's equations written out with plain loops.

The reference reads the published tensor names and shares no code with the zoo. Equation numbers are those of
arXiv 2401.06066; attention is Llama's (arXiv 2302.13971) with rotary positions on split halves, as published.

Shapes: S sequence, D model, F expert width, E routed experts, K top-k, H heads, d size of a head, V vocabulary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_cases import relative_difference
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo.families import get_family
from zoo.registry import find_spec, read_json
from zoo.weights import export_checkpoint, import_checkpoint

CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "model_type": "deepseek",
    "vocab_size": 200,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 80,
    "n_routed_experts": 10,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": None,
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Every field of the published config.json, at a small size."""

D, E, K, HEADS = 48, 10, 3, 4

Weights = dict[str, Tensor]


def random_weights() -> Weights:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 0.12) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    def swiglu(prefix: str, width: int) -> Weights:
        return {
            f"{prefix}.gate_proj.weight": draw(width, D),
            f"{prefix}.up_proj.weight": draw(width, D),
            f"{prefix}.down_proj.weight": draw(D, width),
        }

    weights = {
        "model.embed_tokens.weight": draw(200, D),
        "model.norm.weight": 1 + draw(D),
        "lm_head.weight": draw(200, D),
    }
    for layer in range(3):
        name = f"model.layers.{layer}"
        weights |= {f"{name}.self_attn.{part}_proj.weight": draw(D, D) for part in "qkvo"}
        weights |= {f"{name}.{norm}_layernorm.weight": 1 + draw(D) for norm in ("input", "post_attention")}
        if layer < 1:
            weights |= swiglu(f"{name}.mlp", 80)
            continue
        weights[f"{name}.mlp.gate.weight"] = draw(E, D, scale=0.5)
        for expert in range(E):
            weights |= swiglu(f"{name}.mlp.experts.{expert}", 24)
        weights |= swiglu(f"{name}.mlp.shared_experts", 2 * 24)
    return weights


def reference(weights: Weights, ids: Tensor) -> Tensor:
    """Logits [S, V] of one sequence of ids [S]."""
    hidden = weights["model.embed_tokens.weight"][ids]
    for layer in range(3):
        name = f"model.layers.{layer}"
        u = hidden + attention(
            weights, f"{name}.self_attn", rms_norm(hidden, weights[f"{name}.input_layernorm.weight"])
        )
        x = rms_norm(u, weights[f"{name}.post_attention_layernorm.weight"])
        hidden = u + (ffn(weights, f"{name}.mlp", x) if layer < 1 else moe(weights, f"{name}.mlp", x))
    return rms_norm(hidden, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def moe(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Equations 9 to 11 without the residual: Σ shared FFNs + Σ_i g_i · FFN_i, g_i = s_i where s_i is in the top K."""
    out = []
    for u in x:
        scores = torch.softmax(weights[f"{name}.gate.weight"] @ u, dim=0)
        best = sorted(range(E), key=lambda i: -scores[i].item())[:K]
        h = ffn(weights, f"{name}.shared_experts", u)
        for i in best:
            h = h + scores[i] * ffn(weights, f"{name}.experts.{i}", u)
        out.append(h)
    return torch.stack(out)


def ffn(weights: Weights, name: str, x: Tensor) -> Tensor:
    """SwiGLU: down(silu(gate x) · up x)."""
    gate, up, down = (weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def attention(weights: Weights, name: str, x: Tensor) -> Tensor:
    size = D // HEADS
    q, k, v = (x @ weights[f"{name}.{part}_proj.weight"].T for part in "qkv")
    heads = []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = rotated(q[:, part]) @ rotated(k[:, part]).T / math.sqrt(size)
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        heads.append(torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v[:, part])
    return torch.cat(heads, dim=-1) @ weights[f"{name}.o_proj.weight"].T


def rotated(x: Tensor) -> Tensor:
    """Pair i with i + d/2 and turn it by position · 10000^(−2i/d)."""
    half = x.shape[1] // 2
    out = torch.empty_like(x)
    for position in range(x.shape[0]):
        for i in range(half):
            angle = position * 10000.0 ** (-2 * i / x.shape[1])
            a, b = x[position, i], x[position, i + half]
            out[position, i] = a * math.cos(angle) - b * math.sin(angle)
            out[position, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


@pytest.fixture(scope="module")
def directory(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deepseek-moe")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights, directory / "model.safetensors")
    return directory


def test_logits(weights: Weights, directory: Path) -> None:
    ids = torch.randint(200, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_difference(zoo.load(directory)(ids[None]).logits[0], reference(weights, ids)) < 1e-5


def test_every_gradient(weights: Weights, directory: Path) -> None:
    ids = torch.randint(200, (24,), generator=torch.Generator().manual_seed(2))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    F.cross_entropy(reference(leaves, ids)[:-1], ids[1:]).backward()
    model = zoo.load(directory)
    F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}

    def read(name: str) -> Tensor:
        gradient = leaves[name].grad
        return torch.zeros_like(leaves[name]) if gradient is None else gradient  # an expert that got no token

    for op in get_family("deepseek_moe").weight_map(find_spec(directory).model):
        for name, expected in op.to_zoo(read):
            ours = gradients.pop(name)
            assert ours is not None, name
            assert (ours - expected).abs().max() / expected.abs().max() < 1e-4, name
    assert not gradients


@torch.no_grad()
def test_padded_batch_and_packed_documents(weights: Weights, directory: Path) -> None:
    model, lengths = zoo.load(directory), (20, 7, 1)
    parts = list(torch.randint(200, (sum(lengths),), generator=torch.Generator().manual_seed(3)).split(lengths))
    expected = torch.cat([reference(weights, part) for part in parts])
    document_ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    packed = model(torch.cat(parts)[None], document_ids=document_ids).logits[0]
    assert relative_difference(packed, expected) < 1e-5
    for side in ("left", "right"):
        ids, mask = torch.zeros(3, 20, dtype=torch.int64), torch.zeros(3, 20, dtype=torch.bool)
        for row, part in enumerate(parts):
            place = slice(20 - len(part), None) if side == "left" else slice(len(part))
            ids[row, place], mask[row, place] = part, True
        assert relative_difference(model(ids, attention_mask=mask).logits[mask], expected) < 1e-5


@torch.no_grad()
def test_greedy_generation(weights: Weights, directory: Path) -> None:
    prompt = [3, 141, 59]
    (new,) = zoo.generate(zoo.load(directory), [prompt], max_new_tokens=64)
    logits = reference(weights, torch.tensor(prompt + new))
    assert new == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_export_gives_back_the_published_directory(directory: Path, tmp_path: Path) -> None:
    import_checkpoint(directory, tmp_path / "zoo")
    export_checkpoint(tmp_path / "zoo", tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "again")
    first, again = (tmp_path / name / "model.safetensors" for name in ("zoo", "again"))
    assert first.read_bytes() == again.read_bytes()
    exported = read_json(tmp_path / "hf" / "config.json")
    maths = CONFIG.keys() - {"auto_map", "aux_loss_alpha", "seq_aux", "pretraining_tp", "use_cache"}
    token_ids = {"bos_token_id", "eos_token_id"}  # of the tokenizer, which this directory lacks
    assert {key: exported[key] for key in maths - token_ids} == {key: CONFIG[key] for key in maths - token_ids}
