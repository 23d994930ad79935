"""Multi-token prediction against its equations written out (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training_module import one_step
from torch import Tensor

from zoo.cli.main import main
from zoo.config import AttentionConfig, MambaConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from zoo.generation import generate
from zoo.model import Decoder, build
from zoo.parallel.plan import load_plan, plan_names, resolve
from zoo.parallel.stages import cut
from zoo.speculative import Acceptance, speculate
from zoo.training.loss import mtp_nll
from zoo.training.module import ZooModule

D, H, HEAD, V, E, K = 16, 2, 8, 50, 4, 2
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=D,
    num_layers=2,
    intermediate_size=24,
    max_position_embeddings=64,
    norm_eps=1e-6,
    rope=RopeConfig(theta=100.0),
    attention=AttentionConfig(num_heads=H, num_kv_heads=H, head_dim=HEAD),
    moe=MoEConfig(
        num_experts=E, top_k=K, moe_intermediate_size=8, score_func="softmax", norm_topk_prob=True, first_k_dense=1
    ),
    mtp_depth=2,
    initializer_range=0.3,
)
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "mla": {
        "attention": None,
        "mla": MLAConfig(
            num_heads=2, kv_lora_rank=8, q_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4
        ),
    },
}
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


# -----------------------------------------------------------------------------------------------------------------
# Speculative decoding
# -----------------------------------------------------------------------------------------------------------------

PROMPT = [3, 1, 4, 1, 5]


def counting(depth: int, noise: float, mixer: str = "attention") -> Decoder:
    """A model that says t + 1 after t, and modules that agree; ``noise`` is how much else the blocks have to say."""
    model = build(replace(CONFIG, **MIXERS[mixer], mtp_depth=depth), seed=5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down")):
                parameter.mul_(noise)
        embedding = F.normalize(model.embed_tokens.weight, dim=-1)
        model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(embedding.roll(1, dims=0))
        for module in model.mtp:
            module.eh_proj.weight.copy_(torch.cat((torch.eye(D), torch.zeros(D, D)), dim=1))
            module.eh_proj.weight.add_(noise * torch.randn(D, 2 * D, generator=generator))
    return model


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_draft_of_modules_that_agree_is_accepted(depth: int) -> None:
    counts = Acceptance()
    tokens = list(speculate(counting(depth, 0.0), PROMPT, max_new_tokens=33, acceptance=counts))
    assert tokens == [i % V for i in range(PROMPT[-1] + 1, PROMPT[-1] + 34)]
    assert counts.passes == math.ceil(32 / (depth + 1))
    assert (counts.accepted, counts.rate) == (counts.drafted, 1)


@pytest.mark.parametrize("prompt", [[7], PROMPT])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("mixer", ["attention", "mla"])
@torch.no_grad()
def test_text_and_drafts_are_those_without_caches(mixer: str, depth: int, prompt: list[int]) -> None:
    """Each draft as a pass over all tokens makes it; the modules are wrong often enough for caches to be taken back."""
    model, counts = counting(depth, 0.2, mixer), Acceptance()
    text = list(speculate(model, prompt, max_new_tokens=30, acceptance=counts))
    assert text == generate(model, [prompt], max_new_tokens=30)[0]

    whole, known, expected = prompt + text, len(prompt) + 1, Acceptance()
    while known < len(whole):
        drafts: list[int] = []
        for k in range(min(depth, len(whole) - known - 1)):
            hidden = model(torch.tensor([whole[:known] + drafts]), mtp=True).mtp_hidden[k]
            drafts.append(int(model.logits(hidden[0, known - 2]).argmax()))
        accepted = next((i for i, draft in enumerate(drafts) if draft != whole[known + i]), len(drafts))
        expected.passes, expected.drafted = expected.passes + 1, expected.drafted + len(drafts)
        expected.accepted += accepted
        known += accepted + 1
    assert counts == expected
    assert 0.2 < counts.rate < 0.9


def test_it_ends_where_greedy_decoding_ends() -> None:
    model = counting(2, 0.2)
    whole = generate(model, [PROMPT], max_new_tokens=20)[0]
    for eos_id in set(whole):
        expected = whole[: whole.index(eos_id)]
        assert list(speculate(model, PROMPT, max_new_tokens=20, eos_id=eos_id)) == expected
    for count in range(1, 6):
        assert list(speculate(model, PROMPT, max_new_tokens=count)) == whole[:count]


def test_models_that_cannot_draft_are_refused() -> None:
    with pytest.raises(ValueError, match="the model has no MTP modules"):
        next(speculate(build(replace(CONFIG, mtp_depth=0)), PROMPT, max_new_tokens=4))
    recurrent = replace(
        CONFIG,
        mamba=MambaConfig(attention_interval=2, attention_offset=1, state_size=4, expand=2, conv_width=2, dt_rank=2),
    )
    with pytest.raises(ValueError, match="recurrent layers cannot take back"):
        next(speculate(build(recurrent), PROMPT, max_new_tokens=4))
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        next(speculate(build(CONFIG), PROMPT, max_new_tokens=60))


@pytest.mark.slow
def test_a_trained_model_accepts_its_own_drafts(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``zoo fit`` with the loss, then the same text from ``zoo generate`` either way, with fewer passes."""
    text = (shared_data / "text" / "web_bible.txt").read_text(encoding="utf-8")[:600_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    source, tokenizer, data = (str(tmp_path / name) for name in ("text.txt", "tokenizer", "data"))
    assert main(["data", "train-tokenizer", "--vocab-size", "512", "--out", tokenizer, source]) == 0
    assert main(["data", "build", "--tokenizer", tokenizer, "--out", data, "--separator", "\\n", source]) == 0
    small = {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_layers": 2,
        "intermediate_size": 128,
        "mtp_depth": 1,
        "mla": dict(
            num_heads=4, kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
        ),
        "moe": {"num_experts": 8, "top_k": 2, "moe_intermediate_size": 32},
    }
    config = {
        "model": {
            "name": "deepseek-v3-tiny",
            "overrides": small,
            "mtp_coef": 0.3,
            "bias_update_rate": 0.001,
            "optimizer": {"lr": 3e-3},
            "schedule": {"warmup_steps": 20},
        },
        "data": {"data_dir": data, "sequence_length": 128, "batch_size": 8},
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "accelerator": "cpu",
            "max_steps": 400,
            "log_every_n_steps": 20,
            "val_check_interval": 400,
            "enable_progress_bar": False,
        },
        "checkpoint": {"every_n_steps": 400},
    }
    (tmp_path / "fit.yaml").write_text(json.dumps(config), encoding="utf-8")
    assert main(["fit", "--config", str(tmp_path / "fit.yaml")]) == 0
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/mtp_loss"]) for row in csv.DictReader(file) if row["train/mtp_loss"]]
    assert losses[-1] < losses[0] - 1

    def generated(*flags: str) -> dict[str, Any]:
        capsys.readouterr()
        command = ["generate", str(tmp_path / "run" / "final"), "--prompt", "And the LORD said", "--json"]
        assert main([*command, "--max-new-tokens", "300", *flags]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    plain, speculative = generated(), generated("--speculative")
    assert (plain["tokens"], plain["text"]) == (speculative["tokens"], speculative["text"])
    counts = speculative["speculative"]
    assert counts["acceptance_rate"] > 0.3
    assert counts["passes"] + counts["accepted"] == len(speculative["tokens"]) - 1
    print({**counts, "speed-up": speculative["tokens_per_second"] / plain["tokens_per_second"]})
