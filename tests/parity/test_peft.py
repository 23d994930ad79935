"""Adapters of the zoo in ``peft``, on transformers' model of the same base."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from zoo.cli.main import main
from zoo.config_reading import from_dict
from zoo.finetune.adapter import AdapterSpec, save_adapter, weights_hash
from zoo.finetune.apply import apply
from zoo.finetune.config import FinetuneConfig
from zoo.model import Decoder, build
from zoo.registry import find_spec
from zoo.weights import export_checkpoint, save_model


def trained(name: str, section: dict[str, Any], directory: Path) -> Decoder:
    """A random small model, in ``base``, and its adapter in ``adapter``, as if trained."""
    spec = find_spec(name)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, num_layers=2, vocab_size=64))
    model = build(spec.model)
    save_model(model, spec, directory / "base")
    finetune = from_dict(FinetuneConfig, section, "finetune")
    adapter = AdapterSpec(base=spec, base_sha256=weights_hash(model), finetune=finetune)
    apply(model, finetune)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    save_adapter(model, adapter, directory / "adapter")
    return model.eval()


CASES = {
    "experts and attention": ("mixtral-tiny", "lora", {"targets": ["experts", "attention"]}),
    "experts alone, rank-stabilised": ("olmoe-tiny", "lora", {"targets": ["experts"], "rslora": True}),
    "experts beside shared ones": ("qwen2-moe-tiny", "lora", {"targets": ["ffn", "q_proj"]}),
    "dense, shared and routed, latent attention": ("deepseek-v3-tiny", "lora", {"targets": ["ffn", "attention"]}),
    "dense, weights decomposed": ("qwen2-tiny", "lora", {"targets": ["attention", "ffn"], "dora": True}),
    "output head": ("qwen3-moe-tiny", "lora", {"targets": ["lm_head", "experts"]}),
    "prefix of a dense model": ("llama-tiny", "prefix", {"length": 5}),
    "prefix of a sparse model": ("qwen3-moe-tiny", "prefix", {"length": 5}),
}


@pytest.mark.parametrize(("name", "kind", "settings"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_peft_computes_the_same(name: str, kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"rank": 3, "alpha": 6} if kind == "lora" else {}
    ours = trained(name, {kind: sizes | settings}, tmp_path)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "peft")]) == 0
    export_checkpoint(tmp_path / "base", tmp_path / "hf")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.randint(64, (2, 11))
    before = base(tokens).logits
    with warnings.catch_warnings():
        # A tensor that is left over or missing is a warning to peft.
        warnings.simplefilter("error", UserWarning)
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()
    logits = theirs(tokens).logits
    assert (logits - before).abs().max() > 1e-2
    torch.testing.assert_close(ours(tokens).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "section", "message"),
    [
        ("mistral-tiny", {"prefix": {}}, "a sliding window hides the prefix"),
        ("mixtral-tiny", {"molora": {}}, "only LoRA and prefixes can be exported"),
        ("mixtral-tiny", {"lora": {"targets": ["experts"]}, "train": ["router"]}, "router were trained in full"),
        ("mixtral-tiny", {"lora": {"targets": ["experts"], "dora": True}}, "peft has no DoRA of stacked experts"),
        ("qwen2-moe-tiny", {"lora": {"targets": ["up_proj"], "dora": True}}, "shared_expert.up_proj"),
        ("gpt-oss-tiny", {"lora": {"targets": ["experts"]}}, "arranged in another way"),
    ],
)
def test_what_peft_cannot_represent_is_refused(
    name: str, section: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(name, section, tmp_path)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "peft")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()
