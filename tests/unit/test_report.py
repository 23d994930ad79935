"""A report says what its numbers say, and no more."""

from __future__ import annotations

import copy
import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from json_schema import violations

from zoo.harness.headline import sentences
from zoo.harness.report import SCHEMA, markdown, reading, write_report


def estimate(value: float, width: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - width, "high": value + width, **more}


def model(name: str, knowledge: float, comprehension: float, sparse: bool) -> dict[str, Any]:
    scores = {
        "knowledge": estimate(knowledge, 0.04, items=400, guess=0.06, p_value=1e-40),
        "comprehension": estimate(comprehension, 0.02, items=900, guess=0.5, p_value=1e-9),
    }
    tested = {"p_holm": 1e-8, "at_chance": False}
    of_task = {"facts_knowledge": scores["knowledge"] | tested, "facts_boolq": scores["comprehension"] | tested}
    load = [[0.25, 0.5, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]] if sparse else []
    means = {name: score["value"] for name, score in {**scores, **of_task}.items()}
    return {
        "name": name,
        "sparse": sparse,
        "twin_of": [] if sparse else ["sparse"],
        "matched_by": None if sparse else "active",
        "config": {},
        "total_parameters": 2_400_000 if sparse else 1_100_000,
        "active_parameters": 1_100_000,
        "training_flops_per_token": 5.5e6,
        "validation_loss": 0.7,
        "perplexity": 2.014,
        "scores": {**scores, **of_task},
        "expert_load": load,
        "task_load": {"facts_knowledge": load, "facts_boolq": load} if sparse else {},
        "wall_seconds": 100.0,
        "peak_memory_bytes": 600 * 2**20,
        "threads": 1,
        "curves": [{"seed": 0, "train": [[10, 3.0], [20, 2.0]], "validation": [[20, 2.1]]}],
        "checkpoints": [
            {
                "seed": 0,
                "step": s,
                "tokens": 512 * s,
                "flops": 2.8e9 * s,
                "seconds": 4.0 * s,
                "loss": 14 / s,
                "scores": means,
            }
            for s in (10, 20)
        ],
    }


def view(at: float, knowledge: dict[str, Any], comprehension: dict[str, Any]) -> dict[str, Any]:
    """``gain_ratio`` is not determined."""
    scores = {"knowledge": knowledge, "facts_knowledge": knowledge}
    return {
        "at": at,
        "scores": scores | {"comprehension": comprehension, "facts_boolq": comprehension},
        "gain_ratio": None,
    }


def made_report() -> dict[str, Any]:
    """Sparse clearly better on knowledge (by 20 points), not told apart on comprehension."""
    knowledge = {"values": [0.6, 0.4], "difference": estimate(0.2, 0.05), "relative_gain": estimate(0.5, 0.1)}
    comprehension = {
        "values": [0.905, 0.9],
        "difference": estimate(0.005, 0.02),
        "relative_gain": estimate(0.005, 0.02),
    }
    passed = {"at": 1.3, "scores": None, "gain_ratio": None}
    test = {"by_seed": [0.01], "p_value": 0.01, "p_holm": 0.02}
    training = {"steps": 20, "batch_size": 4, "sequence_length": 128}
    result: dict[str, Any] = {
        "study": "tiny <study>",
        "command": "zoo compare tiny.yaml",
        "date": "2030-01-01T00:00:00+00:00",
        "machine": {"processor": "A processor", "cores": 2, "memory_bytes": 8 * 2**30, "gpu": None},
        "versions": {"moe-zoo": "0.1.0", "torch": "2.13.0"},
        "platform": "Linux",
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "config": {"data": {"sources": ["a.txt"]}, "training": training},
        "seeds": [0],
        "tokens": 10_240,
        "tasks": {"knowledge": ["facts_knowledge"], "comprehension": ["facts_boolq"]},
        "models": [model("sparse", 0.6, 0.905, True), model("dense", 0.4, 0.9, False)],
        "comparisons": [
            {
                "sparse": "sparse",
                "dense": "dense",
                "matched_by": "active",
                "views": {
                    "tokens": view(10_240, knowledge, comprehension),
                    "loss": view(0.7, knowledge, comprehension),
                    "flops": passed,
                    "seconds": view(80.0, knowledge, comprehension),
                },
                "mcnemar": {"facts_knowledge": test, "facts_boolq": test},
                "at_chance": [],
            }
        ],
    }
    return result | {"headline": sentences(result)}


