"""A report says what its numbers say, and no more."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from zoo.harness.headline import sentences
from zoo.harness.report import write_report


def estimate(value: float, width: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - width, "high": value + width, **more}


def model(name: str, knowledge: float, comprehension: float, sparse: bool) -> dict[str, Any]:
    scores = {
        "knowledge": estimate(knowledge, 0.04, items=400, guess=0.06, p_value=1e-40),
        "comprehension": estimate(comprehension, 0.02, items=900, guess=0.5, p_value=1e-9),
    }
    return {
        "name": name,
        "sparse": sparse,
        "twin_of": None if sparse else "sparse",
        "matched_by": None if sparse else "active",
        "config": {},
        "total_parameters": 2_400_000 if sparse else 1_100_000,
        "active_parameters": 1_100_000,
        "training_flops_per_token": 5.5e6,
        "validation_loss": 0.7,
        "perplexity": 2.014,
        "scores": {**scores, "facts_knowledge": scores["knowledge"], "facts_boolq": scores["comprehension"]},
        "expert_load": [[0.25, 0.5, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]] if sparse else [],
        "wall_seconds": 100.0,
        "peak_memory_bytes": 600 * 2**20,
        "threads": 1,
        "curves": [{"seed": 0, "train": [[10, 3.0], [20, 2.0]], "validation": [[20, 2.1]]}],
    }


@pytest.fixture
def report() -> dict[str, Any]:
    """Sparse clearly better on knowledge (by 20 points), not told apart on comprehension."""
    differences = {
        "knowledge": {"difference": estimate(0.2, 0.05), "relative_gain": estimate(0.5, 0.1)},
        "comprehension": {"difference": estimate(0.005, 0.02), "relative_gain": estimate(0.005, 0.02)},
    }
    result: dict[str, Any] = {
        "study": "tiny <study>",
        "command": "zoo compare tiny.yaml",
        "date": "2030-01-01T00:00:00+00:00",
        "machine": {"processor": "A processor", "cores": 2, "memory_bytes": 8 * 2**30, "gpu": None},
        "versions": {"moe-zoo": "0.1.0", "torch": "2.13.0"},
        "platform": "Linux",
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "config": {"data": {"sources": ["a.txt"]}, "training": {"steps": 20, "batch_size": 4, "sequence_length": 128}},
        "tokens": 10_240,
        "tasks": {"knowledge": ["facts_knowledge"], "comprehension": ["facts_boolq"]},
        "models": [model("sparse", 0.6, 0.905, True), model("dense", 0.4, 0.9, False)],
        "comparisons": [
            {"sparse": "sparse", "dense": "dense", "matched_by": "active", "scores": differences, "gain_ratio": None}
        ],
    }
    return result | {"headline": sentences(result)}


def test_a_clear_difference_is_stated_and_an_unclear_one_is_not_ranked(report: dict[str, Any]) -> None:
    chance, knowledge, comprehension, ratio = sentences(report)
    assert chance.startswith("Every model beats guessing")
    assert "60.0%" in knowledge and "40.0%" in knowledge and "+20.0 points" in knowledge
    assert "no difference" not in knowledge
    assert "cannot tell from no difference" in comprehension
    assert ratio.endswith("not determined, because the gain on comprehension cannot be told from zero.")
    nothing = copy.deepcopy(report)
    nothing["comparisons"][0]["scores"]["knowledge"]["relative_gain"] = None
    assert sentences(nothing)[-1].endswith("not determined, because the dense model may score zero.")


def test_a_dense_win_is_reported_as_it_is(report: dict[str, Any]) -> None:
    lost = copy.deepcopy(report)
    lost["comparisons"][0]["scores"]["knowledge"]["difference"] = estimate(-0.1, 0.05)
    lost["comparisons"][0]["gain_ratio"] = estimate(-2.0, 1.0)
    _, knowledge, _, ratio = sentences(lost)
    assert "−10.0 points (95% interval −15.0 to −5.0)" in knowledge
    assert "−2.0 (95% interval −3.0 to −1.0)" in ratio


def test_a_model_no_better_than_guessing_is_named_first(report: dict[str, Any]) -> None:
    weak = copy.deepcopy(report)
    weak["models"][1]["scores"]["comprehension"]["p_value"] = 0.2
    assert sentences(weak)[0].startswith("Not clearly better than guessing: dense on comprehension (p = 0.2)")


class Page(HTMLParser):
    """Open tags, what is fetched from elsewhere, ids, and the text."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elsewhere: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:")):
                self.elsewhere.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_well_formed_self_contained_and_complete(report: dict[str, Any], tmp_path: Path) -> None:
    write_report(report, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == [] and page.elsewhere == []
    assert page.tags.count("svg") == 3, "scores, curves, and the load of the one sparse model"
    assert len(page.ids) == len(set(page.ids)), "figures must not share ids"
    for needed in ("tiny <study>", "60.0% (56.0 to 64.0)", "2.4M", "600.0 MiB", "zoo compare tiny.yaml", "A processor"):
        assert needed in page.text


def test_markdown_and_json_hold_the_same_numbers(report: dict[str, Any], tmp_path: Path) -> None:
    paths = write_report(report, tmp_path)
    assert [path.name for path in paths] == ["report.md", "report.html", "report.json"]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for needed in (*report["headline"], "| 0 | 1.00 | 2.00 | 0.50 | 0.50 |", "+20.0 (+15.0 to +25.0)", "torch 2.13.0"):
        assert needed in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
