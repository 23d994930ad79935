"""Conversations as training data: what is learned of them, what is stored, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from zoo.chat import DEFAULT_TEMPLATE, MARKS, ChatTemplate, Encoded, encode_pair
from zoo.cli.main import main
from zoo.tokenizer import Tokenizer
from zoo.training.data import TokenDataModule
from zoo.training.data.builder import build
from zoo.training.data.instructions import Instructions
from zoo.training.data.packing import IGNORED, PackedDataset
from zoo.training.data.sampler import epoch_order
from zoo.training.data.sources import Source
from zoo.training.data.store import TokenSplit, load_tokenizer, read_manifest, verify
from zoo.training.data.tokenizer_training import train_tokenizer

WORDS = ("<s>", "</s>", "User:", "Assistant:", "System:", "hi", "hello", "ok", "more", "yes", "<unk>", "kind")

MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello ok"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "yes"},
]
IDS = [0, 2, 5, 3, 6, 7, 1, 2, 8, 3, 9, 1]
ANSWERS = [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]

WITH_TAGS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}Assistant: "
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}User: {{ m.content | trim }} {% endif %}{% endfor %}"
)
ONLY_THE_LAST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }} "
    "{% elif loop.last %}Assistant: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    """A tokenizer whose tokens are the ``WORDS``."""
    model = HFTokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    directory = tmp_path / "words"
    directory.mkdir()
    model.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A sentencepiece tokenizer that spells rare characters in bytes."""
    directory = tmp_path_factory.mktemp("tokenizer")
    text = "\n".join(f"User: What is {n} and {n}?\nAssistant: It is {2 * n}, my friend." for n in range(60))
    (directory / "text.txt").write_text(text)
    return train_tokenizer([Source(str(directory / "text.txt"))], 320, directory / "tokenizer")


def write_lines(path: Path, rows: list[Any]) -> Instructions:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return Instructions(str(path))


def answers_of(encoded: Encoded) -> list[int]:
    return [token for token, answer in zip(encoded.ids, encoded.answers, strict=True) if answer]


def test_labels_by_hand(tmp_path: Path, words: Tokenizer) -> None:
    rows = [{"id": 1, "messages": MESSAGES}, {"prompt": "hi more", "completion": " yes"}]
    build([write_lines(tmp_path / "a.jsonl", rows)], words, tmp_path / "data", validation_fraction=0)
    split = TokenSplit(tmp_path / "data", "train")
    assert split.tokens.tolist() == [*IDS, 0, 5, 8, 9, 1]
    assert split.mask is not None and split.mask.tolist() == [*ANSWERS, 0, 0, 0, 1, 1]
    assert split.offsets.tolist() == [0, 12, 17]
    info = read_manifest(tmp_path / "data").splits["train"]
    assert (info.documents, info.tokens, info.answers) == (2, 17, 7)
    window = PackedDataset(split, 18)[0]
    none = IGNORED
    assert window["labels"].tolist() == [
        *(none, none, none, 6, 7, 1, none, none, none, 9, 1, none),
        *(none, none, 9, 1, none, none),
    ]
    assert window["document_ids"].tolist() == [0] * 12 + [1] * 5 + [-1]


def test_a_template_may_mark_answers_itself(words: Tokenizer) -> None:
    encoded = ChatTemplate(WITH_TAGS, words).encode(MESSAGES)
    assert (encoded.ids, encoded.answers) == (IDS, [bool(a) for a in ANSWERS])
    only_text = WITH_TAGS.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}")
    assert answers_of(ChatTemplate(only_text, words).encode(MESSAGES)) == [6, 7, 9]


def test_a_template_that_rewrites_earlier_turns_is_refused_where_answers_are_lost(words: Tokenizer) -> None:
    template = ChatTemplate(ONLY_THE_LAST, words)
    assert answers_of(template.encode(MESSAGES[:2])) == [6, 7, 1]
    with pytest.raises(ValueError, match="before message 2 in another way once it is there"):
        template.encode(MESSAGES)


def test_a_template_is_found_where_transformers_looks_for_it(tmp_path: Path, words: Tokenizer) -> None:
    assert words.chat_template is None
    config = json.loads((tmp_path / "words" / "tokenizer_config.json").read_text())
    for stored, expected in (
        (WITH_TAGS, WITH_TAGS),
        ([{"name": "tools", "template": "x"}, {"name": "default", "template": WITH_TAGS}], WITH_TAGS),
        ([{"name": "tools", "template": "x"}], None),
    ):
        content = json.dumps(config | {"chat_template": stored})
        (tmp_path / "words" / "tokenizer_config.json").write_text(content)
        assert Tokenizer.load(tmp_path / "words").chat_template == expected
    (tmp_path / "words" / "chat_template.jinja").write_text("of its own")
    tokenizer = Tokenizer.load(tmp_path / "words")
    assert tokenizer.chat_template == "of its own"
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").chat_template == "of its own"
    assert tokenizer.fingerprint == words.fingerprint


