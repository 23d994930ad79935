"""``zoo inspect`` on models of every kind that the zoo has, and what it says of routers that were made to misbehave."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from json_schema import violations

from zoo.cli.main import main
from zoo.config import ModelSpec, load_spec
from zoo.inspect.inspection import Settings, moe_layers
from zoo.inspect.page import html
from zoo.inspect.report import SCHEMA, inspect, to_json
from zoo.inspect.text import Text, read_text
from zoo.model import Decoder, build
from zoo.registry import find_spec
from zoo.tokenizer import Tokenizer
from zoo.training.data.store import TOKENIZER_DIR
from zoo.weights import save_model
from zoo.weights.loading import load_with_tokenizer

SPARSE = [
    *("mixtral-tiny", "deepseek-moe-tiny", "deepseek-v2-tiny", "deepseek-v3-tiny", "qwen2-moe-tiny", "qwen3-moe-tiny"),
    *("olmoe-tiny", "dbrx-tiny", "grok1-tiny", "jamba-tiny", "gpt-oss-tiny", "llama4-tiny", "hash-tiny"),
]

LIMITED = ["switch-decoder-tiny", "expert-choice-tiny"]
"""Models whose experts may leave out tokens."""


@pytest.fixture(scope="module")
def tokenizer(token_data: Path) -> Tokenizer:
    return Tokenizer.load(token_data / TOKENIZER_DIR)


@pytest.fixture(scope="module")
def text(token_data: Path, tokenizer: Tokenizer) -> Text:
    return read_text(f"words={token_data}", tokenizer, 300)


def tiny(name: str) -> Decoder:
    return build(find_spec(name).model).eval()


@pytest.fixture(scope="module")
def facts() -> tuple[Decoder, Tokenizer]:
    return load_with_tokenizer("facts-mixtral", device="cpu")


@pytest.fixture
def books(tmp_path: Path) -> list[str]:
    """Two sets of data that the facts models know the words of."""
    (tmp_path / "capitals.txt").write_text("The capital of Ghana is Accra.\n" * 80, encoding="utf-8")
    (tmp_path / "questions.txt").write_text("Question: Is Oslo in Norway?\nAnswer: yes\n" * 80, encoding="utf-8")
    return [str(tmp_path / name) for name in ("capitals.txt", "questions.txt")]


@pytest.mark.parametrize("name", [*SPARSE, *LIMITED])
def test_every_family_with_experts_is_looked_at(name: str, text: Text, tokenizer: Tokenizer) -> None:
    model = tiny(name)
    report = inspect(name, model, tokenizer, [text], Settings(sequence_length=32), {"itself": lambda: model})
    assert list(violations(report, schema(), schema())) == []
    config = model.config
    assert config.moe is not None and len(report["layers"]) == len(moe_layers(model)) == len(report["balance"])
    for layer in report["balance"]:
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-5) and len(layer["load"]) == config.moe.num_experts
        assert 1 <= layer["effective_experts"] <= config.moe.num_experts + 1e-4
        assert (layer["dropped"] is None) == (layer["untaken"] is None) == (name not in LIMITED)
    assert [layer["equal"] for layer in report["stability"]["checkpoints"]["itself"]] == [1] * len(report["layers"])
    assert (report["shared"] is not None) == bool(config.moe.num_shared_experts)
    assert (report["co_activation"] is None) == (config.moe.top_k == 1)


def schema() -> Any:
    return json.loads(SCHEMA.read_text(encoding="utf-8"))


def test_load_is_that_of_the_routers_own_output(text: Text, tokenizer: Tokenizer) -> None:
    model = tiny("mixtral-tiny")
    ids, documents = text.windows(32)
    with torch.inference_mode():
        outputs = model(ids, document_ids=documents).router_outputs
    report = inspect("m", model, tokenizer, [text], Settings(sequence_length=32, batch_size=2))
    for layer, output in zip(report["balance"], outputs, strict=True):
        counts = torch.bincount(output.experts[(documents >= 0).flatten()].flatten(), minlength=len(layer["load"]))
        assert layer["load"] == pytest.approx((counts / counts.sum()).tolist())
    assert report["tokens"] == 300


def test_shared_experts_part_is_that_of_the_norms_by_hand(text: Text, tokenizer: Tokenizer) -> None:
    """Routed experts that give 0 leave the shared ones all of the output; shared ones that give 0 nothing of it."""
    model = tiny("deepseek-moe-tiny")
    first, second, third = moe_layers(model)[:3]
    with torch.no_grad():
        first.experts.down.zero_()
        second.shared_experts.down_proj.weight.zero_()
    taken: list[tuple[torch.Tensor, torch.Tensor]] = []
    third.register_forward_hook(lambda module, inputs, result: taken.append((inputs[0], result[0])))
    report = inspect("m", model, tokenizer, [text], Settings(sequence_length=30, noise=0.0))
    shares = [layer["share"] for layer in report["shared"]]
    assert shares[:2] == pytest.approx([1, 0])
    x, out = taken[0]
    with torch.inference_mode():
        shared = third.shared_experts(x)
    norms = [part.norm(dim=-1) for part in (shared, out - shared)]
    assert shares[2] == pytest.approx((norms[0] / (norms[0] + norms[1])).mean().item())


def test_copied_experts_are_alike_and_fresh_ones_are_not(text: Text, tokenizer: Tokenizer) -> None:
    model = tiny("mixtral-tiny")
    first = moe_layers(model)[0].experts
    with torch.no_grad():
        for weight in first.weights:
            weight[1] = weight[0]
    report = inspect("m", model, tokenizer, [text], Settings(sequence_length=32))
    copied, fresh = report["similarity"]["layers"][:2]
    for kind in ("weights", "outputs"):
        assert copied[kind][0][1] == pytest.approx(1, abs=1e-4) and abs(fresh[kind][0][1]) < 0.5


def test_collapsed_routers_are_called_so(text: Text, tokenizer: Tokenizer) -> None:
    """Selection biases that always choose the same experts, of 8 in 4 groups."""
    model = tiny("deepseek-v3-tiny")
    top_k = model.config.moe.top_k
    for layer in moe_layers(model):
        layer.router.bias[:top_k] = 10.0
    report = inspect("m", model, tokenizer, [text], Settings(sequence_length=32))
    for layer in report["balance"]:
        assert layer["effective_experts"] == pytest.approx(top_k) and len(layer["dead"]) == len(layer["load"]) - top_k
    assert "experts dead (less than 0.1 of an equal share)" in report["headline"][1]
    assert report["token_specialisation"]["specialised_types"] == 0
    assert all(layer["equal"] == 1 for layer in report["stability"]["noise"])


def test_a_dense_model_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], books: list[str]) -> None:
    assert main(["inspect", "facts-dense", "--data", books[0]]) == 2
    error = capsys.readouterr().err
    assert "facts-dense: a dense model has no routers" in error and error.count("zoo: error") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.txt"], "missing.txt: no such file"),
        (["--data", "{0}", "x={0}", "x={1}"], "two have the same name; give NAME=PATH"),
        (["--data", "{0}", "--tokens", "1"], "--tokens 1: give 2 or more"),
        (["--data", "{0}", "--noise", "-1"], "noise = -1.0: give 0 or more"),
        (["--data", "{0}", "--against", "facts-dense"], "facts-dense: a dense model"),
        (["--data", "{0}", "--against", "facts-deepseek-moe"], "give a checkpoint of the same architecture"),
        (["--data", "{data}"], "tokenised with another tokenizer than the model's"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, books: list[str], token_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [argument.format(*books, data=token_data) for argument in arguments]
    assert main(["inspect", "facts-mixtral", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_command_writes_its_files_and_the_same_bytes_again(
    books: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["inspect", "facts-mixtral", "--data", *books, "--against", "facts-mixtral"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    written = (tmp_path / "out" / "inspect.json").read_text(encoding="utf-8")
    report = json.loads(written)
    assert all(sentence in printed for sentence in report["headline"])
    assert list(violations(report, schema(), schema())) == []
    assert report["domain_specialisation"]["layers"][0]["p_holm"] <= 0.05
    assert report["token_specialisation"]["specialised_types"] > 10
    for figure in ("load", "stability", "load-by-data", "together", "similar-outputs"):
        assert (tmp_path / "out" / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "figures" / "load.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["share"]) for row in rows[:8]] == report["balance"][0]["load"]
    assert main([*command, "--json"]) == 0
    assert capsys.readouterr().out == written == to_json(report)


def test_nothing_of_the_text_or_the_name_becomes_markup(text: Text, tokenizer: Tokenizer) -> None:
    report = inspect("<script>", tiny("mixtral-tiny"), tokenizer, [text], Settings(sequence_length=32))
    assert "&lt;script&gt;" in html(report, []) and "<script>" not in html(report, [])


def test_a_checkpoint_of_the_same_run_agrees_more_than_chance(
    facts: tuple[Decoder, Tokenizer], books: list[str], tmp_path: Path
) -> None:
    """A copy with slightly moved routers, saved and loaded: experts are kept mostly, and less than entirely."""
    model, tokenizer = facts
    moved = load_with_tokenizer("facts-mixtral", device="cpu")[0]
    torch.manual_seed(0)
    for layer in moe_layers(moved):
        layer.router.weight.data += 0.2 * layer.router.weight.std() * torch.randn_like(layer.router.weight)
    spec: ModelSpec = load_spec(Path(__file__).parents[2] / "checkpoints" / "facts-mixtral" / "zoo.yaml")
    save_model(moved, spec, tmp_path / "moved")
    other = {"moved": lambda: moved}
    report = inspect("m", model, tokenizer, [read_text(books[0], tokenizer, 500)], Settings(), other)
    for layer in report["stability"]["checkpoints"]["moved"]:
        assert layer["by_chance"] < layer["jaccard"] < 1
