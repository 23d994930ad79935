"""``zoo diff`` and the drawings of ``zoo card``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoo.cli.main import main
from zoo.describe.block import block_drawing
from zoo.describe.svg import svg_drawing
from zoo.registry import find_spec


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def test_diff_shows_what_differs_and_all_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "diff", "qwen3-8b", "qwen3-14b")
    assert text.split()[:2] == ["qwen3-8b", "qwen3-14b"]
    assert "hidden size" in text and "vocabulary" not in text
    assert "vocabulary" in output(capsys, "diff", "qwen3-8b", "qwen3-14b", "--all")


def test_diff_of_a_file_and_of_a_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "configs" / "models" / "mixtral-tiny.yaml"
    (tmp_path / "zoo.yaml").write_text(source.read_text().replace("top_k: 2", "top_k: 3"))
    rows = json.loads(output(capsys, "diff", str(source), str(tmp_path), "--json"))["rows"]
    assert [(row["label"], row["a"], row["b"]) for row in rows[:1]] == [("of them for a token", 2, 3)]
    assert (
        output(capsys, "diff", str(source), "mixtral-tiny")
        == "mixtral-tiny and mixtral-tiny are the same architecture\n"
    )


def test_diff_as_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "diff", "mixtral-8x7b", "deepseek-v3", "--markdown").splitlines()
    assert lines[:2] == ["|  | mixtral-8x7b | deepseek-v3 |", "| --- | ---: | ---: |"]
    assert "| layers | 32 | 61 |" in lines


def test_diff_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "mixtral-8x7b", "deepseek-v4"]) == 2
    assert "did you mean 'deepseek-v3'?" in capsys.readouterr().err


def test_card_as_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "card", "deepseek-v2-lite", "--markdown")
    assert text.startswith("# deepseek-v2-lite\n")
    assert "6 of 64 experts" in text and "| parameters | 15.7B | 15,706,484,224 |" in text
    assert text.count("```") == 2


def test_card_as_svg(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output(capsys, "card", "mixtral-8x7b", "--svg", str(tmp_path / "block.svg"))
    assert (tmp_path / "block.svg").read_text() == svg_drawing(
        block_drawing(find_spec("mixtral-8x7b").model), "mixtral-8x7b"
    )


@pytest.mark.parametrize(
    "drawing", sorted((Path(__file__).parents[2] / "docs" / "blocks").glob("*.svg")), ids=lambda p: p.stem
)
def test_the_drawings_of_the_docs_are_up_to_date(drawing: Path) -> None:
    """``zoo card NAME --svg docs/blocks/NAME.svg`` draws them."""
    assert drawing.read_text() == svg_drawing(block_drawing(find_spec(drawing.stem).model), drawing.stem)
