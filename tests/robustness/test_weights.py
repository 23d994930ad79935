"""Bad checkpoints: each is refused with one line that names the place and the fix, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import published, rewrite, sharded, small, write_index
from safetensors.torch import load_file
from torch import Tensor

from zoo.cli.main import main
from zoo.model import build
from zoo.weights import export_checkpoint, import_checkpoint, load, save_model
from zoo.weights.source import SINGLE_FILE


def refused(source: Path, match: str) -> None:
    """``import_checkpoint`` and ``load`` refuse ``source`` in one line; no output directory appears."""
    out = source.parent / "out"
    with pytest.raises(ValueError, match=match) as caught:
        import_checkpoint(source, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(source.parent.glob(".out*"))
    with pytest.raises(ValueError, match=match):
        load(source)


UP = "model.layers.1.block_sparse_moe.experts.5.w3.weight"


class TestTensors:
    def test_missing(self, source: Path) -> None:
        rewrite(source, lambda tensors: tensors.pop(UP))
        refused(source, f"mixtral: tensor '{UP}' is missing")

    def test_extra(self, source: Path) -> None:
        rewrite(source, lambda tensors: tensors.update(surplus=torch.zeros(1)))
        refused(source, "mixtral: tensor 'surplus' has no place in the model")

    def test_renamed(self, source: Path) -> None:
        rewrite(source, lambda tensors: tensors.update(other=tensors.pop(UP)))
        refused(source, f"'{UP}' is missing; 'other' is there instead")

    def test_shape(self, source: Path) -> None:
        rewrite(source, lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()}))
        wrong, right = r"\[128, 256\]", r"\[256, 128\]"
        refused(source, f"'{UP}' has shape {wrong}, but the config needs {right}")

    def test_fp8(self, source: Path) -> None:
        rewrite(source, lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}))
        refused(source, f"'{UP}' has dtype F8_E4M3; fp8 and integer weights are not supported")

    def test_experts_of_different_dtypes(self, source: Path) -> None:
        rewrite(source, lambda tensors: tensors.update({UP: tensors[UP].bfloat16()}))
        refused(source, r"mix dtypes \['BF16', 'F32'\]")

    def test_zoo_checkpoint(self, source: Path, tmp_path: Path) -> None:
        import_checkpoint(source, tmp_path / "zoo")
        rewrite(tmp_path / "zoo", lambda tensors: tensors.pop("norm.weight"))
        for refuse in (load, lambda path: export_checkpoint(path, tmp_path / "hf")):
            with pytest.raises(ValueError, match=r"tensor 'norm.weight' is missing"):
                refuse(tmp_path / "zoo")
        assert not (tmp_path / "hf").exists()


class TestTiedHead:
    """Some tied checkpoints store the head as well: a copy is left out, anything else refused."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        spec = small("llama-tiny")
        spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, tie_word_embeddings=True))
        source = published(spec, tmp_path / "tied")
        rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
        return source

    def test_copy_is_left_out(self, source: Path, tmp_path: Path) -> None:
        assert import_checkpoint(source, tmp_path / "zoo").left_out == ("lm_head.weight",)
        stored = load_file(source / SINGLE_FILE)
        assert torch.equal(load(tmp_path / "zoo").state_dict()["embed_tokens.weight"], stored["lm_head.weight"])

    @pytest.mark.parametrize("change", [lambda t: t[-1, -1].add_(1), lambda t: t.set_(t[:-1].clone())])
    def test_other_head(self, source: Path, change: Callable[[Tensor], object]) -> None:
        rewrite(source, lambda tensors: change(tensors["lm_head.weight"]))
        refused(source, "'lm_head.weight' differs from 'model.embed_tokens.weight'.*set tie_word_embeddings to false")


