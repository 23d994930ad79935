"""``zoo generate`` with one prompt and with many, whose continuations are those of each alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.modules.module import register_module_forward_pre_hook

import zoo
from zoo.cli.main import main
from zoo.registry import find_spec
from zoo.weights import save_model

COUNTRIES = ("France", "Guinea", "Japan", "Peru", "Kenya")
QUESTIONS = [f"Question: What is the capital of {country}?\nAnswer:" for country in COUNTRIES]
NEW = 6
EXAMPLES = "".join(f"Question: What is the capital of {c}?\nAnswer: {a}\n\n" for c, a in [("Chad", "N'Djamena")] * 12)


def run(capsys: pytest.CaptureFixture[str], source: str, *arguments: str) -> str:
    assert main(["generate", source, "--max-new-tokens", str(NEW), *arguments]) == 0
    return capsys.readouterr().out


def rows(capsys: pytest.CaptureFixture[str], source: str, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(capsys, source, *arguments, "--json").splitlines()]


@pytest.fixture(scope="module")
def source(repository: Path) -> str:
    return str(repository / "checkpoints" / "facts-mixtral")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": question}) for question in QUESTIONS), encoding="utf-8")
    return path


@pytest.fixture
def embedded() -> Iterator[list[int]]:
    """Tokens that enter a model, forward by forward."""
    counts: list[int] = []

    def count(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, nn.Embedding):
            counts.append(arguments[0].numel())

    handle = register_module_forward_pre_hook(count)
    yield counts
    handle.remove()


def test_one_prompt_is_its_text_and_nothing_else(capsys: pytest.CaptureFixture[str], source: str) -> None:
    (row,) = rows(capsys, source, "--prompt", QUESTIONS[0])
    assert list(row) == ["prompt", "text", "tokens", "tokens_per_second"]
    assert row["prompt"] == QUESTIONS[0] and row["text"] == " Paris"
    assert run(capsys, source, "--prompt", QUESTIONS[0]) == " Paris\n"


def test_many_prompts_continue_in_order_as_each_alone(
    capsys: pytest.CaptureFixture[str], source: str, file: Path
) -> None:
    alone = [rows(capsys, source, "--prompt", question)[0] for question in QUESTIONS]
    given = [argument for question in QUESTIONS for argument in ("--prompt", question)]
    for arguments in (given, ["--prompts", str(file)], ["--prompts", str(file), "--batch-size", "2"]):
        together = rows(capsys, source, *arguments)
        for key in ("prompt", "text", "tokens"):
            assert [row[key] for row in together] == [row[key] for row in alone]
    shown = run(capsys, source, *given)
    places = [shown.index(f"[{number}] {question[:30]}") for number, question in enumerate(QUESTIONS, start=1)]
    assert places == sorted(places)
    assert all(row["text"] in shown for row in alone)


def test_the_compiled_step_continues_as_the_other_and_is_made_only_where_it_is_taken(
    capsys: pytest.CaptureFixture[str], source: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = {"fullgraph": True, "isolate_recompiles": True, "backend": "eager"}  # C++ takes longer than all else
    monkeypatch.setattr("zoo.compiled.OPTIONS", traced)
    graphs = [counters["stats"]["unique_graphs"]]
    for arguments in (["--prompt", QUESTIONS[0]], ["--prompts", str(file)], ["--prompts", str(file)]):
        expected = run(capsys, source, *arguments)
        assert run(capsys, source, *arguments, "--compile") == expected
        graphs.append(counters["stats"]["unique_graphs"])
        if len(graphs) == 3:
            # as if five prompts of these experts were too many
            monkeypatch.setattr("zoo.compiled.LARGE", {"mkl": 0, "onednn": 0})
    assert [b - a for a, b in pairwise(graphs)] == [1, 1, 0]


def test_lines_of_a_text_are_prompts(capsys: pytest.CaptureFixture[str], source: str, tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes(b"The capital of Peru\r\n\nThe capital of Chad\n")
    assert [row["prompt"] for row in rows(capsys, source, "--prompts", str(file))] == [
        "The capital of Peru",
        "The capital of Chad",
    ]


def test_a_prefix_is_computed_once_for_all_batches(
    capsys: pytest.CaptureFixture[str], source: str, file: Path, tmp_path: Path, embedded: list[int]
) -> None:
    prefix = tmp_path / "examples.txt"
    prefix.write_text(EXAMPLES, encoding="utf-8")
    together = rows(capsys, source, "--prompts", str(file), "--prefix-file", str(prefix), "--batch-size", "2")
    shared = embedded[0]
    steps = [count for count in embedded if count > 2]  # without those of one token a row
    alone = [rows(capsys, source, "--prompt", EXAMPLES + question)[0] for question in QUESTIONS]
    for key in ("prompt", "text", "tokens"):
        assert [row[key] for row in together] == [row[key] for row in alone]
    tokenizer = zoo.tokenizer.Tokenizer.load(Path(source))
    assert shared > len(tokenizer.encode(EXAMPLES))
    longest = max(len(tokenizer.encode(EXAMPLES + question, bos=tokenizer.add_bos)) for question in QUESTIONS)
    assert len(steps) == 1 + 3 and sum(steps[1:]) <= len(QUESTIONS) * (longest - shared)
    assert rows(capsys, source, "--prompt", QUESTIONS[0], "--prefix", EXAMPLES)[0]["tokens"] == alone[0]["tokens"]


def test_equal_prompts_of_two_batches_draw_for_themselves_and_again_the_same(
    capsys: pytest.CaptureFixture[str], source: str
) -> None:
    arguments = ["--prompt", "The"] * 6 + ["--batch-size", "1", "--temperature", "2", "--seed", "5"]
    drawn = [row["text"] for row in rows(capsys, source, *arguments)]
    assert len(set(drawn)) > 3
    assert [row["text"] for row in rows(capsys, source, *arguments)] == drawn
    assert rows(capsys, source, "--prompt", "The", *arguments[-4:])[0]["text"] == drawn[0]


def test_drafts_are_made_for_one_prompt_after_the_other(
    capsys: pytest.CaptureFixture[str], source: str, file: Path, tmp_path: Path
) -> None:
    spec = find_spec("deepseek-v3-tiny")
    spec = replace(spec, model=replace(spec.model, vocab_size=2048, mtp_depth=1))
    model = zoo.build(spec.model, seed=0)
    save_model(model, spec, tmp_path / "drafting", tokenizer_dir=source)
    plain = rows(capsys, str(tmp_path / "drafting"), "--prompts", str(file))
    drafted = rows(capsys, str(tmp_path / "drafting"), "--prompts", str(file), "--speculative")
    assert [row["tokens"] for row in drafted] == [row["tokens"] for row in plain]
    assert all(row["speculative"]["drafted"] for row in drafted)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.txt", "", "empty.txt: the file holds no prompt; write one a line"),
        ("blank.txt", "\n \n", "blank.txt: the file holds no prompt"),
        ("long.txt", "short\n" + "word " * 600, "long.txt: line 2 of 2401 tokens and max_new_tokens = 6 exceed"),
        ("text.jsonl", '{"text": "a"}', "text.jsonl: line 1: no text in the field 'prompt'"),
        ("broken.jsonl", '{"prompt": "a"}\n{', "broken.jsonl: line 2: not JSON"),
    ],
)
def test_bad_files_are_named(
    capsys: pytest.CaptureFixture[str], source: str, tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert main(["generate", source, "--prompts", str(tmp_path / name), "--max-new-tokens", str(NEW)]) == 2
    assert message in capsys.readouterr().err


def test_bad_arguments_are_named(capsys: pytest.CaptureFixture[str], source: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"text \xff")
    for arguments, message in (
        (["--prompt", "-", "--prompt", "-"], "--prompt - is given twice"),
        (["--prompt", "a", "--prompt", "b", "--batch-size", "0"], "--batch-size 0: give a positive number"),
        (["--prompt", "a", "--prompt", "word " * 600], "--prompt 2 of 2401 tokens"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "a", "--prefix-file", str(tmp_path / "empty")], "empty: the file is empty; write"),
        (["--prompt", "a", "--prefix-file", str(tmp_path / "binary")], "binary: "),
    ):
        assert main(["generate", source, *arguments]) == 2
        assert message in capsys.readouterr().err
    for arguments in ([], ["--prompt", "a", "--prompts", "b.txt"]):
        with pytest.raises(SystemExit, match="2"):
            main(["generate", source, *arguments])
