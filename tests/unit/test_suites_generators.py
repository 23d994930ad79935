"""Generated tasks: repeatable, nothing leaks, and what is called a shortest path is one."""

from __future__ import annotations

import json
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from zoo.cli.main import main
from zoo.harness.suites import generators, phone_book, shortest_path
from zoo.harness.suites.dataset import GeneratedData, guess_rates
from zoo.harness.suites.generators import GENERATORS, MixtureConfig, write_mixture, write_shipped
from zoo.harness.suites.phone_book import PhoneBookConfig
from zoo.harness.suites.shortest_path import ShortestPathConfig, walk_probability
from zoo.registry import evaluation_dir

BOOK = PhoneBookConfig(entries=500, questions=60, repetitions=3)
GRAPHS = ShortestPathConfig(graphs=900, questions=120, vertices=6, edges=7)


@pytest.fixture(scope="module")
def book() -> GeneratedData:
    return phone_book.make(BOOK)


@pytest.fixture(scope="module")
def graphs() -> GeneratedData:
    return shortest_path.make(GRAPHS)


def test_equal_configs_give_equal_data_and_seeds_differ(book: GeneratedData, graphs: GeneratedData) -> None:
    assert phone_book.make(BOOK) == book
    assert shortest_path.make(GRAPHS) == graphs
    other_book = phone_book.make(PhoneBookConfig(**{**vars(BOOK), "seed": 1}))
    other_graphs = shortest_path.make(ShortestPathConfig(**{**vars(GRAPHS), "seed": 1}))
    assert not set(other_book.training) & set(book.training)
    assert other_graphs.tables != graphs.tables


def test_every_number_that_is_asked_for_stands_in_each_pass_of_the_training_text(book: GeneratedData) -> None:
    entries = dict(text.removeprefix("Name: ").split("\nNumber: ") for text in book.training)
    passes = [book.training[i : i + BOOK.entries] for i in range(0, len(book.training), BOOK.entries)]
    assert len(entries) == BOOK.entries and len(passes) == BOOK.repetitions
    assert all(set(one) == set(passes[0]) and len(one) == BOOK.entries for one in passes)
    assert len({tuple(one) for one in passes}) == BOOK.repetitions
    questions = book.tables["default"]
    assert len({row["name"] for row in questions}) == BOOK.questions
    assert all(entries[row["name"]] == row["number"] for row in questions)
    assert {(len(name), len(number)) for name, number in entries.items()} == {(5, 8)}
    digits = Counter("".join(entries.values()))
    assert len(digits) == 10 and min(digits.values()) > 0.8 * BOOK.entries * 8 / 10


def test_no_graph_of_the_evaluation_is_in_the_training_text(graphs: GeneratedData) -> None:
    def key(text: str) -> Any:
        edges, question, _ = text.split("\n")
        return frozenset(map(frozenset, edges.removeprefix("Edges: ").split())), question

    training, validation = Counter(map(key, graphs.training)), Counter(map(key, graphs.validation))
    assert not training & validation
    assert max((training + validation).values()) == 1
    assert (training.total(), validation.total()) == (GRAPHS.graphs, GRAPHS.questions)


def shortest_by_trying_all(item: dict[str, Any]) -> int:
    """Edges on the shortest path, by walking along every order of every number of vertices."""
    edges = {frozenset(edge) for edge in item["edges"]}
    others = {vertex for edge in item["edges"] for vertex in edge} - {item["source"], item["target"]}
    for between in range(len(others) + 1):
        for inner in permutations(others, between):
            path = (item["source"], *inner, item["target"])
            if all(frozenset(path[i : i + 2]) in edges for i in range(between + 1)):
                return between + 1
    raise AssertionError("no path")


def test_answers_are_shortest_paths_and_distances_are_even(graphs: GeneratedData) -> None:
    questions = graphs.tables["default"]
    assert Counter(item["distance"] for item in questions) == {2: 40, 3: 40, 4: 40}
    for item in questions:
        edges = {frozenset(edge) for edge in item["edges"]}
        assert len(edges) == GRAPHS.edges
        assert shortest_by_trying_all(item) == item["distance"] == len(item["path"]) - 1
        assert (item["path"][0], item["path"][-1]) == (item["source"], item["target"])
        assert all({a, b} in edges for a, b in zip(item["path"], item["path"][1:], strict=False))


