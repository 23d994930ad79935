"""Multi-token prediction against its equations written out (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mtp_models import CONFIG, HEAD, D, E, H, K, V
from torch import Tensor
from training_steps import one_step

from zoo.model import Decoder, build
from zoo.parallel.plan import load_plan, plan_names, resolve
from zoo.parallel.stages import cut
from zoo.training.loss import mtp_nll
from zoo.training.module import ZooModule

DOCUMENTS = [[6, 3, 2], [4, 7]]
"""Lengths of the documents in each row of a batch."""


def batch() -> dict[str, Tensor]:
    """Two rows of 11 tokens in documents; a label is the next token of the same document."""
    ids = torch.randint(0, V, (2, 11), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in DOCUMENTS])
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].where(documents[:, 1:] == documents[:, :-1], -100)
    return {"input_ids": ids, "labels": labels, "document_ids": documents}


# -----------------------------------------------------------------------------------------------------------------
# The reference: one document at a time, token by token
# -----------------------------------------------------------------------------------------------------------------

Parameters = dict[str, Tensor]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt() * weight


def rotated(x: Tensor, position: int) -> Tensor:
    half = HEAD // 2
    angles = torch.tensor([position / 100.0 ** (2 * i / HEAD) for i in range(half)], dtype=x.dtype)
    a, b = x[:half], x[half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()))


def attention(p: Parameters, at: str, x: Tensor) -> Tensor:
    heads = []
    for h in range(H):
        rows = slice(h * HEAD, (h + 1) * HEAD)
        q, k, v = (x @ p[f"{at}.{name}_proj.weight"][rows].T for name in "qkv")
        out = []
        for i in range(len(x)):
            scores = [rotated(q[i], i) @ rotated(k[j], j) / math.sqrt(HEAD) for j in range(i + 1)]
            out.append(torch.stack(scores).softmax(0) @ v[: i + 1])
        heads.append(torch.stack(out))
    return torch.cat(heads, -1) @ p[f"{at}.o_proj.weight"].T


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def moe(p: Parameters, at: str, x: Tensor) -> Tensor:
    out = []
    for token in x:
        scores = (p[f"{at}.router.weight"] @ token).softmax(0)
        best = sorted(range(E), key=lambda e: -scores[e].item())[:K]
        parts = [scores[e] * swiglu(token, *p[f"{at}.experts.gate_up"][e], p[f"{at}.experts.down"][e]) for e in best]
        out.append(sum(parts) / sum(scores[e] for e in best))
    return torch.stack(out)


def block(p: Parameters, at: str, x: Tensor) -> Tensor:
    x = x + attention(p, f"{at}.mixer", rms(x, p[f"{at}.mixer_norm.weight"]))
    y = rms(x, p[f"{at}.ffn_norm.weight"])
    if f"{at}.ffn.router.weight" in p:
        return x + moe(p, f"{at}.ffn", y)
    return x + swiglu(y, *(p[f"{at}.ffn.{name}_proj.weight"] for name in ("gate", "up", "down")))


def predictions(p: Parameters, ids: Tensor) -> list[Tensor]:
    """ids [n] of one document → logits [n, V] of the next token, then [n - 1, V] of the second next, and so on."""
    h = p["embed_tokens.weight"][ids]
    for layer in range(CONFIG.num_layers):
        h = block(p, f"layers.{layer}", h)
    h = rms(h, p["norm.weight"])
    logits = [h @ p["lm_head.weight"].T]
    for k in range(1, min(CONFIG.mtp_depth, len(ids) - 1) + 1):
        at = f"mtp.{k - 1}"
        e = rms(p["embed_tokens.weight"][ids[k:]], p[f"{at}.enorm.weight"])
        joined = torch.cat((e, rms(h[:-1], p[f"{at}.hnorm.weight"])), -1)
        h = rms(block(p, at, joined @ p[f"{at}.eh_proj.weight"].T), p[f"{at}.norm.weight"])
        logits.append(h @ p["lm_head.weight"].T)
    return logits


def documents_of(ids: Tensor) -> list[tuple[int, int, Tensor]]:
    """(row, first position, tokens) of every document of ``batch``."""
    return [
        (row, sum(lengths[:i]), ids[row, sum(lengths[:i]) : sum(lengths[: i + 1])])
        for row, lengths in enumerate(DOCUMENTS)
        for i in range(len(lengths))
    ]


def written_out_loss(p: Parameters, ids: Tensor, coefficient: float) -> tuple[Tensor, Tensor]:
    """(L, L_MTP) of equations 24 and 25: sums over targets within documents, over the number of next tokens."""
    next_tokens = sum(len(document) - 1 for _, _, document in documents_of(ids))
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(CONFIG.mtp_depth + 1)]
    for _, _, document in documents_of(ids):
        for k, logits in enumerate(predictions(p, document)):
            for i in range(len(document) - k - 1):
                sums[k] = sums[k] - logits[i].log_softmax(-1)[document[i + k + 1]]
    mtp = (sums[1] + sums[2]) / CONFIG.mtp_depth / next_tokens
    return sums[0] / next_tokens + coefficient * mtp, mtp


def test_logits_equal_the_equations() -> None:
    model = build(CONFIG, seed=3).double()
    data = batch()
    out = model(data["input_ids"], document_ids=data["document_ids"], mtp=True)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    for row, start, document in documents_of(data["input_ids"]):
        for k, expected in enumerate(predictions(parameters, document)):
            found = model.logits((out.hidden, *out.mtp_hidden)[k][row, start : start + len(expected)])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # angles are fp32
    assert len(out.router_outputs) == 3  # of the second layer and of the two modules


def test_loss_and_every_gradient_equal_the_equations(tmp_path: Path) -> None:
    overrides = {
        "vocab_size": V,
        "hidden_size": D,
        "num_layers": 2,
        "intermediate_size": 24,
        "norm_eps": 1e-6,
        "rope": {"theta": 100.0},
        "attention": {"num_heads": H, "num_kv_heads": H, "head_dim": HEAD},
        "moe": {"num_experts": E, "top_k": K, "moe_intermediate_size": 8, "first_k_dense": 1},
        "mtp_depth": 2,
        "initializer_range": 0.3,
    }
    module = ZooModule("mixtral-tiny", overrides, mtp_coef=0.3, seed=3)
    data = batch()
    rows = [{key: value[row : row + 1] for key, value in data.items()} for row in range(2)]
    gradients = one_step(module, rows, tmp_path)  # two micro-batches with unequal numbers of targets

    model = build(module.spec.model, seed=3).double()
    loss, mtp = written_out_loss(dict(model.named_parameters()), data["input_ids"], 0.3)
    loss.backward()
    assert module.step_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert module.step_metrics["train/mtp_loss"].item() == pytest.approx(mtp.item(), rel=1e-5)
    assert len(gradients) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[f"model.{name}"].double(), parameter.grad, rtol=1e-3, atol=1e-6)


def test_loss_of_a_batch_worked_by_hand() -> None:
    """Documents of 3 and 2 tokens, two modules: one target for the first, none for the second."""
    ids, documents = torch.tensor([[1, 0, 2, 2, 1]]), torch.tensor([[7, 7, 7, 8, 8]])
    labels = torch.tensor([[0, 2, -100, 1, -100]])
    logits = torch.zeros(1, 5, 3)
    logits[0, 0, 2] = math.log(2)  # the third token of the first document: probability 2 / 4
    assert ids[0, 2] == 2

    def nll(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    assert mtp_nll(nll, [logits, torch.randn(1, 5, 3)], labels, documents).item() == pytest.approx(math.log(2) / 2)
    assert mtp_nll(nll, [], labels, documents).item() == 0
    # An answer that alone is trained on: nothing is predicted that is not a label.
    assert mtp_nll(nll, [logits], labels.where(labels != 2, -100), documents).item() == 0


def test_no_prediction_sees_what_it_predicts() -> None:
    """Module k at position i sees tokens up to i + k, and those of its document only."""
    model, data = build(CONFIG, seed=3), batch()
    ids, documents = data["input_ids"], data["document_ids"]

    def look_ahead(tokens: Tensor) -> tuple[Tensor, ...]:
        return model(tokens, document_ids=documents, mtp=True).mtp_hidden

    before = look_ahead(ids)
    for changed in range(ids.shape[1]):
        other = ids.clone()
        other[:, changed] = (ids[:, changed] + 1) % V
        for k, (a, b) in enumerate(zip(before, look_ahead(other), strict=True), start=1):
            for row in range(2):
                of = documents[row].tolist()
                inside = [i for i in range(11 - k) if of[i] == of[i + k]]
                same = [i for i in inside if i + k < changed or of[i] > of[changed]]
                assert torch.equal(a[row, same], b[row, same])
                if changed >= k and documents[row, changed - k] == documents[row, changed]:
                    assert not torch.equal(a[row, changed - k], b[row, changed - k])


@pytest.mark.parametrize(
    ("depth", "coefficient", "message"),
    [
        (0, 0.3, "model.mtp_coef = 0.3: mixtral-tiny has no MTP modules; set model.overrides.mtp_depth"),
        (1, -0.1, "model.mtp_coef = -0.1: give 0 or more"),
        (-1, 0.0, "mtp_depth = -1: give how many tokens"),
    ],
)
def test_settings_that_are_refused(depth: int, coefficient: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZooModule("mixtral-tiny", {"mtp_depth": depth}, mtp_coef=coefficient)


def test_modules_do_not_run_beside_a_cache() -> None:
    model = build(CONFIG)
    with pytest.raises(ValueError, match="mtp = True with a cache"):
        model(torch.tensor([[1, 2]]), cache=model.new_cache(1, 4), mtp=True)


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_selection_biases_move_where_the_modules_run(coefficient: float, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"vocab_size": V, "num_layers": 2, "mtp_depth": 1}
    module = ZooModule("deepseek-v3-tiny", overrides, mtp_coef=coefficient, bias_update_rate=0.01)
    gradients = one_step(module, [batch()], tmp_path)
    assert module.model is not None
    moved = {name for name, buffer in module.model.named_buffers() if buffer.any()}
    modules = {"mtp.0.ffn.router.bias"} if coefficient else set()
    assert moved == {"layers.1.ffn.router.bias"} | modules
    assert any(name.startswith("model.mtp") for name in gradients) == bool(coefficient)


@pytest.mark.parametrize("plan", plan_names())
def test_plans_place_modules_like_layers(plan: str) -> None:
    with torch.device("meta"):
        rules = resolve(load_plan(plan), Decoder(CONFIG))
    assert {"layers.1", "mtp.0", "mtp.1"} <= set(rules.units)
    names = {*rules.experts, *rules.tensor, *rules.full_precision}
    beside_a_layer = {name.replace("layers.1.", "mtp.0.") for name in names if name.startswith("layers.1.")}
    assert beside_a_layer == {name for name in names if name.startswith("mtp.0.")} != set()


def test_pipelines_refuse_modules() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="pipeline: mtp_depth = 2: an MTP module needs"):
        cut(Decoder(CONFIG), range(1))
