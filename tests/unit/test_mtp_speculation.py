"""Speculative decoding with the drafts of MTP modules."""

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
from mtp_models import CONFIG, MIXERS, D, V

from zoo.cli.main import main
from zoo.config import MambaConfig
from zoo.generation import generate
from zoo.model import Decoder, build
from zoo.speculative import Acceptance, speculate

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
