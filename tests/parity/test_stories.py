"""A really trained model, stories260K, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import zoo
from zoo.model import Decoder
from zoo.tokenizer import Tokenizer

PROMPT = "Once upon a time, there was a"


@pytest.fixture(scope="module")
def directory(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K_hf"


@pytest.fixture(scope="module")
def model(directory: Path) -> Decoder:
    return zoo.load(directory)


@torch.no_grad()
def test_greedy_story_is_the_same(directory: Path, model: Decoder) -> None:
    tokenizer = Tokenizer.load(directory)
    prompt = torch.tensor([tokenizer.encode(PROMPT, bos=True)])
    theirs = AutoModelForCausalLM.from_pretrained(directory).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=200, do_sample=False, eos_token_id=None
    )
    (ours,) = zoo.generate(model, prompt, max_new_tokens=200)
    assert len(ours) == 200
    assert ours == theirs[0, prompt.shape[1] :].tolist()
    assert tokenizer.decode(ours).startswith("little girl named Lily")


@torch.no_grad()
def test_loss_on_the_sample(shared_data: Path, directory: Path, model: Decoder) -> None:
    text = (shared_data / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")[:4000]
    ids = torch.tensor(Tokenizer.load(directory).encode(text, bos=True)[:512])
    assert len(ids) == 512
    loss = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:])
    assert round(float(loss), 3) == 1.469
