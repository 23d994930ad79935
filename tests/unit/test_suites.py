"""The task suites: scores computed by hand, rows counted, and the same requests as lm-eval's own tasks."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval
import pyarrow.parquet as pq
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from rich.console import Console

from zoo.harness.runner import results_table, summary_rows, task_manager
from zoo.harness.suites import phone_book, shortest_path
from zoo.harness.suites.dataset import write_tables
from zoo.registry import evaluation_dir

SUPERGLUE = {
    "superglue_boolq": "boolq",
    "superglue_cb": "cb",
    "superglue_copa": "copa",
    "superglue_multirc": "multirc",
    "superglue_rte": "sglue_rte",
    "superglue_wic": "wic",
    "superglue_wsc": "wsc",
}
"""Corrected task → stock task, of those that lm-eval can load."""
GENERATED = {"facts_knowledge": 218, "facts_boolq": 500, "facts_copa": 500, "facts_rte": 500} | {
    "phone_book": 1000,
    "shortest_path": 1000,
}
"""Questions that come with the tasks."""


class Scripted(LM):
    """Prefers the choice and writes the text that ``choose`` and ``write`` say, cut at the stop sequences."""

    def __init__(self, choose: Callable[[Instance], bool], write: Callable[[Instance], str] = lambda _: "") -> None:
        super().__init__()
        self.choose, self.write = choose, write

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        return [(float(self.choose(request)), False) for request in requests]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        texts = []
        for request in requests:
            text = self.write(request)
            for stop in request.args[1]["until"]:
                text = text.split(stop)[0]
            texts.append(text)
        return texts

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        raise AssertionError("no task asks for this")


def run(lm: LM, tasks: Sequence[str], mirror: Path | None, limit: int | None = None, **settings: Any) -> dict[str, Any]:
    manager = task_manager(tasks, None, mirror)
    return lm_eval.simple_evaluate(
        lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=100, **settings
    )


def scores(results: Mapping[str, Any], task: str) -> dict[str, float]:
    return {
        key.split(",")[0]: value
        for key, value in results["results"][task].items()
        if "," in key and "_stderr" not in key
    }


# Scores by hand ------------------------------------------------------------------------------------------------


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


TRIVIA_TASKS = [f"triviaqa{answer}{shots}" for answer in ("", "_full_answer") for shots in ("", "_5shot")]


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


# The real data sets --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(shared_data: Path) -> Path:
    return shared_data / "hub"


def rows_of(hub: Path, task: str) -> int:
    if task in GENERATED:
        return GENERATED[task]
    config = task.removeprefix("superglue_").removeprefix("sglue_")
    dataset = f"aps/super_glue/{'wsc.fixed' if config == 'wsc' else config}"
    if task.startswith("triviaqa"):
        dataset = "mandarjoshi/trivia_qa/rc.nocontext"
    return sum(pq.read_metadata(file).num_rows for file in (hub / dataset).glob("validation-*.parquet"))


MEMBERS = {
    "knowledge": {*TRIVIA_TASKS, "facts_knowledge", "phone_book"},
    "comprehension": {*SUPERGLUE, *SUPERGLUE.values(), "superglue_record"}
    | {"facts_boolq", "facts_copa", "facts_rte", "shortest_path"},
}


@pytest.mark.parametrize("suite", MEMBERS)
def test_suites_hold_every_row_of_their_data_sets_and_all_versions(suite: str, hub: Path) -> None:
    loaded = task_manager([suite], None, hub).load([suite])
    assert set(loaded["tasks"]) == MEMBERS[suite]
    for name, task in loaded["tasks"].items():
        assert len(task.eval_docs) == rows_of(hub, name) > 0, name
        assert isinstance(task.VERSION, float), name
    assert all(group.version != "N/A" for group in loaded["groups"].values())


@pytest.mark.slow
@pytest.mark.parametrize("suite", MEMBERS)
def test_suites_run_to_their_end_without_a_limit(suite: str, hub: Path) -> None:
    results = run(Scripted(lambda _: False), [suite], hub)
    for task in MEMBERS[suite]:
        assert len(results["samples"][task]) == rows_of(hub, task)
        assert all(0 <= score <= 1 for score in scores(results, task).values())


YES_NO = {"boolq": ("no", "yes"), "multirc": ("no", "yes"), "wic": ("no", "yes"), "wsc": ("no", "yes")}
VERDICTS = {**YES_NO, "cb": ("True", "False", "Neither"), "rte": ("True", "False")}


def truth(request: Instance) -> bool:
    """Whether the continuation is a right answer, read off the document and the text alone."""
    task, doc, text = request.task_name, request.doc, request.args[1]
    name = task.removeprefix("superglue_").removeprefix("sglue_")
    if name == "copa":
        return text.strip().lower() == doc[("choice1", "choice2")[doc["label"]]].lower()
    if name == "record":
        return any(text.strip() == "- " + doc["query"].replace("@placeholder", answer) for answer in doc["answers"])
    return text.split()[-1] == VERDICTS[name][doc["label"]]


@pytest.mark.parametrize("limit", [400, pytest.param(None, marks=pytest.mark.slow)], ids=["400", "all"])
def test_who_is_always_right_gets_100_from_the_corrected_multirc_and_0_from_the_stock_one(
    hub: Path, limit: int | None
) -> None:
    results = run(Scripted(truth), ["superglue_multirc", "multirc"], hub, limit=limit)
    assert scores(results, "superglue_multirc") == {"acc": 1.0, "f1a": 1.0, "em": 1.0, "score": 1.0}
    assert scores(results, "multirc") == {"acc": 0.0}
    assert len(results["samples"]["superglue_multirc"]) == (limit or 4848)


def test_who_is_right_gets_100_from_all_of_superglue_and_who_is_wrong_0(hub: Path) -> None:
    tasks = [task for task in (*SUPERGLUE, "superglue_record") if task != "superglue_multirc"]
    right = run(Scripted(truth), tasks, hub, limit=60)
    wrong = run(Scripted(lambda request: not truth(request)), tasks, hub, limit=60)
    for task in tasks:
        assert set(scores(right, task).values()) == {1.0}, task
        if task != "superglue_record":  # a wrong entity may share words with the right one
            assert set(scores(wrong, task).values()) == {0.0}, task
    assert scores(wrong, "superglue_record")["em"] < 0.1


# The same requests as lm-eval's own ----------------------------------------------------------------------------


def test_corrected_tasks_ask_what_the_stock_ones_ask(hub: Path) -> None:
    results = run(Scripted(lambda _: False), [*SUPERGLUE, *SUPERGLUE.values()], hub, limit=20, num_fewshot=1)
    for corrected, stock in SUPERGLUE.items():
        for ours, theirs in zip(results["samples"][corrected], results["samples"][stock], strict=True):
            assert ours["doc_hash"] == theirs["doc_hash"]
            if stock != "multirc":
                assert ours["arguments"] == theirs["arguments"], corrected
                continue
            # The order of the choices is what is corrected, and with it the verdict in the solved example.
            assert [text for _, text in ours["arguments"]] == [text for _, text in theirs["arguments"][::-1]]
            (our_example, ours_asked), (their_example, theirs_asked) = (
                sample["arguments"][0][0].split("\n\n") for sample in (ours, theirs)
            )
            assert ours_asked == theirs_asked
            assert {our_example.split()[-1], their_example.split()[-1]} == {"yes", "no"}
            assert our_example.rsplit(" ", 1)[0] == their_example.rsplit(" ", 1)[0]


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_record_asks_what_the_stock_task_asks(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"task 'record' .*transformers\.data"):
        run(Scripted(lambda _: False), ["record"], hub)
    # The stock functions load once the module that they import is there; of it, only their scores make use.
    parts = ["transformers.data", "transformers.data.metrics", "transformers.data.metrics.squad_metrics"]
    for name in parts:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    stock = module_at(Path(lm_eval.__path__[0]) / "tasks" / "super_glue" / "record" / "util.py")
    task = task_manager(["superglue_record"], None, hub).load(["superglue_record"])["tasks"]["superglue_record"]
    stock_docs = stock.process_docs(task.eval_docs)
    for ours, theirs in zip(task.eval_docs, stock_docs, strict=True):
        assert task.doc_to_text(ours) == stock.doc_to_text(theirs)
        assert task.doc_to_choice(ours) == stock.doc_to_choice(theirs)
        assert task.doc_to_target(ours) == stock.doc_to_target(theirs)


def test_triviaqa_with_five_examples_is_the_stock_task_with_five(hub: Path) -> None:
    echo = Scripted(lambda _: False, lambda request: request.args[0][-30:])
    ours = run(echo, ["triviaqa_5shot"], hub, limit=10)["samples"]["triviaqa_5shot"]
    stock = run(echo, ["triviaqa"], hub, limit=10, num_fewshot=5)["samples"]["triviaqa"]
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine["arguments"] == theirs["arguments"]
        assert mine["resps"] == theirs["resps"]


# For anyone's lm-eval ------------------------------------------------------------------------------------------


def test_task_functions_need_nothing_but_lm_eval() -> None:
    for path in evaluation_dir().rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in sys.stdlib_module_names or top in ("lm_eval", "datasets", "pyarrow"), f"{path}: {name}"


def test_generated_questions_come_from_the_data_root_else_with_the_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = module_at(evaluation_dir() / "tasks" / "questions.py").load
    rows = [phone_book.row(0, "ab", "0123")]
    write_tables(tmp_path / "mirror" / phone_book.DATASET, {"default": rows}, phone_book.ORIGIN)
    dataset = f"{phone_book.DATASET}/default"
    assert list(load(dataset=dataset, data_root=str(tmp_path / "mirror"), version=1.0)["validation"]) == rows
    assert len(load(dataset=dataset, data_root=str(tmp_path))["validation"]) == GENERATED["phone_book"]
    monkeypatch.chdir(tmp_path / "mirror")
    assert list(load(dataset=dataset)["validation"]) == rows
    with pytest.raises(ValueError, match="'moe-zoo/none/default' is neither in"):
        load(dataset="moe-zoo/none/default")
