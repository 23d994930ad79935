"""The text part of published models that have other parts as well, through files on disk."""

from __future__ import annotations

import json
from pathlib import Path

import hf_cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig, Llama4VisionConfig

import zoo
from zoo.accounting import count_parameters
from zoo.families import get_family
from zoo.registry import find_spec
from zoo.weights import export_checkpoint, import_checkpoint
from zoo.weights.verify import verify


@pytest.fixture(scope="module")
def theirs() -> Llama4ForConditionalGeneration:
    torch.manual_seed(0)
    text = {key: value for key, value in hf_cases.CASES["llama4"].items() if key != "model_type"}
    vision = Llama4VisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vision_output_dim=16,
        projector_input_dim=16, projector_output_dim=16, image_size=28, patch_size=14,
    )  # fmt: skip
    config = Llama4Config(text_config=Llama4TextConfig(**text), vision_config=vision)
    config._attn_implementation = "eager"
    model = Llama4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def published(theirs: Llama4ForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama4") / "published"
    theirs.save_pretrained(directory)
    assert json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"] == "llama4"
    assert {name.split(".")[0] for name in load_file(directory / "model.safetensors")} == {
        "language_model",
        "multi_modal_projector",
        "vision_model",
    }
    return directory


def text_logits(model: Llama4ForConditionalGeneration, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_logits_of_the_text_part(theirs: Llama4ForConditionalGeneration, published: Path) -> None:
    ids = torch.randint(hf_cases.VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = zoo.load(published)(ids).logits
    torch.testing.assert_close(ours, text_logits(theirs, ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "billions"), [("llama-4-scout", 109), ("llama-4-maverick", 402)])
def test_published_sizes_count_the_vision_part(name: str, billions: int) -> None:
    """Scout's 109B are those of text and vision; of Maverick they print 400B, the text part's with digits cut off."""
    config = find_spec(name).model
    text = {key: value for key, value in get_family("llama4").to_hf(config).items() if key != "model_type"}
    vision = Llama4VisionConfig(
        hidden_size=1408, num_hidden_layers=34, num_attention_heads=16, intermediate_size=5632, vision_output_dim=4096,
        projector_input_dim=4096, projector_output_dim=4096, image_size=336, patch_size=14,
    )  # fmt: skip
    with torch.device("meta"):
        model = Llama4ForConditionalGeneration(Llama4Config(text_config=Llama4TextConfig(**text), vision_config=vision))
    counts = count_parameters(config)
    assert counts.total == sum(p.numel() for p in model.language_model.parameters())
    assert round(sum(p.numel() for p in model.parameters()) / 1e9) == billions
    assert round(counts.active / 1e9) == 17
    assert name != "llama-4-maverick" or counts.total // 10**9 == 400


def test_import_says_what_it_leaves_out_and_exports_the_text_model(
    theirs: Llama4ForConditionalGeneration, published: Path, tmp_path: Path
) -> None:
    done = import_checkpoint(published, tmp_path / "zoo")
    assert done.left_out
    assert {name.split(".")[0] for name in done.left_out} == {"multi_modal_projector", "vision_model"}
    export_checkpoint(tmp_path / "zoo", tmp_path / "text")
    text = {
        name.removeprefix("language_model."): tensor
        for name, tensor in theirs.state_dict().items()
        if name.startswith("language_model.")
    }
    exported = load_file(tmp_path / "text" / "model.safetensors")
    assert exported.keys() == text.keys()
    assert all(exported[name].equal(text[name]) for name in text), "bit for bit"
    assert json.loads((tmp_path / "text" / "config.json").read_text(encoding="utf-8"))["model_type"] == "llama4_text"


def test_verify_knows_the_larger_model(published: Path) -> None:
    report = verify(published)
    assert report.findings == []
    assert {name.split(".")[0] for name in report.left_out} == {"multi_modal_projector", "vision_model"}


def changed(published: Path, directory: Path, config: dict[str, object], tensors: dict[str, Tensor]) -> Path:
    directory.mkdir()
    hf = json.loads((published / "config.json").read_text(encoding="utf-8")) | config
    (directory / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    save_file(load_file(published / "model.safetensors") | tensors, directory / "model.safetensors")
    return directory


def test_what_is_refused(published: Path, tmp_path: Path) -> None:
    twice = changed(published, tmp_path / "twice", {}, {"lm_head.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'lm_head.weight' is there with 'language_model.' before it"):
        zoo.load(twice)
    extra = changed(published, tmp_path / "extra", {}, {"audio_model.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'audio_model.weight' has no place in the model"):
        zoo.load(extra)
    other = changed(published, tmp_path / "other", {"architectures": ["Llama4ForCausalLM"]}, {})
    with pytest.raises(ValueError, match="only Llama4ForConditionalGeneration is"):
        zoo.load(other)
    none = changed(published, tmp_path / "none", {"text_config": None}, {})
    with pytest.raises(ValueError, match=r"text_config"):
        zoo.load(none)
