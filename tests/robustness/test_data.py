"""Bad input to the data commands: one line that names value, place and fix, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from zoo.cli.main import main
from zoo.tokenizer import Tokenizer
from zoo.training.data import TokenDataModule
from zoo.training.data.builder import build
from zoo.training.data.sources import Source
from zoo.training.data.store import TokenSplit, load_tokenizer, read_manifest, verify
from zoo.training.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "text.txt").write_text("Lily found a needle in her room.\n" * 20)
    return train_tokenizer([Source(str(directory / "text.txt"))], 280, directory / "tokenizer")


@pytest.fixture
def data(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    (tmp_path / "good.txt").write_text("\n".join(f"Lily found {n} needles." for n in range(50)))
    build([Source(str(tmp_path / "good.txt"), separator="\n")], tokenizer, tmp_path / "data", validation_fraction=0.2)
    return tmp_path / "data"


def parquet(path: Path, columns: dict[str, list[object]]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def bad_sources(directory: Path) -> dict[str, str]:
    """Files that cannot be tokenised, and what the error must say of each."""
    files: dict[str, tuple[bytes, str]] = {
        "empty.txt": (b"", "empty.txt: the file is empty"),
        "empty.jsonl": (b"", "empty.jsonl: the file is empty"),
        "blank.txt": (b" \n\n ", "blank.txt: holds no text"),
        "latin1.txt": (b"caf\xc3\xa9 caf\xe9", "latin1.txt: byte 9 (0xe9) is not UTF-8"),
        "latin1.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "latin1.jsonl: byte 24 (0xe9) is not UTF-8"),
        "broken.jsonl": (b'{"text": "a"}\n\n{"text": \n', "broken.jsonl: line 3: not JSON"),
        "list.jsonl": (b'["a"]\n', "list.jsonl: line 1: expected an object with the field 'text', got [\"a\"]"),
        "near.jsonl": (b'{"texts": "a"}\n', "near.jsonl: line 1: no text column 'text'; did you mean 'texts'?"),
        "other.jsonl": (
            b'{"id": 1, "body": "a"}\n',
            "other.jsonl: line 1: no text column 'text'; there are 'id', 'body'",
        ),
        "number.jsonl": (b'{"text": 5}\n', "number.jsonl: line 1: 'text' is int, not text"),
        "half.jsonl": (b'{"text": "\\ud800"}\n', "half.jsonl: line 1: 'text' holds half a surrogate pair"),
        "cut.parquet": (b"PAR1....", "cut.parquet: not a whole Parquet file"),
        "model.pkl": (b"\x80\x04", "model.pkl: unknown kind of file '.pkl'"),
    }
    for name, (contents, _) in files.items():
        (directory / name).write_bytes(contents)
    parquet(directory / "story.parquet", {"story": ["a"], "id": [1]})
    parquet(directory / "null.parquet", {"text": ["a", None]})
    parquet(directory / "torn.parquet", {"text": [f"row {n}" for n in range(5000)]})
    whole = (directory / "torn.parquet").read_bytes()
    (directory / "torn.parquet").write_bytes(whole[:2000] + bytes(8000) + whole[10_000:])
    return {name: message for name, (_, message) in files.items()} | {
        "story.parquet": "story.parquet: no text column 'text'; there are 'story', 'id'",
        "null.parquet": "null.parquet: row 2: 'text' is NoneType, not text",
        "torn.parquet": "torn.parquet: not a whole Parquet file (",
        "missing.txt": "missing.txt: no such file",
    }


def test_every_bad_source_is_named_in_one_line_and_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sources").mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    for name, message in bad_sources(tmp_path / "sources").items():
        source = str(tmp_path / "sources" / name)
        out = tmp_path / "out" / "data"
        assert main(["data", "build", "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(out), source]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "zoo: error:" in line]
        assert len(lines) == 1
        assert message in lines[0]
        assert list((tmp_path / "out").iterdir()) == []


def test_a_hub_data_set_that_cannot_be_reached_is_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="nobody/nothing: cannot be read as a hub data set") as error:
        build([Source("nobody/nothing")], tokenizer, tmp_path / "data")
    assert "\n" not in str(error.value)


def test_configurations_and_splits_that_a_data_set_lacks_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "hub" / "stories").mkdir(parents=True)
    parquet(tmp_path / "hub" / "stories" / "train.parquet", {"text": ["a"]})
    location = str(tmp_path / "hub" / "stories")
    for source, value in ((Source(f"{location}:french"), "french"), (Source(location, hub_split="test"), "test")):
        with pytest.raises(
            ValueError, match=rf"stories.*: cannot be read as a hub data set \(.*{value}.*; give"
        ) as error:
            build([source], tokenizer, tmp_path / "data")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_fractions_outside_the_range_are_refused(tmp_path: Path, tokenizer: Tokenizer, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"validation_fraction = {fraction}: give a number from 0 to below 1"):
        build([Source("x.txt")], tokenizer, tmp_path / "data", validation_fraction=fraction)


def test_a_split_without_documents_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "one.txt").write_text("a single document")
    with pytest.raises(ValueError, match=r"1 train and 0 validation documents: the validation split is empty; give"):
        build([Source(str(tmp_path / "one.txt"))], tokenizer, tmp_path / "data", validation_fraction=0.01)


def test_what_is_no_data_directory_is_never_overwritten(tmp_path: Path, data: Path, tokenizer: Tokenizer) -> None:
    source = Source(str(tmp_path / "good.txt"), separator="\n")
    before = sorted(data.rglob("*"))
    with pytest.raises(ValueError, match=r"holds data already; .* replace it with --overwrite"):
        build([source], tokenizer, data)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (precious / "manifest.json").write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match=r"precious: exists and is not a data directory"):
        build([source], tokenizer, precious, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert sorted(data.rglob("*")) == before


def test_a_failed_rebuild_keeps_the_old_data(tmp_path: Path, data: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        build([Source(str(tmp_path / "bad.txt"))], tokenizer, data, overwrite=True)
    verify(data)


def test_a_full_disk_keeps_the_old_data(tmp_path: Path, data: Path) -> None:
    # A limit on the size of files fails a write as a full disk does, in the middle of the token file.
    code = (
        "import resource, signal, sys; from zoo.cli.main import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "large.txt").write_text("Lily found a needle.\n" * 5000)
    arguments = ["data", "build", "--tokenizer", str(data / "tokenizer"), "--out", str(data), "--separator", "\\n"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--overwrite", str(tmp_path / "large.txt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "zoo: error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"data", "good.txt", "large.txt"}
    verify(data)


def test_a_build_killed_at_any_moment_leaves_no_half_directory(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    source = tmp_path / "source.txt"
    source.write_text("\n".join(f"Lily found {n} needles in room {n * n}." for n in range(60_000)))
    out = tmp_path / "out" / "data"
    command = [sys.executable, "-m", "zoo.cli.main", "data", "build", "--tokenizer", str(tmp_path / "tokenizer")]
    command += ["--out", str(out), "--separator", "\\n", str(source)]
    staged = out.parent / ".data.building" / "train.bin"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (staged.exists() and staged.stat().st_size > 10_000):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    assert staged.exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    verify(out)
    assert os.listdir(out.parent) == ["data"]


def test_a_second_build_of_the_same_directory_waits_for_nobody(
    tmp_path: Path, data: Path, tokenizer: Tokenizer
) -> None:
    from zoo.training.data.staging import staging

    with staging(tmp_path / "new"), pytest.raises(ValueError, match="new: another process is building it"):
        build([Source(str(tmp_path / "good.txt"), separator="\n")], tokenizer, tmp_path / "new")


def test_damaged_data_is_refused(data: Path, tmp_path: Path) -> None:
    def damaged(name: str, change: bytes | None) -> Path:
        copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(data, copy)
        if change is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(change)
        return copy

    tokens, offsets = (data / "train.bin").read_bytes(), (data / "train.offsets").read_bytes()
    for name, change, message in (
        ("train.bin", tokens[:-2], r"train\.bin: \d+ bytes, manifest.json says \d+; the file was cut or replaced"),
        ("train.bin", None, r"train\.bin: missing, although manifest\.json lists it"),
        ("train.offsets", offsets[:-8], r"train\.offsets: \d+ bytes, manifest.json says"),
        ("train.offsets", offsets[8:] + offsets[:8], r"train\.offsets: ends at token 0, manifest.json says"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenSplit(damaged(name, change), "train")
    flipped = damaged("train.bin", bytes([tokens[0] ^ 1]) + tokens[1:])
    with pytest.raises(ValueError, match=r"train\.bin: contents differ from the SHA-256 in manifest\.json"):
        verify(flipped)


def test_damaged_manifests_are_refused(data: Path, tmp_path: Path) -> None:
    good = json.loads((data / "manifest.json").read_text())
    for text, message in (
        (json.dumps(good | {"version": 2}), "version = 2: this zoo reads version 1"),
        (json.dumps(good | {"format": "other"}), "not a moe-zoo data manifest"),
        (json.dumps(good)[:-5], "damaged"),
        (json.dumps(good | {"dtyp": "<u2"}), "unknown key 'dtyp'; did you mean 'dtype'"),
        (json.dumps(good | {"dtype": "<f4"}), "dtype = '<f4': use one of '<u2', '<u4'"),
        (json.dumps(good | {"splits": {"train": good["splits"]["train"]}}), "splits = "),
    ):
        (data / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_manifest(data)
    with pytest.raises(ValueError, match=r"no manifest\.json; make a data directory with zoo data build"):
        TokenDataModule(tmp_path, sequence_length=8, batch_size=1)


def test_another_tokenizer_in_the_directory_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("entirely other words\n" * 20)
    shutil.rmtree(data / "tokenizer")
    train_tokenizer([Source(str(tmp_path / "text.txt"))], 280, data / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer: not the tokenizer that manifest\.json names"):
        load_tokenizer(data, read_manifest(data))


def test_sequences_longer_than_the_split_are_refused(data: Path) -> None:
    module = TokenDataModule(data, sequence_length=100_000, batch_size=1)
    with pytest.raises(ValueError, match=r"sequence_length = 100000: the train split of .* has only \d+ tokens"):
        module.train_dataloader()


def test_a_trained_tokenizer_is_not_written_over_files(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="data: exists and is not empty; choose another --out"):
        train_tokenizer([Source(str(tmp_path / "good.txt"))], 280, data)
