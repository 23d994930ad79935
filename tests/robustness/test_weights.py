"""Bad checkpoints: each is refused with one line that names the place and the fix, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.cli.main import main
from zoo.config import ModelSpec
from zoo.families import get_family
from zoo.model import build
from zoo.registry import find_spec
from zoo.weights import export_checkpoint, import_checkpoint, load, save_model
from zoo.weights.convert import parameter_shapes
from zoo.weights.ops import source_shapes
from zoo.weights.source import INDEX_FILE, SINGLE_FILE

Tensors = dict[str, Tensor]

ROOT = Path(__file__).resolve().parents[2]


def small(name: str) -> ModelSpec:
    """A config of the zoo, cut down to two layers and a small vocabulary."""
    spec = find_spec(name)
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, num_layers=2, vocab_size=600))


def published(spec: ModelSpec, directory: Path, **config: object) -> Path:
    """Random weights of ``spec`` in its published layout; ``config`` is added to config.json."""
    model, ops = build(spec.model), get_family(spec.family).weight_map(spec.model)
    state = model.state_dict()
    directory.mkdir(parents=True)
    tensors = {name: t.clone() for op in ops for name, t in op.to_published(lambda name: state[name])}
    save_file(tensors, directory / SINGLE_FILE)
    (directory / "config.json").write_text(json.dumps(get_family(spec.family).to_hf(spec.model) | config))
    return directory


def rewrite(directory: Path, change: Callable[[Tensors], object]) -> None:
    """Apply ``change`` to the tensors of a single-file checkpoint."""
    tensors = load_file(directory / SINGLE_FILE)
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE)


def sharded(directory: Path) -> dict[str, str]:
    """Split a single-file checkpoint into two shards; returns the index's weight_map."""
    tensors = load_file(directory / SINGLE_FILE)
    (directory / SINGLE_FILE).unlink()
    weight_map = {}
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return published(small("mixtral-tiny"), tmp_path / "mixtral")


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


class TestOutput:
    def test_existing_directory_is_not_touched(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        for convert in (
            import_checkpoint,
            lambda s, o: save_model(build(small("llama-tiny").model), small("llama-tiny"), o),
        ):
            with pytest.raises(ValueError, match="exists"):
                convert(source, out)
        assert [path.name for path in out.iterdir()] == ["notes.txt"]

    def test_save_replaces_a_checkpoint_whole(self, tmp_path: Path) -> None:
        spec, out = small("llama-tiny"), tmp_path / "out"
        save_model(build(spec.model, seed=1), spec, out, max_shard_bytes=200_000)
        assert (out / INDEX_FILE).is_file()
        save_model(build(spec.model, seed=2), spec, out)
        assert sorted(path.name for path in out.iterdir()) == [SINGLE_FILE, "zoo.yaml"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
        expected = build(spec.model, seed=2).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load(out).state_dict().items())

    def test_full_disk_leaves_the_old_checkpoint(self, tmp_path: Path) -> None:
        spec, out = small("llama-tiny"), tmp_path / "out"
        save_model(build(spec.model, seed=1), spec, out)
        # A limit on the size of a file stands for the disk: the write fails half-way with the same kind of error.
        code = f"""
import resource, signal
from zoo.config import load_spec
from zoo.model import build
from zoo.weights import save_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
spec = load_spec({str(out / "zoo.yaml")!r})
try:
    save_model(build(spec.model, seed=2), spec, {str(out)!r})
except OSError as error:
    print(error)
"""
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert run.stdout.startswith(f"{out}: cannot be written (")
        assert "nothing was changed there" in run.stdout
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
        expected = build(spec.model, seed=1).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load(out).state_dict().items())

    def test_another_architecture_than_the_spec(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="describes another architecture"):
            save_model(build(small("llama-tiny").model), small("mistral-tiny"), tmp_path / "out")


class TestStreaming:
    def test_memory_stays_near_the_largest_group(self, tmp_path: Path) -> None:
        """150 MB in groups of 8 MB, converted both ways in a process of its own whose peak memory is taken."""
        spec = find_spec("mixtral-tiny")
        moe = dataclasses.replace(spec.model.moe, moe_intermediate_size=1024)
        config = dataclasses.replace(spec.model, num_layers=12, hidden_size=256, intermediate_size=1024, moe=moe)
        family, source = get_family(spec.family), tmp_path / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(family.to_hf(config)))
        shapes = source_shapes(family.weight_map(config), parameter_shapes(config))
        save_file({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, source / SINGLE_FILE)
        code = """
import resource, sys
from zoo.registry import find_spec
from zoo.weights.convert import export_checkpoint, import_checkpoint, parameter_shapes
source, zoo, published = sys.argv[1:]
parameter_shapes(find_spec(source).model)  # import all that is needed
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import_checkpoint(source, zoo, max_shard_bytes=8_000_000)
export_checkpoint(zoo, published, max_shard_bytes=8_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
        paths = [str(tmp_path / name) for name in ("source", "zoo", "hf")]
        run = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True, cwd=ROOT)
        assert int(run.stdout) * 1024 < (source / SINGLE_FILE).stat().st_size / 2


class TestSource:
    def test_name_without_weights(self) -> None:
        with pytest.raises(ValueError, match="mixtral-tiny: this model has no published weights"):
            load("mixtral-tiny")

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=r"mixtral-8x7'?: no such"):
            load("mixtral-8x7")
        with pytest.raises(ValueError, match="did you mean 'mixtral-8x7b'"):
            find_spec("mixtral-8x7")

    def test_name_with_a_checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = small("mixtral-tiny")
        save_model(build(spec.model), spec, tmp_path / "checkpoints" / "mixtral-tiny")
        monkeypatch.chdir(tmp_path)
        assert load("mixtral-tiny").config == spec.model

    def test_hub_id_in_the_cache(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The hub's cache links its files to blobs that lie outside the directory: this one place is known."""
        weight_map = sharded(source)
        repository = tmp_path / "hub" / "models--someone--mixtral"
        snapshot, blobs, refs = repository / "snapshots" / "0f", repository / "blobs", repository / "refs"
        for directory in (blobs, refs):
            directory.mkdir(parents=True)
        (refs / "main").write_text("0f")
        shutil.copytree(source, snapshot)
        for number, name in enumerate(sorted(set(weight_map.values()))):
            shutil.move(snapshot / name, blobs / str(number))
            (snapshot / name).symlink_to(Path("../../blobs") / str(number))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        spec = import_checkpoint("someone/mixtral", tmp_path / "out").spec
        assert (spec.name, spec.source) == ("mixtral", "someone/mixtral")
        expected = load(source).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load(tmp_path / "out").state_dict().items())

    def test_hub_without_network(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"nobody/nothing: cannot be downloaded .* or give a local directory"):
            import_checkpoint("nobody/nothing", tmp_path / "out")

    def test_command_line_reports_as_json(
        self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        zoo, hf = str(tmp_path / "zoo"), str(tmp_path / "hf")
        for command, arguments in (("import", [str(source), zoo]), ("export", [zoo, hf])):
            assert main([command, *arguments, "--json"]) == 0
            report = json.loads(capsys.readouterr().out)
            assert (report["family"], report["directory"]) == ("mixtral", arguments[1])
            assert report["parameters"] == sum(p.numel() for p in load(zoo).parameters())
            assert report["left_out"] == []

    def test_command_line_says_it_in_one_line(
        self, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["import", str(source / "absent"), str(tmp_path / "out")]) == 2
        error = capfd.readouterr().err
        assert error.startswith("zoo: error: ")
        assert error.count("\n") == 1
        assert "give a directory with config.json and safetensors, or a hub id" in error
