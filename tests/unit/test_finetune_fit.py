"""``zoo fit`` with a ``finetune:`` section, from a checkpoint on disk to what its run directory holds."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file

from zoo.cli.main import main
from zoo.config import from_dict, load_spec
from zoo.finetune.adapter import (
    AdapterSpec,
    load_adapter,
    read_adapter_spec,
    save_adapter,
    save_finetuned,
    weights_hash,
)
from zoo.finetune.apply import adapted_modules, apply, merge
from zoo.finetune.config import FinetuneConfig
from zoo.model import Decoder, build
from zoo.quantize import quantize
from zoo.registry import find_spec
from zoo.training.fit import FitCLI, fit
from zoo.weights import load, save_model

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_layers": 2}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A random sparse model, as a checkpoint."""
    spec = find_spec("qwen2-moe-tiny")
    spec = dataclasses.replace(spec, name="base", model=dataclasses.replace(spec.model, **SMALL))
    save_model(build(spec.model), spec, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def config(fit_config: Path, base: Path) -> Path:
    """A config for 6 steps on from it, saved every 2."""
    values = yaml.safe_load(fit_config.read_text())
    values["model"] = {"name": str(base), "optimizer": {"lr": 0.01}}
    values["trainer"] |= {"max_steps": 6, "val_check_interval": 6}
    values["checkpoint"] = {"every_n_steps": 2, "keep": 9}
    fit_config.write_text(yaml.safe_dump(values))
    return fit_config


def finetune(config: Path, section: dict[str, Any], *more: str) -> int:
    values = yaml.safe_load(config.read_text()) | {"finetune": section}
    config.write_text(yaml.safe_dump(values))
    return fit(["--config", str(config), *more])


def test_lora_on_experts_from_a_checkpoint_to_a_merged_one_and_resumed(
    config: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"lora": {"targets": ["experts", "q_proj"], "rank": 2}, "train": ["norms"]}
    assert finetune(config, section) == 0
    table = capsys.readouterr().out
    assert re.search(r"^lora +17,024 +17,024$", table, re.MULTILINE)
    assert re.search(r"^experts +0 +196,608$", table, re.MULTILINE)
    assert "are trained" in table

    run, before = tmp_path / "run", load(base)
    adapter, trained = run / "adapter", load(run / "final")
    assert load_spec(run / "final" / "zoo.yaml").model == before.config
    for name, tensor in before.state_dict().items():
        expected = bool(re.search(r"norm|experts\.(gate_up|down)|q_proj\.weight", name)) and "shared" not in name
        assert torch.equal(trained.state_dict()[name], tensor) != expected, name
    assert {path.name for path in adapter.iterdir()} == {"adapter.yaml", "adapter.safetensors"}
    assert read_adapter_spec(adapter).base_sha256 == weights_hash(before)
    assert all("base" not in name for name in load_file(adapter / "adapter.safetensors"))

    load_adapter(before, adapter)
    tokens = torch.randint(300, (1, 8))
    with torch.no_grad():
        torch.testing.assert_close(before(tokens).logits, trained(tokens).logits, rtol=0, atol=1e-5)
        merge(before)
        assert all(torch.equal(t, before.state_dict()[name]) for name, t in trained.state_dict().items())

    state = torch.load(run / "checkpoints" / "step-00000006.ckpt", weights_only=True)
    moments = state["optimizer_states"][0]["state"]
    assert len(moments) == len(load_file(adapter / "adapter.safetensors"))

    reference = tmp_path / "reference"
    shutil.move(run / "final", reference)
    shutil.move(adapter, tmp_path / "adapter")
    for step in ("4", "6"):
        (run / "checkpoints" / f"step-0000000{step}.ckpt").unlink()
    assert fit(["--config", str(config)]) == 0
    assert (run / "final" / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    again = (adapter / "adapter.safetensors").read_bytes()
    assert again == (tmp_path / "adapter" / "adapter.safetensors").read_bytes()


def test_lora_experts_with_a_router_are_kept_beside_the_base(
    config: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(config, {"molora": {"num_experts": 2, "rank": 2}}) == 0
    final = tmp_path / "run" / "final"
    model, again = load(final), load(base)
    assert adapted_modules(model)
    load_adapter(again, tmp_path / "run" / "adapter")
    tokens = torch.randint(300, (1, 8))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
        assert not torch.allclose(model(tokens).logits, load(base)(tokens).logits, atol=1e-3)
    capsys.readouterr()
    assert main(["generate", str(final), "--prompt", "a", "--max-new-tokens", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 3
    with pytest.raises(ValueError, match="cannot be merged"):
        fit(["--config", str(config), "--model.name", str(final), "--trainer.default_root_dir", str(tmp_path / "on")])
    assert main(["export", str(final), str(tmp_path / "hf")]) == 2
    assert "cannot be merged" in capsys.readouterr().err
    with pytest.raises(ValueError, match="int8: experts with an adapter"):
        quantize(model, "int8")


def adapted(base: Path, section: dict[str, Any]) -> tuple[Decoder, AdapterSpec]:
    """The base with an adapter that has been trained, and what is written of it."""
    model, spec = load(base), load_spec(base / "zoo.yaml")
    finetune = from_dict(FinetuneConfig, section, "finetune")
    adapter = AdapterSpec(base=spec, base_sha256=weights_hash(model), finetune=finetune)
    apply(model, finetune)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model, adapter


def test_prefixes_are_kept_beside_the_base(base: Path, tmp_path: Path) -> None:
    model, adapter = adapted(base, {"prefix": {"length": 2}, "train": ["norms"]})
    tokens = torch.randint(300, (1, 8))
    save_finetuned(model, adapter.base, adapter, tmp_path / "final", None)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "final")(tokens).logits, model(tokens).logits)


def test_a_value_of_the_command_line_joins_those_of_the_config(config: Path) -> None:
    values = yaml.safe_load(config.read_text()) | {"finetune": {"lora": {"targets": ["experts"], "rank": 2}}}
    config.write_text(yaml.safe_dump(values))
    finetuning = FitCLI(
        ["--config", str(config), "--finetune.lora.rank", "3", "--finetune.train=[norms]"]
    ).model.finetuning
    assert finetuning is not None and finetuning.config.lora is not None
    assert finetuning.config.lora.rank == 3
    assert (finetuning.config.lora.targets, finetuning.config.train) == (("experts",), ("norms",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--finetune.frezee", "[router]"], "finetune: unknown key 'frezee'; did you mean 'freeze'?"),
        (["--finetune.lora.rnk", "3"], "finetune: lora: unknown key 'rnk'; did you mean 'rank'?"),
        (["--finetune.train", "[mamba]"], "finetune.train: 'mamba' matches nothing in this model"),
        (["--finetune.lora.targets", "[up_projection]"], "finetune.lora.targets: 'up_projection' matches nothing"),
        (["--finetune.prefix.length", "2", "--model.name", "mixtral-tiny"], "mixtral-tiny has no weights yet"),
        (["--finetune.freeze", "[router]", "--trainer.strategy", "ddp"], "it needs trainer.strategy = auto"),
    ],
)
def test_a_mistake_is_one_line(
    config: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(config), *arguments]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert message in line


def test_a_frozen_router_has_a_frozen_selection_bias(fit_config: Path) -> None:
    with pytest.raises(ValueError, match=r"model.bias_update_rate: the router is frozen"):
        finetune(fit_config, {"freeze": ["router"]})


def test_an_adapter_of_other_weights_or_cut_short_is_refused(base: Path, tmp_path: Path) -> None:
    model, spec = adapted(base, {"lora": {"targets": ["q_proj"], "rank": 1}})
    directory = tmp_path / "adapter"
    save_adapter(model, spec, directory)
    assert read_adapter_spec(directory) == spec
    other = load(base)
    with torch.no_grad():
        other.norm.weight[0] += 1
    with pytest.raises(ValueError, match="belongs to other weights, of base in float32"):
        load_adapter(other, directory)
    weights = directory / "adapter.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"adapter.safetensors: cannot be read"):
        load_adapter(load(base), directory)
    state = load_bytes(whole)
    del state["layers.0.mixer.q_proj.adapter.a"]
    save_file(state, weights)
    with pytest.raises(ValueError, match=r"'layers.0.mixer.q_proj.adapter.a' has shape None, and adapter.yaml needs"):
        load_adapter(load(base), directory)
