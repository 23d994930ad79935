"""The task suites on small data sets, with scores computed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scripted import TRIVIA_TASKS, Scripted, run, scores

from zoo.harness.runner import results_table, summary_rows
from zoo.harness.suites import phone_book, shortest_path
from zoo.harness.suites.dataset import write_tables


def write_mirror(
    root: Path, dataset: str, configs: Mapping[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]
) -> None:
    """Configurations as (train, validation), in the hub's layout."""
    card = "---\nconfigs:\n"
    for config, splits in configs.items():
        card += f"- config_name: {config}\n  data_files:\n"
        (root / dataset / config).mkdir(parents=True)
        for split, rows in zip(("train", "validation"), splits, strict=True):
            card += f"  - split: {split}\n    path: {config}/{split}.jsonl\n"
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (root / dataset / config / f"{split}.jsonl").write_text(lines)
    (root / dataset / "README.md").write_text(card + "---\n")


def labelled(labels: Sequence[int], **fields: Any) -> list[dict[str, Any]]:
    return [{**fields, "idx": i, "label": label} for i, label in enumerate(labels)]


@pytest.fixture(scope="module")
def small_superglue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    multirc = [
        {
            "paragraph": "P.",
            "question": f"Q{q}?",
            "answer": f"A{a}",
            "label": label,
            "idx": {"paragraph": 0, "question": q, "answer": a},
        }
        for q, labels in enumerate([(1, 0, 1), (0, 1)])
        for a, label in enumerate(labels)
    ]
    record = [
        {
            "passage": "It was big.\n@highlight\nA city",
            "query": "She left @placeholder.",
            "entities": entities,
            "answers": answers,
            "idx": {"passage": i, "query": 0},
        }
        for i, (entities, answers) in enumerate(
            [
                (["Paris", "New York City", "London", "Paris"], ["New York"]),
                (["The Beatles", "Stones"], ["Beatles", "Fab Four"]),
            ]
        )
    ]
    rows = {
        "boolq": labelled([1, 0, 1, 1], passage="P.", question="is it"),
        "cb": labelled([0, 0, 1, 2, 1], premise="P.", hypothesis="H"),
        "copa": labelled([0, 1], premise="It fell.", choice1="It broke.", choice2="It grew.", question="effect"),
        "multirc": multirc,
        "record": record,
        "rte": labelled([0, 1, 1, 1], premise="P.", hypothesis="H."),
        "wic": labelled([1, 0], word="set", sentence1="A set.", sentence2="Set.", start1=2, end1=5, start2=0, end2=3),
        "wsc.fixed": labelled(
            [1, 0], text="Ann saw Eve and she left .", span1_text="Ann", span2_text="she", span2_index=4
        ),
    }
    root = tmp_path_factory.mktemp("superglue")
    write_mirror(root, "aps/super_glue", {config: (found, found) for config, found in rows.items()})
    return root


PICKS = {
    "superglue_boolq": [1, 1, 1, 0],
    "superglue_cb": [0, 1, 1, 1, 1],
    "superglue_copa": [0, 0],
    "superglue_multirc": [1, 0, 0, 0, 1],
    "superglue_record": [1, 1],
    "superglue_rte": [0, 1, 0, 1],
    "superglue_wic": [1, 0],
    "superglue_wsc": [0, 1],
}

BY_HAND = {
    "superglue_boolq": {"acc": 2 / 4, "score": 2 / 4},
    # Entailment: 1 right of 1 predicted and 2 there, 2/3. Contradiction: 2 of 4 and 2, 2/3. Neutral: none right, 0.
    "superglue_cb": {"acc": 3 / 5, "f1": 4 / 9, "score": (3 / 5 + 4 / 9) / 2},
    "superglue_copa": {"acc": 1 / 2, "score": 1 / 2},
    # 2 answers taken for right, both are, of 3 that are: F1a 4/5. One question of two has all answers judged rightly.
    "superglue_multirc": {"acc": 4 / 5, "f1a": 4 / 5, "em": 1 / 2, "score": (4 / 5 + 1 / 2) / 2},
    # "New York City" for "New York": 2 words shared of 3 and 2, F1 4/5. "The Beatles" for "Beatles": equal but for an
    # article, which does not count.
    "superglue_record": {"f1": (4 / 5 + 1) / 2, "em": 1 / 2, "score": (9 / 10 + 1 / 2) / 2},
    "superglue_rte": {"acc": 3 / 4, "score": 3 / 4},
    "superglue_wic": {"acc": 1.0, "score": 1.0},
    "superglue_wsc": {"acc": 0.0, "score": 0.0},
}