def test_guess_rate_is_that_of_a_random_walk() -> None:
    # B, C or D with 1/3 each; from B and D back to A or on to E with 1/2 each; from C only back.
    item = {"edges": [["A", "B"], ["C", "A"], ["A", "D"], ["B", "E"], ["E", "D"]], "source": "A", "target": "E"}
    assert walk_probability({**item, "distance": 2}) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (PhoneBookConfig, {"entries": 0}, "entries = 0"),
        (PhoneBookConfig, {"entries": 10, "questions": 11}, "questions = 11: there are only 10"),
        (PhoneBookConfig, {"entries": 100, "questions": 5, "name_letters": 1}, "name_letters = 1; raise"),
        (ShortestPathConfig, {"questions": 0}, "questions = 0"),
        (ShortestPathConfig, {"distances": ()}, r"distances = \[\]"),
        (ShortestPathConfig, {"vertices": 27}, "vertices = 27: give 2 to 26"),
        (ShortestPathConfig, {"vertices": 4, "edges": 7}, "edges = 7: give 4 to 6 for 4 vertices"),
    ],
)
def test_impossible_sizes_name_the_field_and_the_value(config: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_a_distance_that_no_graph_has_is_an_error_and_no_endless_search() -> None:
    with pytest.raises(ValueError, match="none of 10,000 graphs with 6 vertices and 15 edges has a path of 2"):
        shortest_path.make(ShortestPathConfig(graphs=1, questions=1, vertices=6, edges=15))


# On disk -------------------------------------------------------------------------------------------------------


def test_more_graphs_than_there_are_is_an_error_and_no_endless_search() -> None:
    """Of four vertices, paths of two edges are all graphs of two edges that touch: 12 pairs of ends and 2 ways."""
    sizes = {"vertices": 4, "edges": 2, "distances": (2,), "questions": 4}
    assert len(shortest_path.make(ShortestPathConfig(**sizes, graphs=20)).training) == 20
    with pytest.raises(ValueError, match=r"graphs = 21 .* hardly more than 24 .* 4 vertices"):
        shortest_path.make(ShortestPathConfig(**sizes, graphs=21))


def test_the_questions_that_come_with_the_tasks_are_those_of_the_default_configs(tmp_path: Path) -> None:
    write_shipped(tmp_path)
    made = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*") if path.is_file()}
    shipped = evaluation_dir() / "data"
    assert set(made) == {path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file()}
    for name, path in made.items():
        read = pq.read_table if name.suffix == ".parquet" else Path.read_text
        assert read(path) == read(shipped / name), f"{name}: call write_shipped() and commit it"
    assert {generator.dataset for generator in GENERATORS.values()} == {
        f"moe-zoo/{directory.name}" for directory in (shipped / "moe-zoo").iterdir()
    }


def test_zoo_data_make_writes_training_text_and_a_mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "make", "phone_book", "--out", str(tmp_path), "--json", "--set", "entries=20", "questions=4"]
    assert main(command) == 0
    config = json.loads(capsys.readouterr().out)
    assert (config["entries"], config["questions"], config["seed"]) == (20, 4, 0)
    texts = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert texts == phone_book.make(PhoneBookConfig(entries=20, questions=4)).training
    assert list((tmp_path / "hub" / "moe-zoo" / "phone_book" / "default").glob("validation-*.parquet"))
    assert guess_rates(tmp_path, phone_book.DATASET) == {"phone_book": 1e-8}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert main([*command, "seed=1"]) == 2
    assert "give another directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"), [("entrees=5", "did you mean 'entries'"), ("entries", "field=value"), ("seed=x", "seed")]
)
def test_zoo_data_make_names_a_wrong_setting(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "make", "phone_book", "--out", str(tmp_path / "x"), "--set", setting]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_mixture_has_texts_of_its_own_and_one_mirror(tmp_path: Path) -> None:
    mixture = MixtureConfig(phone_book=BOOK, shortest_path=GRAPHS)
    assert write_mixture(mixture, tmp_path) == [tmp_path / "phone_book", tmp_path / "shortest_path"]
    for name, config in (("phone_book", BOOK), ("shortest_path", GRAPHS)):
        assert len((tmp_path / name / "train.jsonl").read_text().splitlines()) in (BOOK.entries * 3, GRAPHS.graphs)
        assert (tmp_path / name / "train.jsonl").stat().st_size > 0
        [questions] = (tmp_path / "hub" / "moe-zoo" / name / "default").glob("validation-*.parquet")
        assert pq.read_table(questions).num_rows == config.questions
        assert not (tmp_path / name / "hub").exists()
    rates = generators.guess_rates(mixture, tmp_path)
    assert rates["phone_book"] == 1e-8 and 0 < rates["shortest_path"] < 0.5
    alone = MixtureConfig(phone_book=BOOK)
    assert write_mixture(alone, tmp_path / "alone") == [tmp_path / "alone" / "phone_book"]
    with pytest.raises(ValueError, match="name at least one of phone_book, shortest_path"):
        MixtureConfig()
