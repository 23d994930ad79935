"""The study of trained questions against SuperGLUE, in small, on the real mirror."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from zoo.accounting import count_parameters
from zoo.harness.study import load_study, resolve_models

STUDY = Path("configs") / "studies" / "trivia_vs_superglue.yaml"


def test_its_models_are_equal_in_active_or_in_total_parameters(repository: Path) -> None:
    study = load_study(repository / STUDY)
    assert study.data.vocab_size is not None
    models = {m.name: count_parameters(m.spec.model) for m in resolve_models(study, study.data.vocab_size)}
    dense_active, dense_total = models.pop("dense-active"), models.pop("dense-total")
    for sizes in models.values():
        assert sizes.active == pytest.approx(dense_active.total, rel=0.01)
        assert sizes.total == pytest.approx(dense_total.total, rel=0.01)


@pytest.mark.slow
def test_the_smoke_study_runs_on_the_mirror_and_trains_on_no_validation_row(
    repository: Path, shared_data: Path, tmp_path: Path
) -> None:
    out, mirror = tmp_path / "study", shared_data / "hub"
    text = [str(shared_data / "text" / name) for name in ("wikitext2_valid.txt", "enwiki_sample.txt")]
    options = ["--smoke", "--out", str(out), "--data-root", str(mirror), "--jobs", "1", "--json"]
    command = [sys.executable, "-m", "zoo.cli.main", "compare", str(repository / STUDY), *options, "--text", *text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]

    report = json.loads(done.stdout)
    assert {name: len(report["tasks"][name]) for name in ("knowledge", "comprehension", "apart")} == {
        "knowledge": 1,
        "comprehension": 7,
        "apart": 8,
    }
    # Models of four steps know nothing, and the report says so of each task that has an exact test.
    assert all(
        model["scores"][task]["at_chance"] in (True, None)
        for model in report["models"]
        for tasks in report["tasks"].values()
        for task in tasks
    )
    documents = (out / "tasks" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in documents]
    validation = next((mirror / "mandarjoshi" / "trivia_qa" / "rc.nocontext").glob("validation-*.parquet"))
    asked = pq.read_table(validation, columns=["question"])["question"].to_pylist()
    assert not {f"Question: {question}?" for question in asked} & {text.splitlines()[0] for text in texts}
    counts = json.loads((out / "tasks" / "tasks.json").read_text(encoding="utf-8"))
    assert len(texts) == sum(task["rows"] * task["repeat"] for task in counts.values())