class TestLeftOut:
    """What a family declares as not part of the model is left out, said so, and nothing else is."""

    def test_rotary_frequencies_of_old_checkpoints(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = published(small("llama-tiny"), tmp_path / "llama")
        name = "model.layers.1.self_attn.rotary_emb.inv_freq"
        rewrite(source, lambda tensors: tensors.update({name: torch.zeros(16)}))
        assert import_checkpoint(source, tmp_path / "out").left_out == (name,)
        assert main(["import", str(source), str(tmp_path / "again")]) == 0
        assert f"left out, as not part of the model (1 in all): {name}" in capsys.readouterr().out


class TestPredictionModules:
    """MTP modules are imported like any layer, and what they share with the model must be equal."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        spec = small("deepseek-v3-tiny")
        model = dataclasses.replace(spec.model, mtp_depth=1)
        return published(dataclasses.replace(spec, model=model), tmp_path / "v3")

    @pytest.mark.parametrize("name", ["embed_tokens", "shared_head.head"])
    def test_copy_that_differs(self, source: Path, name: str) -> None:
        rewrite(source, lambda tensors: tensors[f"model.layers.2.{name}.weight"][-1, -1].add_(1))
        refused(source, f"'model.layers.2.{name}.weight' differs from .* but the model has one for both")

    def test_module_that_is_announced_and_missing(self, source: Path) -> None:
        """As transformers saves a model that it loaded: the config goes on announcing what the weights lack."""
        with_module = load(source)
        assert with_module.config.mtp_depth == 1
        rewrite(source, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith("model.layers.2.")])
        without = load(source)
        assert without.config == dataclasses.replace(with_module.config, mtp_depth=0)
        assert without.state_dict().keys() == {n for n in with_module.state_dict() if not n.startswith("mtp.")}

    def test_module_of_which_a_part_is_missing(self, source: Path) -> None:
        rewrite(source, lambda tensors: tensors.pop("model.layers.2.eh_proj.weight"))
        refused(source, "tensor 'model.layers.2.eh_proj.weight' is missing; check that the config fits")

    def test_module_that_the_config_does_not_announce(self, source: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
        refused(source, r"tensor 'model.layers.2.\S+' has no place in the model")


class TestFiles:
    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated(self, source: Path, keep: int) -> None:
        data = (source / SINGLE_FILE).read_bytes()
        (source / SINGLE_FILE).write_bytes(data[:keep])
        refused(source, r"model.safetensors: not a whole safetensors file .*; copy or download it again")

    def test_pickle_named_safetensors(self, source: Path) -> None:
        (source / SINGLE_FILE).write_bytes(pickle.dumps({"weight": 1}))
        refused(source, "not a whole safetensors file")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
    def test_pickle(self, source: Path, name: str) -> None:
        """Never opened: the file below would leave a trace if it were."""

        class Trap:
            def __reduce__(self) -> tuple[object, ...]:
                return os.mkdir, (str(source / "trapped"),)

        (source / SINGLE_FILE).unlink()
        (source / name).write_bytes(pickle.dumps(Trap()))
        refused(source, f"{name}: pickled weights can run code .* save them as safetensors first")
        refused(source / name, "pickled weights can run code")
        assert not (source / "trapped").exists()

    def test_no_weights(self, source: Path) -> None:
        (source / SINGLE_FILE).unlink()
        refused(source, "neither model.safetensors nor model.safetensors.index.json is in it")

    def test_config_is_no_json(self, source: Path) -> None:
        (source / "config.json").write_text("{")
        refused(source, r"config.json: cannot be read as JSON")


class TestIndex:
    @pytest.mark.parametrize("place", ["relative", "absolute", "link", "subdirectory"])
    def test_shard_outside_the_directory(self, source: Path, place: str) -> None:
        weight_map = sharded(source)
        name = min(weight_map.values())
        outside = source.parent / "elsewhere" / name
        outside.parent.mkdir()
        shutil.move(source / name, outside)
        shard = {
            "relative": f"../elsewhere/{name}",
            "absolute": str(outside),
            "link": name,
            "subdirectory": f"s/{name}",
        }
        if place == "link":
            (source / name).symlink_to(outside)
        if place == "subdirectory":
            (source / "s").symlink_to(outside.parent)
        write_index(source, {k: shard[place] if v == name else v for k, v in weight_map.items()})
        refused(source, r"index.json: '.*' lies outside the checkpoint directory; shards must be files in it")

    def test_pickled_shard(self, source: Path) -> None:
        weight_map = sharded(source)
        write_index(source, dict.fromkeys(weight_map, "pytorch_model-00001-of-00001.bin"))
        refused(source, "pickled weights can run code")

    def test_absent_shard(self, source: Path) -> None:
        (source / max(sharded(source).values())).unlink()
        refused(source, r"index.json: 'model-00002-of-00002.safetensors' is not in the directory")

    def test_tensor_in_another_shard_than_listed(self, source: Path) -> None:
        weight_map = sharded(source)
        write_index(source, weight_map | {UP: "model-00001-of-00002.safetensors"})
        if weight_map[UP] == "model-00001-of-00002.safetensors":
            write_index(source, weight_map | {UP: "model-00002-of-00002.safetensors"})
        refused(source, f"index.json: lists '{UP}' in model-")

    def test_empty(self, source: Path) -> None:
        sharded(source)
        write_index(source, {})
        refused(source, "'weight_map' is missing or empty")

    def test_beside_a_single_file(self, source: Path) -> None:
        shutil.copy(source / SINGLE_FILE, source / "copy")
        sharded(source)
        (source / "copy").rename(source / SINGLE_FILE)
        refused(source, "holds both model.safetensors.index.json and model.safetensors")


class TestTokenizer:
    @pytest.fixture
    def tokenizer(self, shared_data: Path) -> Path:
        return shared_data / "models" / "stories260K_hf"  # 512 ids

    def test_larger_than_the_embedding(self, tokenizer: Path, tmp_path: Path) -> None:
        spec = small("mixtral-tiny")
        spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, vocab_size=511))
        source = published(spec, tmp_path / "small")
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, source / name)
        match = "vocab_size = 511: .* has fewer embedding rows than its tokenizer has ids"
        with pytest.raises(ValueError, match=match):
            import_checkpoint(source, tmp_path / "out")
        with pytest.raises(ValueError, match=match):
            save_model(build(spec.model), spec, tmp_path / "out", tokenizer)
        assert not (tmp_path / "out").exists()

    def test_travels_byte_for_byte(self, source: Path, tokenizer: Path, tmp_path: Path) -> None:
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, source / name)
        import_checkpoint(source, tmp_path / "zoo")
        export_checkpoint(tmp_path / "zoo", tmp_path / "hf")
        for name in ("tokenizer.model", "tokenizer_config.json"):
            assert (tmp_path / "hf" / name).read_bytes() == (tokenizer / name).read_bytes()
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
