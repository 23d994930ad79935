"""``zoo verify``: a whole checkpoint passes, and every way of damaging one is found and named, without loading it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.cli.main import main
from zoo.config import ModelSpec, save_spec
from zoo.families import get_family
from zoo.model import build
from zoo.registry import find_spec
from zoo.weights import load, save_model
from zoo.weights.convert import parameter_shapes
from zoo.weights.source import INDEX_FILE, SINGLE_FILE
from zoo.weights.verify import verify

ROOT = Path(__file__).resolve().parents[2]
EXPERT = "model.layers.1.block_sparse_moe.experts.5.w3.weight"


def small(name: str) -> ModelSpec:
    spec = find_spec(name)
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, num_layers=2, vocab_size=64))


def published(spec: ModelSpec, directory: Path) -> Path:
    """Random weights of ``spec`` as they would be published."""
    state, family = build(spec.model).state_dict(), get_family(spec.family)
    tensors = {n: t.clone() for op in family.weight_map(spec.model) for n, t in op.to_published(lambda n: state[n])}
    directory.mkdir(parents=True)
    save_file(tensors, directory / SINGLE_FILE)
    (directory / "config.json").write_text(json.dumps(family.to_hf(spec.model)))
    return directory


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return published(small("mixtral-tiny"), tmp_path / "hf")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A zoo checkpoint in several files."""
    spec = small("mixtral-tiny")
    save_model(build(spec.model), spec, tmp_path / "shards", max_shard_bytes=150_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    return tmp_path / "shards"


def findings(directory: Path) -> list[str]:
    return [str(finding) for finding in verify(directory).findings]


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE)


