"""The study of memory and reasoning: what it compares, and that it runs in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.accounting import count_parameters
from zoo.harness.study import load_study, resolve_models
from zoo.harness.suites.generators import guess_rates

STUDY = Path(__file__).resolve().parents[2] / "configs" / "studies" / "parrots.yaml"


def test_experts_are_added_at_equal_active_parameters_and_widths_are_not() -> None:
    study = load_study(STUDY)
    sizes = {model.name: count_parameters(model.spec.model) for model in resolve_models(study, 448)}
    dense, moe = study.series
    assert list(dense.models) == sorted(dense.models) and len(dense.models) >= 3
    assert list(moe.models) == [1, 4, 8, 16, 32] and moe.models[1] in dense.models.values()
    one_expert = sizes[moe.models[1]]
    for name in moe.models.values():
        assert sizes[name].active == pytest.approx(one_expert.active, rel=0.01)
    totals = [sizes[name].total for name in moe.models.values()]
    assert totals == sorted(totals) and totals[-1] > max(sizes[name].total for name in dense.models.values())
    assert len(study.seeds) >= 3


@pytest.mark.slow
def test_the_study_runs_in_small(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zoo.cli.main", "compare", str(STUDY), "--smoke", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    study = load_study(STUDY, smoke=True)
    assert [model["name"] for model in report["models"]] == [entry.name for entry in study.entries]
    assert study.data.generated is not None
    guesses = guess_rates(study.data.generated, tmp_path / "generated")
    for model in report["models"]:
        for task in study.tasks.all:
            assert (model["scores"][task]["items"], model["scores"][task]["guess"]) == (10, guesses[task])
    # The questions are those of the study, not those that come with the tasks.
    samples = next((tmp_path / "models").glob("dense-32-seed0/evaluation/**/samples_phone_book*.jsonl"))
    book = (tmp_path / "generated" / "phone_book" / "train.jsonl").read_text(encoding="utf-8")
    for line in samples.read_text(encoding="utf-8").splitlines():
        doc = json.loads(line)["doc"]
        assert f"Name: {doc['name']}\\nNumber: {doc['number']}" in book
