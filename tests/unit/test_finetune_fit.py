"""``zoo fit`` with a ``finetune:`` section, from a checkpoint on disk to what its run directory holds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from zoo.cli.main import main
from zoo.config import ModelSpec, load_spec
from zoo.finetune.adapter import load_adapter, read_adapter_spec, weights_hash
from zoo.finetune.apply import adapted_modules, merge
from zoo.model import build
from zoo.registry import find_spec
from zoo.training.fit import FitCLI, fit
from zoo.weights import load, save_model

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_layers": 2}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A random sparse model, as a checkpoint."""
    import dataclasses

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


@pytest.mark.parametrize("section", [{"molora": {"num_experts": 2, "rank": 2}}, {"prefix": {"length": 2}}], ids=str)
def test_what_cannot_be_merged_is_kept_beside_the_base(
    config: Path, base: Path, tmp_path: Path, section: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(config, section) == 0
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


def test_an_adapter_of_other_weights_or_cut_short_is_refused(config: Path, base: Path, tmp_path: Path) -> None:
    assert finetune(config, {"lora": {"targets": ["q_proj"], "rank": 1}}) == 0
    adapter = tmp_path / "run" / "adapter"
    model = load(base)
    with torch.no_grad():
        model.norm.weight[0] += 1
    with pytest.raises(ValueError, match="belongs to other weights, of base in float32"):
        load_adapter(model, adapter)
    spec: ModelSpec = read_adapter_spec(adapter).base
    assert spec.name == "base"
    weights = adapter / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"adapter.safetensors: cannot be read"):
        load_adapter(load(base), adapter)
