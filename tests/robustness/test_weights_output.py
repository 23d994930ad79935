"""Converted and saved checkpoints: nothing that is there is lost, memory stays small, and names are found."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import sharded, small
from safetensors.torch import save_file

from zoo.cli.main import main
from zoo.families import get_family
from zoo.model import build
from zoo.registry import find_spec
from zoo.weights import import_checkpoint, load, save_model
from zoo.weights.convert import parameter_shapes
from zoo.weights.ops import source_shapes
from zoo.weights.source import INDEX_FILE, SINGLE_FILE, TensorSource

ROOT = Path(__file__).resolve().parents[2]


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

    def test_mapped_matrices_begin_on_cache_lines(self, tmp_path: Path) -> None:
        """In every shard, whatever the length of its header: a processor reads them slower when they do not."""
        spec = small("mixtral-tiny")
        save_model(build(spec.model), spec, tmp_path / "out", max_shard_bytes=200_000)
        assert (tmp_path / "out" / INDEX_FILE).is_file()
        for name, parameter in load(tmp_path / "out").named_parameters():
            assert parameter.nbytes % 64 == 0
            assert parameter.data_ptr() % 64 == 0, name

    def test_another_architecture_than_the_spec(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="describes another architecture"):
            save_model(build(small("llama-tiny").model), small("mistral-tiny"), tmp_path / "out")


class TestStreaming:
    @pytest.fixture(params=["mixtral-tiny", "gpt-oss-tiny", "llama-tiny"])
    def large(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        """150 MB in groups of 8 MB, which are stacked, transposed or as they are stored."""
        spec = find_spec(request.param)
        config = dataclasses.replace(spec.model, num_layers=12, hidden_size=256, intermediate_size=1024)
        if config.moe:
            moe = dataclasses.replace(config.moe, num_experts=8, moe_intermediate_size=1024)
            config = dataclasses.replace(config, moe=moe)
        else:
            config = dataclasses.replace(config, num_layers=6, intermediate_size=16384)
        family, source = get_family(spec.family), tmp_path / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(family.to_hf(config)))
        shapes = source_shapes(family.weight_map(config), parameter_shapes(config))
        save_file({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, source / SINGLE_FILE)
        return source

    @pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
    def test_memory_stays_near_the_largest_group(self, large: Path, tmp_path: Path) -> None:
        """Converted each way in a process of its own whose peak memory is taken.

        Its C library gives every large block back: by itself it learns, once one is freed, to keep the like, and at
        times has 16 MB more.
        """
        code = """
import sys
from zoo.bench.load_child import forget_peak, resident
from zoo.registry import find_spec
from zoo.weights.convert import export_checkpoint, import_checkpoint, parameter_shapes
source, zoo, published = sys.argv[1:]
parameter_shapes(find_spec(source).model)  # import all that is needed
for convert, *paths in ((import_checkpoint, source, zoo), (export_checkpoint, zoo, published)):
    forget_peak()
    before = resident("VmRSS")
    convert(*paths, max_shard_bytes=8_000_000)
    print(resident("VmHWM") - before)
"""
        paths = [str(large), *(str(tmp_path / name) for name in ("zoo", "hf"))]
        command = [sys.executable, "-c", code, *paths]
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=env)
        assert max(map(int, run.stdout.split())) < 0.25 * (large / SINGLE_FILE).stat().st_size

    @pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
    def test_a_model_is_loaded_in_its_own_memory_and_that_of_a_group(self, large: Path, source: Path) -> None:
        command = [sys.executable, "-m", "zoo.bench.load_child", "zoo", str(large), "bfloat16", "cpu", str(source)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert json.loads(run.stdout)["bytes"] < 1.05 * (large / SINGLE_FILE).stat().st_size + 2**24


class TestSource:
    def test_a_file_cut_short_while_it_is_read(self, tmp_path: Path) -> None:
        save_file({name: torch.arange(6.0) for name in "abc"}, tmp_path / SINGLE_FILE)
        with TensorSource(tmp_path) as source:
            assert source.read_stacked(["c", "a"]).tolist() == 2 * [[0, 1, 2, 3, 4, 5]]
            os.truncate(tmp_path / SINGLE_FILE, (tmp_path / SINGLE_FILE).stat().st_size - 4)
            with pytest.raises(ValueError, match="ends within tensor 'c'"):
                source.read_stacked(["a", "c"])

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
