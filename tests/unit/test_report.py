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
from made_reports import estimate, large_report, small_report

from zoo.harness.headline import sentences
from zoo.harness.report import SCHEMA, markdown, reading, write_report


@pytest.fixture
def report() -> dict[str, Any]:
    return small_report()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the written report."""
    out = tmp_path_factory.mktemp("report")
    paths = write_report(small_report(), out)
    assert paths == [out / name for name in ("report.md", "report.html", "report.json")]
    return out


def test_a_clear_difference_is_stated_and_an_unclear_one_is_not_ranked(report: dict[str, Any]) -> None:
    lead, chance, perplexity = sentences(report)
    assert lead == (
        "At equal active parameters and tokens, sparse against dense: knowledge 60.0% and 40.0%, +20.0 points (95% "
        "interval +15.0 to +25.0); comprehension 90.5% and 90.0%, +0.5 points (95% interval −1.5 to +2.5), which these "
        "items cannot tell from no difference; ratio of relative gains not determined, because the gain on "
        "comprehension may be zero."
    )
    assert chance.startswith("Every model beats guessing")
    assert perplexity.startswith("At equal perplexity (2.01), sparse against dense: knowledge 60.0% and 40.0%, +20.0")
    report["comparisons"][0]["views"]["tokens"]["scores"]["knowledge"]["relative_gain"] = None
    assert sentences(report)[0].endswith("not determined, because the second model may score zero.")


def test_with_several_seeds_it_is_items_and_seeds_that_cannot_tell(report: dict[str, Any]) -> None:
    report["seeds"] = [0, 1, 2]
    assert "which these items and seeds cannot tell" in sentences(report)[0]
    assert "3 training seeds (Student's t on 2 degrees" in reading(report)


def test_a_dense_win_is_reported_as_it_is(report: dict[str, Any]) -> None:
    tokens = report["comparisons"][0]["views"]["tokens"]
    tokens["scores"]["knowledge"] |= {"values": [0.3, 0.4], "difference": estimate(-0.1, 0.05)}
    tokens["gain_ratio"] = estimate(-2.0, 1.0)
    lead = sentences(report)[0]
    assert "knowledge 30.0% and 40.0%, −10.0 points (95% interval −15.0 to −5.0);" in lead
    assert "ratio of relative gains −2.0 (95% interval −3.0 to −1.0)" in lead


def test_models_with_nothing_in_common_are_compared_at_equal_tokens(report: dict[str, Any]) -> None:
    report["comparisons"][0]["matched_by"] = None
    assert sentences(report)[0].startswith("At equal tokens, sparse against dense:")
    assert "| sparse − dense | – | tokens:" in markdown(report)


def test_without_a_comparison_the_headline_is_whether_guessing_would_do(report: dict[str, Any]) -> None:
    report["comparisons"] = []
    assert sentences(report) == [
        "Every model beats guessing on knowledge and on comprehension (exact test, p < 0.001)."
    ]


def test_a_model_no_better_than_guessing_is_named(report: dict[str, Any]) -> None:
    report["models"][1]["scores"]["comprehension"]["p_value"] = 0.2
    assert sentences(report)[1].startswith("Not clearly better than guessing: dense on comprehension (p = 0.2)")


def test_a_task_at_chance_for_both_of_a_pair_is_said_to_be_and_not_ranked(report: dict[str, Any]) -> None:
    report["comparisons"][0]["at_chance"] = ["facts_boolq"]
    for of_model in report["models"]:
        of_model["scores"]["facts_boolq"]["at_chance"] = True
    assert sentences(report)[-1] == "Of sparse and dense, neither is above chance on facts_boolq: not ranked."
    text = markdown(report)
    assert "| facts_boolq | comprehension | both at chance: not ranked |" in text
    assert "90.0% (88.0 to 92.0) at chance |" in text


def test_a_skill_at_chance_throughout_is_ranked_nowhere(report: dict[str, Any]) -> None:
    report["not_ranked"] = report["comparisons"][0]["at_chance"] = ["facts_boolq"]
    report["comparisons"][0]["views"]["tokens"]["gain_ratio"] = estimate(2.0, 1.0)
    lead, _, left_out, perplexity = sentences(report)
    for sentence in (lead, perplexity):
        assert sentence.endswith("comprehension not ranked, because neither is above chance on any task of it.")
        assert "ratio" not in sentence
    assert left_out == "No model is above chance on facts_boolq: left out here."
    text = markdown(report)
    assert "| +20.0 (+15.0 to +25.0) | at chance: not ranked | not determined |" in text
    assert "| facts_boolq: no model above chance, not ranked |" in text
    report["comparisons"][0]["at_chance"] = ["facts_boolq", "facts_knowledge"]
    assert sentences(report)[0].endswith(
        "sparse against dense: not ranked, because neither is above chance on any task."
    )


def test_a_view_that_cannot_be_read_off_says_so(report: dict[str, Any]) -> None:
    assert "| training FLOPs: 1 | passed before | the first checkpoint | not determined |" in markdown(report)
    report["comparisons"][0]["views"]["loss"] |= {"scores": None}
    assert sentences(report)[-1].endswith("one of the two was better than that at its first checkpoint.")


class Page(HTMLParser):
    """Open tags, what is fetched from elsewhere, ids, and the text."""

    VOID = frozenset({"meta", "br", "wbr", "img", "link"})

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
    # Two scores, one forest, score against four axes, loss, and the one sparse model's load: by layer and by task.
    assert page.tags.count("svg") == 10
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
    for needed in (
        *report["headline"],
        "| sparse, 0 | 4 | 2.00 | 0.50 | 0 |",
        "+20.0 (+15.0 to +25.0)",
        "torch 2.13.0",
    ):
        assert needed in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")
    assert json.loads((written / "report.json").read_text(encoding="utf-8")) == report


def test_every_figure_is_also_a_picture_and_a_table_of_what_it_shows(written: Path) -> None:
    files = {path.name for path in (written / "figures").iterdir()}
    assert {Path(name).stem for name in files if name.endswith(".png")} == {
        *(
            "score-knowledge",
            "score-comprehension",
            "forest-sparse-dense",
            "loss",
            "expert-load-sparse",
            "task-load-sparse",
        ),
        *(f"score-against-{axis}" for axis in ("loss", "tokens", "flops", "seconds")),
    }
    assert len(files) == 20
    for path in (written / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    with (written / "figures" / "forest-sparse-dense.csv").open(encoding="utf-8", newline="") as file:
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
    write_report(small_report(), tmp_path)
    first, second = (
        {p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in (written, tmp_path)
    )
    assert first == second and len(first) == 23


def test_report_is_as_its_schema_says_and_the_schema_refuses_others(report: dict[str, Any]) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert list(violations(report, schema, schema)) == []
    assert list(violations(large_report(), schema, schema)) == []
    wrong = copy.deepcopy(report)
    del wrong["tokens"]
    wrong["models"][0]["scores"]["knowledge"]["low"] = -0.1
    wrong["comparisons"][0]["views"]["parameters"] = {}
    assert list(violations(wrong, schema, schema)) == [
        "report: tokens is missing",
        "report.models[0].scores.knowledge.low: -0.1 is out of range",
        "report.comparisons[0].views: parameters is unknown",
    ]