@pytest.fixture
def report() -> dict[str, Any]:
    return made_report()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the written report."""
    out = tmp_path_factory.mktemp("report")
    paths = write_report(made_report(), out)
    assert paths == [out / name for name in ("report.md", "report.html", "report.json")]
    return out


def test_a_clear_difference_is_stated_and_an_unclear_one_is_not_ranked(report: dict[str, Any]) -> None:
    chance, knowledge, comprehension, ratio, perplexity = sentences(report)
    assert chance.startswith("Every model beats guessing")
    assert "60.0%" in knowledge and "40.0%" in knowledge and "+20.0 points" in knowledge
    assert "no difference" not in knowledge
    assert "these items cannot tell from no difference" in comprehension
    assert ratio.endswith("not determined, because the gain on comprehension cannot be told from zero.")
    assert perplexity.startswith("At equal perplexity (2.01), sparse over dense: knowledge +20.0 points")
    nothing = copy.deepcopy(report)
    nothing["comparisons"][0]["views"]["tokens"]["scores"]["knowledge"]["relative_gain"] = None
    assert sentences(nothing)[3].endswith("not determined, because the dense model may score zero.")


def test_with_several_seeds_it_is_items_and_seeds_that_cannot_tell(report: dict[str, Any]) -> None:
    report["seeds"] = [0, 1, 2]
    assert "which these items and seeds cannot tell" in sentences(report)[2]
    assert "3 training seeds (Student's t on 2 degrees" in reading(report)


def test_a_dense_win_is_reported_as_it_is(report: dict[str, Any]) -> None:
    lost = copy.deepcopy(report)
    lost["comparisons"][0]["views"]["tokens"]["scores"]["knowledge"]["difference"] = estimate(-0.1, 0.05)
    lost["comparisons"][0]["views"]["tokens"]["gain_ratio"] = estimate(-2.0, 1.0)
    _, knowledge, _, ratio, _ = sentences(lost)
    assert "−10.0 points (95% interval −15.0 to −5.0)" in knowledge
    assert "−2.0 (95% interval −3.0 to −1.0)" in ratio


def test_a_model_no_better_than_guessing_is_named_first(report: dict[str, Any]) -> None:
    weak = copy.deepcopy(report)
    weak["models"][1]["scores"]["comprehension"]["p_value"] = 0.2
    assert sentences(weak)[0].startswith("Not clearly better than guessing: dense on comprehension (p = 0.2)")


def test_a_task_at_chance_is_said_to_be_and_not_ranked(report: dict[str, Any]) -> None:
    report["comparisons"][0]["at_chance"] = ["facts_boolq"]
    for of_model in report["models"]:
        of_model["scores"]["facts_boolq"]["at_chance"] = True
    assert sentences(report)[-1] == "Of sparse and dense, neither is above chance on facts_boolq: not ranked."
    text = markdown(report)
    assert "| facts_boolq | comprehension | both at chance: not ranked |" in text
    assert "90.0% (88.0 to 92.0) at chance |" in text


def test_a_view_that_cannot_be_read_off_says_so(report: dict[str, Any]) -> None:
    assert "| training FLOPs: 1 | passed before | the first checkpoint | not determined |" in markdown(report)
    report["comparisons"][0]["views"]["loss"] |= {"scores": None}
    assert sentences(report)[-1].endswith("one of the two was better than that at its first checkpoint.")


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


def test_html_is_well_formed_self_contained_and_complete(written: Path) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    assert page.open == [] and page.elsewhere == []
    # Scores, one forest, score against four axes, loss, and the one sparse model's load: by layer and by task.
    assert page.tags.count("svg") == 9
    assert len(page.ids) == len(set(page.ids)), "figures must not share ids"
    for needed in (
        "tiny <study>",
        "60.0% (56.0 to 64.0)",
        "2.40M",
        "600.0 MiB",
        "zoo compare tiny.yaml",
        "A processor",
    ):
        assert needed in page.text


def test_markdown_and_json_hold_the_same_numbers(report: dict[str, Any], written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    for needed in (*report["headline"], "| 0 | 1.00 | 2.00 | 0.50 | 0.50 |", "+20.0 (+15.0 to +25.0)", "torch 2.13.0"):
        assert needed in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")
    assert json.loads((written / "report.json").read_text(encoding="utf-8")) == report


def test_every_figure_is_also_a_picture_and_a_table_of_what_it_shows(written: Path) -> None:
    files = {path.name for path in (written / "figures").iterdir()}
    assert {Path(name).stem for name in files if name.endswith(".png")} == {
        *("scores", "forest-dense", "loss", "expert-load-sparse", "task-load-sparse"),
        *(f"score-against-{axis}" for axis in ("loss", "tokens", "flops", "seconds")),
    }
    assert len(files) == 18
    for path in (written / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    with (written / "figures" / "forest-dense.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["difference of"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["knowledge", "facts_knowledge", "comprehension", "facts_boolq"]
    assert float(rows["knowledge"]["value"]) == 0.2 and float(rows["knowledge"]["low"]) == pytest.approx(0.15)
    with (written / "figures" / "score-against-loss.csv").open(encoding="utf-8", newline="") as file:
        points = list(csv.DictReader(file))
    assert [(row["model"], row["step"], float(row["loss"])) for row in points][:2] == [
        ("sparse", "10", 1.4),
        ("sparse", "20", 0.7),
    ]


def test_equal_reports_are_written_byte_for_byte_alike(written: Path, tmp_path: Path) -> None:
    write_report(made_report(), tmp_path)
    first, second = (
        {p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in (written, tmp_path)
    )
    assert first == second and len(first) == 21


def test_report_is_as_its_schema_says_and_the_schema_refuses_others(report: dict[str, Any]) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert list(violations(report, schema, schema)) == []
    wrong = copy.deepcopy(report)
    del wrong["tokens"]
    wrong["models"][0]["scores"]["knowledge"]["low"] = -0.1
    wrong["comparisons"][0]["views"]["parameters"] = {}
    assert list(violations(wrong, schema, schema)) == [
        "report: tokens is missing",
        "report.models[0].scores.knowledge.low: -0.1 is out of range",
        "report.comparisons[0].views: parameters is unknown",
    ]
