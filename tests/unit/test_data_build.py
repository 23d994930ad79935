"""Building a data directory from every kind of source, and reading back what was written."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from zoo.cli.main import main
from zoo.tokenizer import Tokenizer
from zoo.training.data.builder import as_tokens, build
from zoo.training.data.sources import Source
from zoo.training.data.store import TokenSplit, load_tokenizer, read_manifest, token_dtype, verify
from zoo.training.data.tokenizer_training import train_tokenizer

STORIES = [f"Story {n}: Lily found {n * 7} apples.\nThe end of story {n}." for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "text.txt").write_text("\n".join(STORIES))
    return train_tokenizer([Source(str(directory / "text.txt"))], 300, directory / "tokenizer")


def documents(directory: Path, name: str = "train") -> list[str]:
    """The texts of a split, after checking that each stands between BOS and EOS."""
    split = TokenSplit(directory, "train" if name == "train" else "validation")
    tokenizer = load_tokenizer(directory, read_manifest(directory))
    texts = []
    for start, stop in zip(split.offsets[:-1], split.offsets[1:], strict=True):
        ids = split.tokens[start:stop].tolist()
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        texts.append(tokenizer.decode(ids))
    return texts


def write_sources(directory: Path) -> dict[str, Source]:
    """The same stories as text, JSONL, Parquet and a local directory in hub layout."""
    (directory / "stories.txt").write_text("\n\n".join(STORIES), encoding="utf-8")
    lines = [json.dumps({"id": n, "story": story}) for n, story in enumerate(STORIES)]
    (directory / "stories.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    table = pyarrow.table({"story": STORIES, "id": list(range(len(STORIES)))})
    pyarrow.parquet.write_table(table, directory / "stories.parquet")
    (directory / "hub" / "owner" / "stories" / "english").mkdir(parents=True)
    hub = directory / "hub" / "owner" / "stories"
    pyarrow.parquet.write_table(table, hub / "english" / "train-00000-of-00001.parquet")
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: english\n  data_files:\n  - split: train\n    path: english/train-*\n---\n"
    )
    return {
        "txt": Source(str(directory / "stories.txt"), separator="\n\n"),
        "jsonl": Source(str(directory / "stories.jsonl"), text_column="story"),
        "parquet": Source(str(directory / "stories.parquet"), text_column="story"),
        "hub": Source(f"{hub}:english", text_column="story"),
    }


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "hub"])
def test_every_kind_of_source_gives_the_same_documents(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    source = write_sources(tmp_path)[kind]
    manifest = build([source], tokenizer, tmp_path / "data", validation_fraction=0)
    assert documents(tmp_path / "data") == STORIES
    assert manifest == read_manifest(tmp_path / "data")
    assert manifest.splits["train"].documents == manifest.sources[0].documents == len(STORIES)
    assert manifest.splits["validation"].tokens == 0
    verify(tmp_path / "data")
    if kind != "hub":
        contents = Path(source.location).read_bytes()
        assert (manifest.sources[0].bytes, manifest.sources[0].sha256) == (
            len(contents),
            hashlib.sha256(contents).hexdigest(),
        )


def test_a_text_file_is_one_document_unless_it_is_separated(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo", encoding="utf-8")
    build([Source(str(tmp_path / "a.txt"))], tokenizer, tmp_path / "data", validation_fraction=0)
    assert documents(tmp_path / "data") == ["one\n\ntwo"]


def test_separators_across_read_blocks_are_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    # 1 MiB is read at a time; the separator begins two bytes before that.
    texts = ["a" * ((1 << 20) - 2), "é" * 10, "end"]
    (tmp_path / "a.txt").write_text("<|end|>".join(texts), encoding="utf-8")
    read = list(Source(str(tmp_path / "a.txt"), separator="<|end|>").documents())
    assert [text for text, _ in read] == texts
    assert sum(size for _, size in read) == (tmp_path / "a.txt").stat().st_size


def test_building_twice_gives_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = list(write_sources(tmp_path).values())
    for name in ("one", "two"):
        build(sources, tokenizer, tmp_path / name, validation_fraction=0.2)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 7
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == set()


def test_held_out_documents_depend_on_their_text_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = write_sources(tmp_path)
    build([sources["txt"]], tokenizer, tmp_path / "one", validation_fraction=0.2)
    build([sources["parquet"], sources["jsonl"]], tokenizer, tmp_path / "two", validation_fraction=0.2)
    held_out = documents(tmp_path / "one", "validation")
    assert 0 < len(held_out) < 30
    assert documents(tmp_path / "two", "validation") == held_out * 2
    assert sorted(held_out + documents(tmp_path / "one")) == sorted(STORIES)


def test_a_validation_source_of_its_own_is_not_trained_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "held_out.txt").write_text("never seen in training")
    held_out = Source(str(tmp_path / "held_out.txt"))
    manifest = build([write_sources(tmp_path)["txt"]], tokenizer, tmp_path / "data", validation_sources=[held_out])
    assert documents(tmp_path / "data", "validation") == ["never seen in training"]
    assert documents(tmp_path / "data") == STORIES
    assert [(s.name, s.split) for s in manifest.sources] == [("stories.txt", "train"), ("held_out.txt", "validation")]


def test_of_a_source_only_the_first_documents_are_read_and_none_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_sources(tmp_path)["txt"].location
    some = Source(path, separator="\n\n", first=20, held_out=False)
    others = [f"Another story, number {n}." for n in range(40)]
    (tmp_path / "others.txt").write_text("\n\n".join(others), encoding="utf-8")
    split = Source(str(tmp_path / "others.txt"), separator="\n\n")
    build([some, split], tokenizer, tmp_path / "data", validation_fraction=0.5)
    training, validation = documents(tmp_path / "data"), documents(tmp_path / "data", "validation")
    assert training[:20] == STORIES[:20]
    assert validation and sorted(training[20:] + validation) == sorted(others)


def test_ids_are_stored_in_the_smallest_type_and_never_wrap() -> None:
    assert [token_dtype(v) for v in (1 << 16, (1 << 16) + 1)] == ["<u2", "<u4"]
    assert as_tokens([0, 65535], np.dtype("<u2"), 1 << 16, "x").tolist() == [0, 65535]
    for ids, vocab_size in (([65536], 1 << 17), ([300], 300), ([-1], 300)):
        with pytest.raises(ValueError, match=rf"books: the tokenizer gave id {ids[0]}, outside its vocabulary"):
            as_tokens(ids, np.dtype("<u2"), vocab_size, "books")


def test_document_ids_at_every_position(tmp_path: Path, tokenizer: Tokenizer) -> None:
    build([write_sources(tmp_path)["txt"]], tokenizer, tmp_path / "data", validation_fraction=0)
    split = TokenSplit(tmp_path / "data", "train")
    lengths = np.diff(split.offsets)
    expected = np.repeat(np.arange(len(lengths)), lengths)
    for start in range(0, len(split.tokens) - 20, 7):
        assert split.document_ids(start, start + 20).tolist() == expected[start : start + 20].tolist()


def test_a_split_travels_to_workers_by_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    build([write_sources(tmp_path)["txt"]], tokenizer, tmp_path / "data", validation_fraction=0)
    split = TokenSplit(tmp_path / "data", "train")
    data = pickle.dumps(split)
    assert len(data) < 1000
    assert (pickle.loads(data).tokens == split.tokens).all()


def test_the_commands_build_and_show_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_sources(tmp_path)["txt"].location
    tokenizer, data = str(tmp_path / "tokenizer"), str(tmp_path / "data")
    assert main(["data", "train-tokenizer", "--vocab-size", "300", "--out", tokenizer, "--json", source]) == 0
    facts = json.loads(capsys.readouterr().out)
    command = ["data", "build", "--tokenizer", tokenizer, "--out", data, "--separator", "\\n\\n", source]
    assert main([*command, "--validation-fraction", "0.2", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["tokenizer_fingerprint"] == facts["fingerprint"]
    assert manifest["vocab_size"] == facts["vocab_size"] == 300
    assert main(["data", "info", data, "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == manifest

    assert main(command) == 2
    assert "holds data already" in capsys.readouterr().err
    assert main([*command, "--validation-fraction", "0", "--overwrite"]) == 0
    assert documents(tmp_path / "data") == STORIES
