"""A report with sweeps shows each over its own numbers and all over the total parameters, with the numbers as CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from json_schema import violations
from made_reports import DEEPSEEK, DENSE, MIXTRAL, large_report

from zoo.harness.report import SCHEMA, write_report
from zoo.harness.statistics import seed_interval


@pytest.fixture
def report() -> dict[str, Any]:
    return large_report()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_sweep_is_drawn_and_its_numbers_are_those_of_the_models(report: dict[str, Any], tmp_path: Path) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert list(violations(report, schema, schema)) == []
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("sweep-moe", "sweep-dense", "score-against-parameters"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert 'id="sweeps"' in page and "moe: over number of experts" in page
    scores = {model["name"]: model["scores"] for model in report["models"]}
    found = [row for row in rows(tmp_path / "figures" / "sweep-moe.csv") if row["of"] == "trivia"]
    ends = [(row["experts"], row["model"]) for row in (*found[:2], found[-1])]
    assert ends == [("1", DENSE), ("8", MIXTRAL), ("64", DEEPSEEK)]
    assert [float(row["value"]) for row in found] == [scores[row["model"]]["trivia"]["value"] for row in found]
    sizes = {model["name"]: model["total_parameters"] for model in report["models"]}
    for row in rows(tmp_path / "figures" / "score-against-parameters.csv"):
        assert int(row["total parameters"]) == sizes[row["model"]]


def test_the_interval_over_seeds_is_students() -> None:
    found = seed_interval([1.0, 2.0, 3.0])
    assert found.value == 2 and found.high - 2 == pytest.approx(4.302653 / 3**0.5) == 2 - found.low
    assert seed_interval([1.5]).low == seed_interval([1.5]).high == 1.5
