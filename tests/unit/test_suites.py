"""The task suites on the real data sets: rows counted, and the same requests as lm-eval's own tasks."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import lm_eval
import pyarrow.parquet as pq
import pytest
from lm_eval.api.instance import Instance
from scripted import SUPERGLUE, TRIVIA_TASKS, Scripted, run, scores

from zoo.harness.runner import task_manager
from zoo.harness.suites import phone_book
from zoo.harness.suites.dataset import write_tables
from zoo.registry import evaluation_dir

GENERATED = {"facts_knowledge": 218, "facts_boolq": 500, "facts_copa": 500, "facts_rte": 500} | {
    "phone_book": 1000,
    "shortest_path": 1000,
}
"""Questions that come with the tasks."""


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