def write_header(path: Path, header: Any, data: bytes = b"") -> None:
    """A safetensors file with any header, an object or its bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    write_header(path, header, content[8 + length :])


def edit_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX_FILE).read_text())
    change(index["weight_map"])
    (directory / INDEX_FILE).write_text(json.dumps(index))


class TestWhole:
    @pytest.mark.parametrize("name", ["mixtral-tiny", "qwen2-moe-tiny", "dbrx-tiny", "llama-tiny"])
    def test_published(self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = published(small(name), tmp_path / "hf")
        assert findings(source) == []
        assert main(["verify", str(source)]) == 0
        assert f"{source}: whole: hf ({find_spec(name).family}), 1 file, " in capsys.readouterr().out

    def test_zoo_in_shards(self, shards: Path) -> None:
        report = verify(shards)
        assert report.findings == [] and report.hashed == 0
        assert report.size == sum(path.stat().st_size for path in shards.glob("*.safetensors"))
        assert report.tensors == len(load(shards).state_dict())

    def test_left_out_tensors_are_counted(self, tmp_path: Path) -> None:
        source, name = published(small("llama-tiny"), tmp_path / "hf"), "model.layers.1.self_attn.rotary_emb.inv_freq"
        rewrite(source, lambda tensors: tensors.update({name: torch.zeros(16)}))
        assert (verify(source).left_out, findings(source)) == ([name], [])

    def test_whatever_loads_passes_and_json_says_so(self, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
        load(hf)
        assert main(["verify", str(hf), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["family"], report["files"], report["findings"]) == ("mixtral", [SINGLE_FILE], [])


class TestTensors:
    def test_all_faults_are_found_at_once(self, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def damage(tensors: dict[str, Tensor]) -> None:
            tensors["surplus\n"] = tensors.pop("lm_head.weight")
            tensors[EXPERT] = tensors[EXPERT].T.contiguous()
            tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
            name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
            tensors[name] = tensors[name].bfloat16()

        rewrite(hf, damage)
        assert main(["verify", str(hf)]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines == [
            "config.json: needs tensor 'lm_head.weight' [64, 128], which is missing",
            r"model.safetensors: tensor 'surplus\n' has no place in the model of config.json",
            "model.safetensors: tensor 'model.norm.weight' has dtype F8_E4M3; fp8 and integer weights are not "
            "supported; use the bf16, fp16 or fp32 weights",
            f"model.safetensors: tensor '{EXPERT}' has shape [128, 256], but the config needs [256, 128]",
            "model.safetensors: 'model.layers.0.block_sparse_moe.experts.0.w2.weight' and its group mix dtypes "
            "['BF16', 'F32']; save them in one",
        ]

    def test_a_zoo_checkpoint_of_another_config(self, shards: Path) -> None:
        text = (shards / "zoo.yaml").read_text()
        (shards / "zoo.yaml").write_text(text.replace("num_layers: 2", "num_layers: 1"))
        assert len(findings(shards)) == 9
        assert all(
            "tensor 'layers.1." in line and "has no place in the model of zoo.yaml" in line for line in findings(shards)
        )

    def test_a_config_that_cannot_be_read_does_not_hide_the_rest(self, hf: Path) -> None:
        (hf / "config.json").write_text("[" * 100_000)
        (hf / SINGLE_FILE).write_bytes((hf / SINGLE_FILE).read_bytes()[:-4])
        assert [line.split(":")[0] for line in findings(hf)] == ["config.json", SINGLE_FILE]

    def test_a_head_that_differs_from_its_embedding(self, tmp_path: Path) -> None:
        spec = small("llama-tiny")
        spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, tie_word_embeddings=True))
        source = published(spec, tmp_path / "hf")
        rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
        assert findings(source) == []
        rewrite(source, lambda t: t["lm_head.weight"][-1, -1].add_(1))
        (line,) = findings(source)
        assert "'lm_head.weight' differs from 'model.embed_tokens.weight'" in line


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWO = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


class TestHostileHeaders:
    @pytest.mark.parametrize(
        ("header", "problem"),
        [
            (b"", "has a header that is no JSON"),
            (b"[]", "has a header that is no JSON object"),
            (b'{"a": ' * 50_000, "has a header that is no JSON"),
            (b'{"a": {}, "a": {}}', "'a' is in it twice"),
            (b"\xff{}", "has a header that is no JSON"),
            (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}", "has a header that is no JSON"),
            ({"a": 3}, "tensor 'a' is described by int"),
            ({"a": {**ONE, "dtype": "PICKLE"}}, "has the unknown dtype 'PICKLE'"),
            ({"a": {**ONE, "dtype": ["F32"]}}, "has the unknown dtype"),
            ({"a": {**ONE, "shape": [-2]}}, "has no valid shape"),
            ({"a": {**ONE, "shape": [True, 2]}}, "has no valid shape"),
            ({"a": {**ONE, "shape": [1] * 65}}, "has no valid shape"),
            ({"a": {**ONE, "shape": [2**62, 2**62]}}, "takes 8 bytes, but F32"),
            ({"a": {**ONE, "data_offsets": [8, 0]}}, "has no valid data_offsets"),
            ({"a": {**ONE, "data_offsets": [0, 2**64]}}, "has no valid data_offsets"),
            ({"a": {**ONE, "data_offsets": [0, 16]}}, "takes 16 bytes, but F32 [2] is 8"),
            ({"a": ONE, "b": {**TWO, "data_offsets": [4, 12]}}, "tensors 'a' and 'b' overlap: byte 4 of the data"),
            ({"a": ONE, "b": ONE}, "tensors 'a' and 'b' overlap: byte 0 of the data"),
            ({"a": ONE, "b": {**TWO, "data_offsets": [12, 20]}}, "4 bytes before tensor 'b' belong to no tensor"),
            ({"a": ONE, "b": {**TWO, "data_offsets": [16, 24]}}, "is cut short: 16 bytes of data"),
            ({"a": ONE}, "has 8 bytes after its last tensor"),
        ],
    )
    def test_is_named(self, header: Any, problem: str, hf: Path) -> None:
        write_header(hf / SINGLE_FILE, header, bytes(16))
        assert any(problem in line for line in findings(hf) if line.startswith(SINGLE_FILE)), findings(hf)
        with pytest.raises(ValueError):
            load(hf)

    @pytest.mark.parametrize("length", [2**63, 100_000_001, 20_000])
    def test_length_of_the_header(self, length: int, hf: Path) -> None:
        """Never allocated: the file is sparse, and shorter than the first claims."""
        with (hf / SINGLE_FILE).open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(200_000_000 if length < 2**60 else 100)
        kind = {2**63: "is cut short", 100_000_001: "has a header of 100,000,001 bytes", 20_000: "no JSON"}[length]
        assert any(kind in line for line in findings(hf))

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated(self, keep: int, hf: Path) -> None:
        (hf / SINGLE_FILE).write_bytes((hf / SINGLE_FILE).read_bytes()[:keep])
        assert any("is cut short" in line for line in findings(hf))

    def test_ranges_that_were_swapped_are_as_whole_as_the_file(self, hf: Path) -> None:
        """Two tensors of one shape: no header can tell, a recorded hash does."""
        assert main(["verify", str(hf), "--record"]) == 0

        def swap(header: dict[str, Any]) -> None:
            a, b = header[EXPERT], header[EXPERT.replace(".5.", ".6.")]
            a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]

        edit_header(hf / SINGLE_FILE, swap)
        assert len(findings(hf)) == 1 and "is not the file whose hash stands in SHA256SUMS" in findings(hf)[0]


class TestIndex:
    def test_files_and_index_disagree(self, shards: Path) -> None:
        files = sorted(path.name for path in shards.glob("*.safetensors"))

        def damage(weight_map: dict[str, str]) -> None:
            del weight_map["norm.weight"]
            weight_map["embed_tokens.weight"] = files[-1]
            weight_map["ghost"] = files[0]

        edit_index(shards, damage)
        assert findings(shards) == [
            f"{INDEX_FILE}: lists tensor 'embed_tokens.weight' in {files[-1]!r}, but it is in {files[0]}",
            f"{INDEX_FILE}: lists tensor 'ghost' in {files[0]!r}, but it is in none",
            f"{INDEX_FILE}: does not list tensor 'norm.weight', which is in {files[-1]}",
        ]

    def test_missing_shard_and_a_shard_too_many(self, shards: Path) -> None:
        last = max(shards.glob("*.safetensors"))
        shutil.move(last, shards / "model-99999-of-99999.safetensors")
        lines = findings(shards)
        assert f"{INDEX_FILE}: {last.name!r} is not in the directory; download the checkpoint again" in lines
        assert any(line.startswith("model-99999-of-99999.safetensors: is not in") for line in lines)
        assert any("which is missing" in line for line in lines)

    def test_one_tensor_in_two_shards(self, shards: Path) -> None:
        first, *_, last = sorted(shards.glob("*.safetensors"))
        name = "embed_tokens.weight"
        save_file({**load_file(last), name: load_file(first)[name]}, last)
        assert f"{last.name}: tensor {name!r} is in {first.name} too; remove one" in findings(shards)

    @pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
    def test_no_index(self, shards: Path, text: str) -> None:
        (shards / INDEX_FILE).write_text(text)
        assert findings(shards)[0].startswith(INDEX_FILE)

    @pytest.mark.parametrize("place", ["relative", "absolute", "link", "long", "pickle"])
    def test_path_that_leaves_the_directory_is_not_read(self, shards: Path, place: str) -> None:
        first = min(shards.glob("*.safetensors"))
        outside = shards.parent / "elsewhere.safetensors"
        shutil.move(first, outside)
        names = {"relative": "../elsewhere.safetensors", "absolute": str(outside), "link": first.name}
        name = names.get(place, "x" * 5000 if place == "long" else "pytorch_model.bin")
        if place == "link":
            first.symlink_to(outside)
        edit_index(shards, lambda m: m.update({k: name for k, file in m.items() if file == first.name}))
        report = verify(shards)
        assert any(finding.place == INDEX_FILE for finding in report.findings)
        assert outside.name not in [path.name for path in report.files]
        assert all(path.resolve().parent == shards.resolve() for path in report.files)

    def test_single_file_that_is_a_link_out_of_the_directory(self, hf: Path) -> None:
        shutil.move(hf / SINGLE_FILE, hf.parent / "other")
        (hf / SINGLE_FILE).symlink_to(hf.parent / "other")
        assert "lies outside the checkpoint directory" in findings(hf)[0]

    def test_pickles_are_never_opened(self, hf: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[object, ...]:
                return os.mkdir, (str(hf / "trapped"),)

        (hf / SINGLE_FILE).write_bytes(pickle.dumps(Trap()))
        assert findings(hf)
        (hf / SINGLE_FILE).rename(hf / "pytorch_model.bin")
        assert any("pickled weights can run code" in line for line in findings(hf))
        assert not (hf / "trapped").exists()

    def test_a_pipe_is_not_waited_for(self, hf: Path) -> None:
        (hf / SINGLE_FILE).unlink()
        os.mkfifo(hf / SINGLE_FILE)
        assert any("neither model.safetensors nor" in line for line in findings(hf))


class TestHashes:
    def test_recorded_and_checked(self, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", str(shards), "--record"]) == 0
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=shards, check=True, capture_output=True)
        report = verify(shards)
        assert report.findings == [] and report.hashed == len(report.files)
        assert main(["verify", str(shards), "--record"]) == 2
        assert "SHA256SUMS: already there" in capsys.readouterr().err

    def test_one_bit(self, shards: Path) -> None:
        """A change that no header shows."""
        main(["verify", str(shards), "--record"])
        path = max(shards.glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        (line,) = findings(shards)
        assert line.startswith(f"{path.name}: is not the file whose hash stands in SHA256SUMS")

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("0" * 64 + "  ../../secret\n", "SHA256SUMS: has a hash of '../../secret', which is no weight file"),
            ("0" * 63 + "  model.safetensors\n", "SHA256SUMS: line 1 is not a hash and a file name"),
            ("\0\n", "SHA256SUMS: line 1 is not a hash and a file name"),
        ],
    )
    def test_hostile_sums(self, line: str, problem: str, hf: Path) -> None:
        (hf / "SHA256SUMS").write_text(line)
        assert findings(hf)[0].startswith(problem)

    def test_nothing_is_recorded_of_a_damaged_checkpoint(self, hf: Path) -> None:
        rewrite(hf, lambda tensors: tensors.pop(EXPERT))
        assert main(["verify", str(hf), "--record"]) == 1
        assert not (hf / "SHA256SUMS").exists()

    @pytest.mark.parametrize("good", [True, False])
    def test_of_the_hubs_cache(self, hf: Path, good: bool, tmp_path: Path) -> None:
        repository = tmp_path / "hub" / "models--someone--mixtral"
        snapshot, blobs = repository / "snapshots" / "0f", repository / "blobs"
        shutil.copytree(hf, snapshot)
        blobs.mkdir()
        content = (snapshot / SINGLE_FILE).read_bytes()
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content if good else content[:-1] + bytes([content[-1] ^ 1]))
        (snapshot / SINGLE_FILE).unlink()
        (snapshot / SINGLE_FILE).symlink_to(Path("../../blobs") / blob.name)
        assert verify(snapshot).hashed == 1
        assert len(findings(snapshot)) == (not good)

    @pytest.mark.parametrize("good", [True, False])
    def test_of_a_download(self, hf: Path, good: bool) -> None:
        digest = hashlib.sha256((hf / SINGLE_FILE).read_bytes()).hexdigest() if good else "0" * 64
        record = hf / ".cache" / "huggingface" / "download" / f"{SINGLE_FILE}.metadata"
        record.parent.mkdir(parents=True)
        record.write_text(f"{'a' * 40}\n{digest}\n1700000000.0\n")
        assert verify(hf).hashed == 1
        assert len(findings(hf)) == (not good)


def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    """256 MB in a sparse file, headers and hashes checked in a process of its own whose peak memory is taken."""
    spec = find_spec("llama-tiny")
    config = dataclasses.replace(spec.model, vocab_size=2**18, hidden_size=128)
    spec, out = dataclasses.replace(spec, model=config), tmp_path / "big"
    header, end = {}, 0
    for name, shape in parameter_shapes(config).items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    out.mkdir()
    write_header(out / SINGLE_FILE, header)
    os.truncate(out / SINGLE_FILE, (out / SINGLE_FILE).stat().st_size + end)
    save_spec(spec, out / "zoo.yaml")
    assert end > 250_000_000
    code = """
import resource, sys
from zoo.weights.verify import record_hashes, verify
small, big = sys.argv[1:]
verify(small)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
record_hashes(verify(big))
report = verify(big)
assert report.hashed == 1 and not report.findings, report.findings
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    small_one = tmp_path / "small"
    save_model(build(small("llama-tiny").model), small("llama-tiny"), small_one)
    run = subprocess.run(
        [sys.executable, "-c", code, str(small_one), str(out)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(run.stdout) < 16 * 1024


def test_no_directory_is_a_mistake_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert "no such directory; give a checkpoint directory" in capsys.readouterr().err
    assert [line.split(": ")[0] for line in findings(tmp_path)] == ["config.json", str(tmp_path)]
