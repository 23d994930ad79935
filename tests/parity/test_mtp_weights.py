"""MTP modules against transformers' own, through disk in DeepSeek-V3's published layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hf_cases import CASES, CONTEXT, relative_difference, tokens
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

import zoo
from zoo.accounting import count_buffers, count_parameters
from zoo.config import ModelSpec
from zoo.families import get_family
from zoo.model import Decoder, build
from zoo.registry import find_spec
from zoo.speculative import Acceptance, speculate
from zoo.training.loss import mtp_nll
from zoo.weights import export_checkpoint, import_checkpoint, save_model
from zoo.weights.convert import parameter_shapes
from zoo.weights.ops import source_shapes
from zoo.weights.verify import verify

DEPTH, LAYERS = 2, 3
FAMILY = get_family("deepseek_v3")


class Both(NamedTuple):
    """The same weights in transformers and here."""

    directory: Path
    theirs: PreTrainedModel
    modules: MtpModel
    ours: Decoder


def random_model() -> tuple[ModelSpec, Decoder]:
    """Norms, biases and routers spread as in ``hf_cases.random_model``."""
    config = FAMILY.from_hf({**CASES["deepseek-v3"], "num_nextn_predict_layers": DEPTH})
    model, generator = build(config, seed=1), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(0.2 * noise if name.endswith("bias") else 1 + 0.2 * noise)
            else:
                tensor.copy_(noise * (0.3 if "router" in name else 0.12))
    return ModelSpec(name="random", family=FAMILY.name, model=config), model


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    directory = tmp_path_factory.mktemp("mtp")
    spec, model = random_model()
    save_model(model, spec, directory / "zoo")
    export_checkpoint(directory / "zoo", directory / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32)
    # As published: layer 61 is all that transformers expects after the last.
    theirs._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS + k}\..*" for k in range(DEPTH)]
    yield Both(directory, theirs, MtpModel.from_pretrained(theirs), zoo.load(directory / "hf"))


def their_logits(both: Both, ids: Tensor) -> list[Tensor]:
    """ids [B, S] → for each module k [B, S - k, V]."""
    hidden = both.theirs(ids, output_hidden_states=True).hidden_states[-1]
    logits = []
    for k in range(1, DEPTH + 1):
        positions = torch.arange(k, ids.shape[1])[None]
        hidden = both.modules.forward_layer(k - 1, hidden[:, : ids.shape[1] - k], positions, None, input_ids=ids[:, k:])
        logits.append(both.theirs.lm_head(hidden))
    return logits


@torch.no_grad()
def test_logits_of_the_modules_past_the_original_context(both: Both) -> None:
    ids = tokens(2, 3 * CONTEXT)
    out = both.ours(ids, mtp=True)
    assert relative_difference(out.logits, both.theirs(ids).logits) < 1e-5
    for k, (hidden, expected) in enumerate(zip(out.mtp_hidden, their_logits(both, ids), strict=True), start=1):
        assert relative_difference(both.ours.logits(hidden[:, :-k]), expected) < 1e-5


def test_every_gradient_of_the_loss(both: Both) -> None:
    ids = tokens(2, CONTEXT + 16)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    both.ours.zero_grad()
    ours = mtp_nll(both.ours.nll, both.ours(ids, mtp=True).mtp_hidden, labels, torch.zeros_like(ids))
    ours.backward()
    both.theirs.zero_grad()
    both.modules.zero_grad()
    losses = [
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, k + 1 :].flatten(), reduction="sum")
        for k, logits in enumerate(their_logits(both, ids), start=1)
    ]
    theirs = torch.stack(losses).mean()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    expected = in_our_layout(both)
    for name, parameter in both.ours.named_parameters():
        assert parameter.grad is not None, name
        difference = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert difference < 1e-4, name


def in_our_layout(both: Both) -> dict[str, Tensor]:
    """Gradients of transformers' model and modules under our names, by the operations of the weight map."""
    gradients = {name: p.grad for name, p in both.theirs.named_parameters()}
    for name, parameter in both.modules.layers.named_parameters():
        number, _, rest = name.partition(".")
        published = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        gradients[f"model.layers.{LAYERS + int(number)}.{published}"] = parameter.grad
    ops = [op for op in FAMILY.weight_map(both.ours.config, "fused") if not op.targets[0].endswith("router.bias")]
    return dict(item for op in ops for item in op.to_zoo(gradients.__getitem__))


def test_round_trip_is_bit_equal(both: Both, tmp_path: Path) -> None:
    imported = import_checkpoint(both.directory / "hf", tmp_path / "zoo")
    assert (imported.left_out, imported.spec.model) == ((), both.ours.config)
    first, second = (load_file(path / "zoo" / "model.safetensors") for path in (both.directory, tmp_path))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    export_checkpoint(tmp_path / "zoo", tmp_path / "hf")
    again, published = (load_file(path / "hf" / "model.safetensors") for path in (tmp_path, both.directory))
    assert again.keys() == published.keys() and all(torch.equal(again[name], published[name]) for name in again)
    for directory in (both.directory / "hf", tmp_path / "zoo", tmp_path / "hf"):
        report = verify(directory)
        assert (report.findings, report.left_out) == ([], [])
    for name in ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"):
        assert f"model.layers.{LAYERS}.{name}.weight" in published
    assert torch.equal(published[f"model.layers.{LAYERS}.embed_tokens.weight"], first["embed_tokens.weight"])
    assert torch.equal(published[f"model.layers.{LAYERS + 1}.shared_head.head.weight"], first["lm_head.weight"])


@torch.no_grad()
def test_speculative_text_is_that_of_transformers(both: Both) -> None:
    prompt, counts = tokens(1, CONTEXT - 8), Acceptance()
    text = list(speculate(both.ours, prompt[0].tolist(), max_new_tokens=32, acceptance=counts))
    mask = torch.ones_like(prompt)
    plain = both.theirs.generate(
        prompt, attention_mask=mask, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert text == plain[0, prompt.shape[1] :].tolist()
    assert counts.drafted > 0


def test_published_model_has_the_tensors_of_the_hub() -> None:
    """The hub counts 3,918,786,560 bf16 and 680,571,043,840 fp8 elements in deepseek-ai/DeepSeek-V3: 671B in the main
    model and the rest, which DeepSeek calls 14B, for the MTP module with its copies of embedding and head."""
    config = find_spec("deepseek-v3").model
    shapes = source_shapes(FAMILY.weight_map(config), parameter_shapes(config))
    stored = sum(torch.Size(shape).numel() for shape in shapes.values()) - count_buffers(config)
    assert stored == 3_918_786_560 + 680_571_043_840
    counts = count_parameters(config)
    assert stored == counts.with_mtp + 2 * counts.embedding
    assert counts.total == count_parameters(dataclasses.replace(config, mtp_depth=0)).total == 671_026_404_352
    assert {name.split(".")[2] for name in shapes if name.startswith("model.layers.")} == set(map(str, range(62)))