def test_superglue_scores_and_its_average_are_those_computed_by_hand(small_superglue: Path) -> None:
    lm = Scripted(lambda request: request.idx == PICKS[request.task_name][request.doc_id])
    results = run(lm, ["superglue"], small_superglue)
    for task, expected in BY_HAND.items():
        assert scores(results, task) == pytest.approx(expected), task
    average = sum(expected["score"] for expected in BY_HAND.values()) / 8
    assert scores(results, "superglue") == pytest.approx({"score": average})
    [row] = [row for row in summary_rows(results) if row["task"] == "superglue"]
    assert (row["value"], row["interval"]) == (pytest.approx(average), None)
    printed = StringIO()
    Console(file=printed, width=80).print(results_table(results))
    assert f" {average:.4f} " in printed.getvalue() and "…" not in printed.getvalue()


def test_f1_of_a_class_that_is_neither_there_nor_predicted_is_0_as_in_lm_evals_cb(small_superglue: Path) -> None:
    lm = Scripted(lambda request: request.idx == 1)
    results = run(lm, ["superglue_cb", "cb"], small_superglue)
    assert scores(results, "superglue_cb")["f1"] == pytest.approx(scores(results, "cb")["f1"]) == pytest.approx(4 / 21)


def trivia(question: str, *aliases: str) -> dict[str, Any]:
    return {"question": question, "question_id": question, "answer": {"value": aliases[0], "aliases": list(aliases)}}


@pytest.fixture(scope="module")
def small_trivia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trivia")
    train = [trivia(f"Number {i}", str(i)) for i in range(6)]
    validation = [
        trivia("Gateway Arch", "Saint Louis", "St. Louis"),
        trivia("Capital", "Washington, D.C.", "Washington DC"),
        trivia("Louvre", "Paris"),
        trivia("Everything", "42"),
    ]
    write_mirror(root, "mandarjoshi/trivia_qa", {"rc.nocontext": (train, validation)})
    return root


def test_full_answers_are_not_cut_at_a_point_or_a_comma(small_trivia: Path) -> None:
    answers = [" St. Louis\nQuestion: and", " washington, d.c.\n", " Paris.", " 41"]
    results = run(Scripted(lambda _: False, lambda request: answers[request.doc_id]), TRIVIA_TASKS, small_trivia)
    for task in TRIVIA_TASKS:
        # The stock task reads "St" and "washington". Case and punctuation are ignored by all.
        expected = 3 / 4 if "full_answer" in task else 1 / 4
        assert scores(results, task) == {"exact_match": expected}
        assert results["n-shot"][task] == (5 if "5shot" in task else 0)
        [[prompt, _]] = results["samples"][task][0]["arguments"]
        assert prompt.count("Answer: ") == results["n-shot"][task]


def test_phone_book_counts_whole_numbers(tmp_path: Path) -> None:
    book = {"ab": "0123", "cd": "4567", "ef": "8901", "gh": "2345"}
    answers = ["0123", "4567\n9", "890", "23456"]
    rows = [phone_book.row(i, name, number) for i, (name, number) in enumerate(book.items())]
    write_tables(tmp_path / phone_book.DATASET, {"default": rows}, phone_book.ORIGIN)
    lm = Scripted(lambda _: False, lambda request: " " + answers[request.doc_id])
    results = run(lm, ["phone_book"], tmp_path)
    assert [sample["exact_match"] for sample in results["samples"]["phone_book"]] == [1, 1, 0, 0]
    assert scores(results, "phone_book") == {"exact_match": 2 / 4}
    [[prompt, _]] = results["samples"]["phone_book"][1]["arguments"]
    assert f"{prompt} 4567" == phone_book.as_text("cd", "4567")


def test_any_shortest_path_is_right_and_nothing_else(tmp_path: Path) -> None:
    edges = [["B", "A"], ["B", "D"], ["A", "C"], ["D", "C"], ["A", "E"], ["E", "F"], ["F", "D"]]
    item = {"edges": edges, "source": "A", "target": "D", "distance": 2, "path": ["A", "B", "D"]}
    right = [" A B D", " A C D", " A C D\nEdges:"]
    wrong = {
        " A E F D": "longer",
        " A D": "no edge",
        " B A C D": "begins elsewhere",
        " A B": "ends elsewhere",
        " A B D D": "goes on",
        "": "nothing",
        " the path is A B D": "words",
    }
    answers = [*right, *wrong]
    rows = [{"idx": i, **item} for i in range(len(answers))]
    write_tables(tmp_path / shortest_path.DATASET, {"default": rows}, shortest_path.ORIGIN)
    lm = Scripted(lambda _: False, lambda request: answers[request.doc_id])
    results = run(lm, ["shortest_path"], tmp_path)
    samples = results["samples"]["shortest_path"]
    assert {answer: sample["acc"] for answer, sample in zip(answers, samples, strict=True)} == {
        **dict.fromkeys(right, 1.0),
        **dict.fromkeys(wrong, 0.0),
    }
    assert scores(results, "shortest_path") == {"acc": 3 / 10}
    [[prompt, _]] = samples[0]["arguments"]
    assert f"{prompt} A B D" == shortest_path.as_text(item)
