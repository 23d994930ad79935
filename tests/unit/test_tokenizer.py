"""Tokenizers: equal to transformers and sentencepiece on real text, lossless when trained here, strict when loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from zoo.tokenizer import Tokenizer, check_vocab
from zoo.training.data.sources import Source
from zoo.training.data.tokenizer_training import train_tokenizer

TEXT = "One day a girl named Lily found 12 needles.\n\n  She said: “naïve café” 😀\tand ran.\n"
DEEPSEEK, STORIES = "tokenizers/deepseek", "models/stories260K_hf"
MISTRAL = ("tokenizers/mistral/tokenizer.model.v1", "tokenizers/mistral/mistral_instruct_tokenizer_240323.model.v3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    text = directory / "text.txt"
    text.write_text(TEXT * 50, encoding="utf-8")
    train_tokenizer([Source(str(text))], 330, directory / "tokenizer")
    return directory / "tokenizer"


def real_texts(shared_data: Path, name: str, count: int = 20) -> list[str]:
    text = (shared_data / "text" / name).read_text(encoding="utf-8")
    return [text[i : i + 2000].lstrip() for i in range(0, len(text), len(text) // count)]


@pytest.mark.parametrize(("directory", "text"), [(STORIES, "tinystories_sample.txt"), (DEEPSEEK, "enwiki_sample.txt")])
def test_directories_encode_and_decode_as_transformers(shared_data: Path, directory: str, text: str) -> None:
    ours = Tokenizer.load(shared_data / directory)
    theirs = AutoTokenizer.from_pretrained(shared_data / directory)
    texts = real_texts(shared_data, text)
    assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    assert ours.encode_batch(texts, bos=ours.add_bos, eos=ours.add_eos) == theirs(texts)["input_ids"]
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    ids = ours.encode(texts[0], bos=True)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == texts[0]


@pytest.mark.parametrize("model", MISTRAL)
def test_sentencepiece_files_encode_as_sentencepiece_and_transformers(
    shared_data: Path, tmp_path: Path, model: str
) -> None:
    ours = Tokenizer.load(shared_data / model)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / model))
    texts = [*real_texts(shared_data, "enwiki_sample.txt"), TEXT, "", "<s> stays text"]
    assert ours.encode_batch(texts) == [reference.encode(text) for text in texts]
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    # transformers rebuilds the merges from the pieces and joins runs of spaces in another order than sentencepiece.
    texts = [re.sub(" {2,}", " ", text) for text in texts if "<s>" not in text]
    assert ours.encode_batch(texts, bos=True) == theirs(texts)["input_ids"]


def test_saving_copies_the_files_and_keeps_the_fingerprint(shared_data: Path, tmp_path: Path) -> None:
    fingerprints = set()
    for place in (STORIES, DEEPSEEK, *MISTRAL):
        original = Tokenizer.load(shared_data / place)
        original.save(tmp_path / place)
        assert Tokenizer.load(tmp_path / place).fingerprint == original.fingerprint
        fingerprints.add(original.fingerprint)
    assert len(fingerprints) == 4
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / STORIES / name).read_bytes() == (shared_data / STORIES / name).read_bytes()


def test_bos_setting_of_the_config_is_part_of_the_fingerprint(trained: Path, tmp_path: Path) -> None:
    Tokenizer.load(trained).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    changed = Tokenizer.load(tmp_path)
    assert not changed.add_bos
    assert changed.encode("Lily") == Tokenizer.load(trained).encode("Lily")
    assert changed.fingerprint != Tokenizer.load(trained).fingerprint


def test_template_of_tokenizer_json_tells_whether_bos_is_added(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers.models import WordLevel
    from tokenizers.processors import TemplateProcessing

    model = HFTokenizer(WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.add_eos) == (0, 1, True, False)
    assert tokenizer.encode("a", bos=True, eos=True) == [0, 2, 1]
    assert tokenizer.encode("a") == [2]


@pytest.fixture(scope="module")
def both(trained: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.load(trained), AutoTokenizer.from_pretrained(trained)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from(TEXT) | st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_a_trained_tokenizer_loses_nothing_and_equals_transformers(both: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = both
    ids = ours.encode(text, bos=True)
    assert ours.decode(ids) == text
    # transformers takes a special token spelled out in a text for the token; sentencepiece does not.
    if not any(special in text for special in ("<s>", "</s>", "<unk>")):
        assert ids == theirs(text)["input_ids"]


def test_training_twice_gives_the_same_model(trained: Path, tmp_path: Path) -> None:
    again = train_tokenizer([Source(str(trained.parent / "text.txt"))], 330, tmp_path / "again")
    assert again.fingerprint == Tokenizer.load(trained).fingerprint
    assert again.vocab_size == 330


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(10, "vocab_size = 10: give at least 260"), (100_000, "vocab_size = 100000: .*too high.*<= ")],
)
def test_vocabulary_that_cannot_be_trained_is_refused(
    trained: Path, tmp_path: Path, vocab_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer([Source(str(trained.parent / "text.txt"))], vocab_size, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_errors_of_a_source_reach_the_caller_of_training(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good\xff")
    with pytest.raises(ValueError, match=r"bad.txt: byte 4 \(0xff\) is not UTF-8"):
        train_tokenizer([Source(str(tmp_path / "bad.txt"))], 300, tmp_path / "out")


def test_vocabulary_larger_than_the_embedding_is_refused(trained: Path) -> None:
    tokenizer = Tokenizer.load(trained)
    check_vocab(tokenizer, 330)
    check_vocab(tokenizer, 512)
    with pytest.raises(ValueError, match=r"vocab_size = 329: tiny has fewer .*\(330\); set vocab_size: 330"):
        check_vocab(tokenizer, 329, where="tiny")


def test_ids_outside_the_vocabulary_are_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match="token id 330: outside this tokenizer's vocabulary of 330"):
        Tokenizer.load(trained).decode([1, 330])


def test_what_is_no_tokenizer_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such tokenizer file or directory"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.load(tmp_path)
    for name, data, message in (
        ("tokenizer.model", b"\x80\x04pickle", "not a sentencepiece model"),
        ("tokenizer.model", b"", "the file is empty"),
        ("tokenizer.json", b'{"model": 1}', "not a tokenizer.json that"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            Tokenizer.load(tmp_path)


def test_added_tokens_that_sentencepiece_lacks_are_refused(trained: Path, tmp_path: Path) -> None:
    Tokenizer.load(trained).save(tmp_path)
    for entry in ({"330": {"content": "<|im_start|>"}}, {"5": {"content": "<|im_start|>"}}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entry}))
        with pytest.raises(ValueError, match=r"added_tokens_decoder\[\d+\] = '<\|im_start\|>' is not in"):
            Tokenizer.load(tmp_path)


def test_special_token_outside_the_vocabulary_is_refused(trained: Path, tmp_path: Path) -> None:
    Tokenizer.load(trained).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "[CLS]"}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json: bos_token = '\[CLS\]' is not in the vocabulary"):
        Tokenizer.load(tmp_path)
