"""Train rows become training text in the format of the evaluation, and nothing that is asked in validation does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zoo.harness.runner import load_tasks
from zoo.harness.task_text import TaskRows, solved, solved_rows, write

SUPERGLUE = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
TRAINED = ("triviaqa_trained", *(f"superglue_{task}_trained" for task in SUPERGLUE))


@pytest.fixture(scope="module")
def tasks(shared_data: Path) -> dict[str, Any]:
    return load_tasks(TRAINED, shared_data / "hub")


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """TriviaQA of eight train questions, the third of which validation asks too in other case and white space."""

    def rows(questions: list[str]) -> list[dict[str, Any]]:
        return [{"question": q, "answer": {"aliases": [q.upper(), "other"], "value": q.upper()}} for q in questions]

    directory = tmp_path / "hub" / "mandarjoshi" / "trivia_qa" / "rc.nocontext"
    directory.mkdir(parents=True)
    splits = {"train": [f"what is number {i}" for i in range(8)], "validation": ["What is  Number 2", "who is it"]}
    for split, questions in splits.items():
        pq.write_table(pa.Table.from_pylist(rows(questions)), directory / f"{split}-00000-of-00001.parquet")
    listed = "".join(f"  - split: {split}\n    path: rc.nocontext/{split}-*.parquet\n" for split in splits)
    card = f"---\nconfigs:\n- config_name: rc.nocontext\n  data_files:\n{listed}---\n"
    (directory.parent / "README.md").write_text(card, encoding="utf-8")
    return tmp_path / "hub"


def documents(directory: Path) -> list[str]:
    lines = (directory / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize("name", TRAINED)
def test_a_row_is_what_lm_eval_asks_with_the_answer_that_it_takes_for_right(name: str, tasks: dict[str, Any]) -> None:
    task = tasks[name]
    task.build_all_requests(limit=20, rank=0, world_size=1)
    asked: dict[int, list[Any]] = {}
    for request in task.instances:
        asked.setdefault(request.doc_id, []).append(request)
    assert len(asked) == 20
    for requests in asked.values():
        row, text = requests[0].doc, solved(task, requests[0].doc)
        if task.OUTPUT_TYPE == "generate_until":
            context, answer = requests[0].args[0], text.removeprefix(requests[0].args[0])
            assert text.startswith(context)
            results = [answer]
        else:  # all or nothing: the choice that the text ends in gets all probability
            results = [(float(text == "".join(request.args)), True) for request in requests]
            assert sum(score for score, _ in results) == 1
        for metric, value in task.process_results(
            row, [r.strip() if isinstance(r, str) else r for r in results]
        ).items():
            assert value == 1 or (isinstance(value, tuple) and value[-2] == value[-1]), (metric, text[-200:])


def test_no_validation_question_of_the_mirror_is_trained_on(tasks: dict[str, Any]) -> None:
    for name in ("triviaqa_trained", "superglue_rte_trained", "superglue_wic_trained", "superglue_cb_trained"):
        task = tasks[name]
        asked = {task.doc_to_text(row) for row in task.dataset["validation"]}
        rows, left_out = solved_rows(task, 200)
        assert len(rows) == 200 and left_out == 0
        assert not any(text.startswith(prompt) for text in rows for prompt in asked)


def test_train_rows_that_validation_asks_are_left_out_and_counted(mirror: Path, tmp_path: Path) -> None:
    write({"triviaqa_trained": TaskRows(repeat=3)}, mirror, tmp_path / "text")
    texts = documents(tmp_path / "text")
    assert sorted(texts) == sorted(
        3 * [f"Question: what is number {i}?\nAnswer: WHAT IS NUMBER {i}" for i in range(8) if i != 2]
    )
    counts = json.loads((tmp_path / "text" / "tasks.json").read_text(encoding="utf-8"))
    assert counts == {"triviaqa_trained": {"rows": 7, "repeat": 3, "left_out": 1}}


def test_the_first_rows_are_those_that_the_task_evaluates_first(mirror: Path) -> None:
    task = load_tasks(["triviaqa_trained"], mirror)["triviaqa_trained"]
    evaluated = [row["question"] for row in task.eval_docs if row["question"] != "what is number 2"]
    assert evaluated != sorted(evaluated)  # a sample of all, not the first of the file
    assert [text.splitlines()[0] for text in solved_rows(task, 4)[0]] == [f"Question: {q}?" for q in evaluated[:4]]


def test_a_task_that_evaluates_validation_rows_is_refused(mirror: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'triviaqa_full_answer' evaluates the split validation: only train rows"):
        write({"triviaqa_full_answer": TaskRows()}, mirror, tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_more_rows_than_there_are_is_an_error(mirror: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 7 train rows to train on, not the 8 asked for"):
        write({"triviaqa_trained": TaskRows(rows=8)}, mirror, tmp_path / "text")
    with pytest.raises(ValueError, match="repeat = 0: give a positive number"):
        TaskRows(repeat=0)