CONTENT = st.text(
    st.one_of(
        st.sampled_from("ab :\n<>/s|"),
        st.characters(exclude_categories=("Cs", "Cc", "Cn"), exclude_characters="\u2581"),
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3), system=st.none() | CONTENT)
def test_answers_are_learned_to_the_character_whatever_is_said(
    pieces: Tokenizer, turns: list[tuple[str, str]], system: str | None
) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    template = ChatTemplate(DEFAULT_TEMPLATE, pieces)
    encoded = template.encode(messages)
    assert pieces.eos_id is not None and encoded.ids[0] == pieces.bos_id
    learned = answers_of(encoded)
    assert learned[-1] == pieces.eos_id and learned.count(pieces.eos_id) == len(turns)
    texts, start = [], 0
    for place, token in enumerate(learned):
        if token == pieces.eos_id:
            texts.append(pieces.decode(learned[start:place]))
            start = place + 1
    assert texts == [f" {answer}" for _, answer in turns]
    # What is not learned, read up to an answer, is the prompt that the model gets for it.
    first = encoded.answers.index(True)
    assert encoded.ids[:first] == [
        pieces.bos_id,
        *pieces.encode(template.render(messages[: len(messages) - 2 * len(turns) + 1], add_generation_prompt=True)[3:]),
    ]
    prompt, completion = turns[0]
    pair = encode_pair(prompt, f" {completion}", pieces)
    assert pieces.decode(pair.ids) == f"{prompt} {completion}"
    assert answers_of(pair)[-1] == pieces.eos_id


ATTEMPTS = {
    "attribute": "{{ messages.__class__ }}",
    "chain": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "filter": "{{ '' | attr('__class__') }}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "self": "{{ self.__init__.__globals__ }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "namespace by keyword": "{{ namespace(**{'__class__': 1}) }}",
    "change": "{{ messages.append(1) }}",
    "change of a message": "{{ messages[0].update({'content': 'x'}) }}",
    "helpers": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "file": "{% include '/etc/hostname' %}",
    "import": "{% import 'os' as os %}",
    "long loop": "{% for i in range(10 ** 9) %}{% endfor %}",
    "mistake": "{{ 1 / 0 }}",
    "refusal": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_template_can_do_nothing_but_write(attempt: str, words: Tokenizer) -> None:
    template = ChatTemplate(f"{{{{ bos_token }}}}{ATTEMPTS[attempt]}", words, "evil.jinja")
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(ValueError, match=r"^evil\.jinja: \w+: "):
        template.render(messages)
    assert messages == MESSAGES


def test_a_template_that_is_not_jinja_is_refused(words: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"x\.jinja: not a chat template in Jinja"):
        ChatTemplate("{% for %}", words, "x.jinja")


BAD_LINES = {
    "not JSON": ('{"messages": [', "not JSON"),
    "a list": ([1], "expected an object with 'messages', or 'prompt' and 'completion'"),
    "neither": ({"text": "hi"}, "expected 'messages', or 'prompt' and 'completion', got 'text'"),
    "both": ({"messages": MESSAGES, "prompt": "hi"}, "expected 'messages', or 'prompt' and 'completion', got"),
    "half a pair": ({"prompt": "hi"}, "'completion' is missing; expected text"),
    "a blank completion": ({"prompt": "hi", "completion": " "}, "nothing to learn"),
    "no messages": ({"messages": []}, r"'messages' = \[\]: expected a list of objects"),
    "a message of text": ({"messages": ["hi"]}, "message 1: expected 'role' and 'content' and nothing else, got hi"),
    "tools": (
        {"messages": [*MESSAGES, {"role": "assistant", "content": "ok", "tool_calls": []}]},
        "message 5: expected 'role' and 'content' and nothing else, got 'role', 'content', 'tool_calls'",
    ),
    "content of parts": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "'content' of message 1 is list; expected text",
    ),
    "no answer": ({"messages": MESSAGES[:1]}, "nothing to learn: no message with text .* roles are user"),
    "half a character": ({"prompt": "hi", "completion": "\ud800"}, "half a surrogate pair"),
    "a mark": ({"prompt": "hi", "completion": MARKS[0]}, r"U\+FDD0: not a character of any text"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_line_that_cannot_be_learned_is_named(tmp_path: Path, words: Tokenizer, kind: str) -> None:
    row, message = BAD_LINES[kind]
    source = write_lines(tmp_path / "bad.jsonl", [{"messages": MESSAGES}, "", row])
    with pytest.raises(ValueError, match=rf"bad\.jsonl: line 3: .*{message}"):
        build([source], words, tmp_path / "data", validation_fraction=0)
    assert not (tmp_path / "data").exists()


def test_other_sources_are_refused(tmp_path: Path, words: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("hi")
    with pytest.raises(ValueError, match=r"a\.txt: instructions are read from \.jsonl and \.ndjson files"):
        build([Instructions(str(tmp_path / "a.txt"))], words, tmp_path / "data")
    with pytest.raises(ValueError, match="holds no conversations"):
        build([write_lines(tmp_path / "empty.jsonl", [""])], words, tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="no such file"):
        build([Instructions(str(tmp_path / "none.jsonl"))], words, tmp_path / "data")
    good = write_lines(tmp_path / "good.jsonl", [{"messages": MESSAGES}])
    with pytest.raises(ValueError, match="text and instructions in one data directory"):
        build([good, Source(str(tmp_path / "a.txt"))], words, tmp_path / "data")


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} and {n}?"},
                {"role": "assistant", "content": f"It is {2 * n}." + " Really!" * (n % 5)},
            ]
        }
        for n in range(count)
    ]


