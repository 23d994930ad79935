"""The embedded data set: repeatable, without leaks and without shortcuts, and scored as its tasks say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from zoo.harness import facts
from zoo.harness.facts.build import DATASET
from zoo.harness.facts.passages import TASKS, Inventor, as_text, split_of
from zoo.harness.facts.world import CAPITAL, COUNTRY, CURRENCY, World, load_world
from zoo.harness.runner import task_manager
from zoo.harness.significance import chance_p_value
from zoo.harness.suites.dataset import MIRROR, GeneratedData

CONFIG = facts.FactsConfig(cities=120, statements_per_fact=3, questions_per_fact=2, passages=1600, items=400)


@pytest.fixture(scope="module")
def data() -> GeneratedData:
    return facts.make(CONFIG)


@pytest.fixture(scope="module")
def world() -> World:
    return load_world(CONFIG.cities, CONFIG.cities_per_country)


def test_equal_configs_give_equal_data_and_seeds_differ(data: GeneratedData) -> None:
    assert facts.make(CONFIG) == data
    assert facts.make(facts.FactsConfig(**{**vars(CONFIG), "seed": 1})).training != data.training


def test_world_has_the_facts_that_everyone_can_check(world: World) -> None:
    assert world.value(COUNTRY, "Shanghai") == "China"
    assert world.value(CAPITAL, "Japan") == "Tokyo"
    assert world.value(CURRENCY, "France") == "euro"
    assert world.value(CURRENCY, "Shanghai") == world.value(CURRENCY, "China")


def test_every_knowledge_answer_is_stated_in_training_and_its_question_never_asked(data: GeneratedData) -> None:
    statements = {text for text in data.training if "Imagine" not in text and "Question" not in text}
    asked = "\n".join(text for text in data.training if text.startswith("Question"))
    wordings = {
        "country": "{} is in {}.",
        "capital": "The capital of {} is {}.",
        "currency": "The currency of {} is the {}.",
    }
    for row in data.tables["knowledge"]:
        relation, value = row["answer"]["type"], row["answer"]["value"]
        subject = row["question"].removesuffix(" in?").removesuffix("?").split()[-1]
        assert wordings[relation].format(subject, value) in statements
        assert row["question"] not in asked
        assert value in row["answer"]["aliases"]


def test_other_questions_are_asked_in_training(data: GeneratedData, world: World) -> None:
    asked = Counter(text for text in data.training if text.startswith("Question"))
    assert set(asked.values()) == {CONFIG.questions_per_fact}
    assert len(asked) + len(data.tables["knowledge"]) == len(world.facts)


def test_no_training_document_holds_an_evaluation_passage_or_one_of_its_facts(data: GeneratedData) -> None:
    training = set(data.training)
    passages = {text.split("\n")[0] for text in training}
    for task, items in data.tables.items():
        for item in items if task != "knowledge" else []:
            assert as_text(task, item) not in training
            assert item.get("passage", item.get("premise")) not in passages


@pytest.mark.parametrize("split", ["train", "validation"])
def test_invented_facts_are_false_in_the_world_and_stay_in_their_half(split: Any, world: World) -> None:
    inventor = Inventor(world, split, 0)
    for _ in range(300):
        city = inventor.city()
        country = inventor.value(COUNTRY, city)
        assert world.value(COUNTRY, city) != country
        assert split_of(COUNTRY, city, country) == split


def label_and_views(task: str, item: dict[str, Any]) -> list[tuple[str, ...]]:
    """What a guesser may look at: each part of the item without the others."""
    if task == "boolq":
        return [tuple(item["question"].split()), tuple(item["passage"].split())]
    if task == "rte":
        return [tuple(item["hypothesis"].split()), tuple(item["premise"].split())]
    return [(item["choice1"], item["choice2"]), tuple(item["premise"].split())]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_labels_are_balanced_and_no_part_alone_gives_them_away(task: str, world: World, data: GeneratedData) -> None:
    """Naive Bayes over the words of one part, with the training passages to learn from, is at chance."""
    assert Counter(item["label"] for item in data.tables[task]) == {0: CONFIG.items // 2, 1: CONFIG.items // 2}
    inventor = Inventor(world, "train", 3)
    seen = [TASKS[task](inventor, number) for number in range(4000)]
    for view in range(2):
        counts = {
            label: Counter(word for i in seen if i["label"] == label for word in words(task, i, view))
            for label in (0, 1)
        }
        right = sum(guess(counts, words(task, item, view)) == item["label"] for item in data.tables[task])
        assert chance_p_value(right, CONFIG.items, 0.5) > 0.001


def words(task: str, item: dict[str, Any], view: int) -> set[Any]:
    parts = label_and_views(task, item)[view]
    return set(parts) | set(pairwise(parts)) | set(enumerate(parts))


def guess(counts: dict[int, Counter[Any]], features: set[Any]) -> int:
    ratio = 1.0
    for feature in features:
        ratio *= (counts[1][feature] + 1) / (counts[0][feature] + 1)
    return int(ratio > 1)


def test_guess_rate_of_knowledge_is_that_of_the_most_frequent_answers(data: GeneratedData, world: World) -> None:
    best = {r.name: world.most_frequent(r) for r in (COUNTRY, CAPITAL, CURRENCY)}
    rows = [row["answer"] for row in data.tables["knowledge"]]
    assert data.guesses["knowledge"] == sum(row["value"] == best[row["type"]] for row in rows) / len(rows) < 0.2


# ---------------------------------------------------------------------------------------------------------------
# On disk, through lm-eval
# ---------------------------------------------------------------------------------------------------------------


class Scripted(LM):
    """Knows the right texts: prefers them (``sign`` 1) or avoids them (-1), and answers questions from a table."""

    def __init__(self, right: set[str], answers: dict[str, str], sign: int) -> None:
        super().__init__()
        self.right, self.answers, self.sign = right, answers, sign

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        return [(self.sign * float(r.args[0] + r.args[1] in self.right), False) for r in requests]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        raise AssertionError("no task asks for this")

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        return [self.answers.get(r.args[0], "") for r in requests]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("facts")
    facts.write(CONFIG, path)
    return path


def score(directory: Path, lm: LM) -> dict[str, float]:
    tasks = ["facts_knowledge", "facts_boolq", "facts_copa", "facts_rte"]
    manager = task_manager(tasks, None, directory / MIRROR)
    results = simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0)["results"]
    return {task: results[task].get("acc,none", results[task].get("exact_match,remove_whitespace")) for task in tasks}


def reply(data: GeneratedData, answer: Callable[[int, dict[str, Any]], str]) -> dict[str, str]:
    return {
        f"Question: {row['question']}\nAnswer:": answer(number, row["answer"])
        for number, row in enumerate(data.tables["knowledge"])
    }


def test_tasks_score_an_oracle_one_and_its_opposite_zero(data: GeneratedData, directory: Path) -> None:
    right = {as_text(task, item) for task in TASKS for item in data.tables[task]}
    oracle = Scripted(right, reply(data, lambda _, a: f" {a['value'].upper()}"), 1)
    assert set(score(directory, oracle).values()) == {1.0}
    opposite = Scripted(right, reply(data, lambda _, a: f" not {a['value']}"), -1)
    assert set(score(directory, opposite).values()) == {0.0}


def test_aliases_count_and_half_right_is_half(data: GeneratedData, directory: Path) -> None:
    right = {as_text(task, item) for task in TASKS for item in data.tables[task] if item["idx"] % 4 < 2}
    lm = Scripted(right, reply(data, lambda number, a: a["aliases"][-1] if number % 2 else "Atlantis"), 1)
    scores = score(directory, lm)
    rows = len(data.tables["knowledge"])
    assert scores["facts_knowledge"] == pytest.approx((rows // 2) / rows)
    # The others tie, and lm-eval takes the first choice of a tie: half of them are label 0, which is right.
    assert scores["facts_boolq"] == scores["facts_rte"] == scores["facts_copa"] == pytest.approx(0.75)


def test_written_data_is_not_written_again_and_not_mixed_with_another(directory: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    facts.write(CONFIG, directory)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="another directory"):
        facts.write(facts.FactsConfig(cities=121), directory)


def test_training_text_and_mirror_are_laid_out_as_their_readers_expect(data: GeneratedData, directory: Path) -> None:
    lines = (directory / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == data.training
    assert facts.guess_rates(directory)["facts_boolq"] == 0.5
    assert "cc-by-4.0" in (directory / MIRROR / DATASET / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("field", "value"), [("cities", 0), ("items", -1), ("cities", 100_000)])
def test_impossible_sizes_name_the_field_and_the_value(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{field} = {value}"):
        facts.make(facts.FactsConfig(**{field: value}))