def test_the_module_serves_labels_of_answers_in_the_usual_order(tmp_path: Path, pieces: Tokenizer) -> None:
    source = write_lines(tmp_path / "chats.jsonl", conversations(80))
    build([source], pieces, tmp_path / "data", validation_fraction=0.2)
    verify(tmp_path / "data")
    module = TokenDataModule(tmp_path / "data", sequence_length=128, batch_size=4, seed=3)
    dataset = module.train_dataset
    order = epoch_order(len(dataset), 3, 0)[:4]
    batch = next(iter(module.train_dataloader()))
    assert all(torch.equal(batch[key], torch.stack([dataset[int(w)][key] for w in order])) for key in batch)
    labels = batch["labels"][batch["labels"] != IGNORED]
    assert "Really" in pieces.decode(labels.tolist()) and "User" not in pieces.decode(labels.tolist())
    assert all((rows["labels"] != IGNORED).any() for rows in module.validation_dataset)
    assert load_tokenizer(tmp_path / "data", module.manifest).chat_template == DEFAULT_TEMPLATE
    with pytest.warns(UserWarning, match=r"\d+ of \d+ conversations are longer than sequence_length = 40 and cut"):
        short = TokenDataModule(tmp_path / "data", sequence_length=40, batch_size=4).train_dataset
    lengths = np.diff(short.split.offsets)
    assert 0 < short.cut == int((lengths > 40).sum()) < len(lengths)


def test_a_mask_that_was_changed_or_lost_is_found(tmp_path: Path, pieces: Tokenizer) -> None:
    source = write_lines(tmp_path / "chats.jsonl", conversations(20))
    build([source], pieces, tmp_path / "data", validation_fraction=0)
    mask = tmp_path / "data" / "train.mask"
    data = bytearray(mask.read_bytes())
    data[0] ^= 1
    mask.write_bytes(data)
    with pytest.raises(ValueError, match=r"train\.mask: contents differ"):
        verify(tmp_path / "data")
    mask.unlink()
    with pytest.raises(ValueError, match=r"train\.mask: missing, although manifest\.json lists it"):
        TokenSplit(tmp_path / "data", "train")


def test_the_command_builds_and_shows_answers(
    tmp_path: Path, words: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    chats, data = write_lines(tmp_path / "chats.jsonl", [{"messages": MESSAGES}] * 2).location, str(tmp_path / "data")
    (tmp_path / "my.jinja").write_text(WITH_TAGS)
    command = ["data", "build", "--tokenizer", str(tmp_path / "words"), "--out", data, "--validation", chats]
    assert main([*command, "--instructions", chats, "--chat-template", str(tmp_path / "my.jinja")]) == 0
    assert " 24 tokens               10 of them answers" in capsys.readouterr().out
    assert (tmp_path / "data" / "tokenizer" / "chat_template.jinja").read_text() == WITH_TAGS
    assert main(["data", "info", data, "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["validation"]["answers"] == 10
    assert main(command) == 2
    assert "give sources of text or --instructions" in capsys.readouterr().err
    assert main([*command, "text.txt", "--instructions", chats]) == 2
    assert "give sources of text or --instructions" in capsys.readouterr().err
    assert main([*command, "text.txt", "--chat-template", "my.jinja"]) == 2
    assert "text is not written by a template" in capsys.readouterr().err
