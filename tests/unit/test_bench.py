"""``zoo bench``: the arithmetic of its rows, what is kept of them, and the tables of docs/performance.md."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from zoo.bench import document
from zoo.bench.memory import peak_bytes
from zoo.bench.plots import cost_plot, sweeps
from zoo.bench.results import Results, Run, empty, load, new_run, save
from zoo.bench.rows import LIMIT, OURS, Options, Row
from zoo.bench.tables import duration, markdown, text_table
from zoo.bench.timing import interleaved

ROW = Row(
    "train",
    "a case",
    {OURS: [1.0, 2.0, 4.0], "fast": [2.0, 2.0, 6.0], "slow": [9.0, 9.0, 9.0], LIMIT: [0.5, 1.0, 2.0]},
    {OURS: 30, "fast": 60},
)


def run_of(*rows: Row, threads: int = 1) -> Run:
    return replace(new_run(Options(threads=threads, rounds=3)), rows=rows)


def test_ratios_are_medians_of_ratios_within_a_round() -> None:
    assert ROW.best_peer == "fast"
    assert ROW.ratio("fast") == 1.5  # of 2, 1 and 1.5: the ratio of the medians would be 1
    assert ROW.quartiles("fast") == (1.25, 1.75)
    assert ROW.ratio(LIMIT) == 0.5
    assert ROW.memory_ratio == 0.5
    assert Row("b", "c", {OURS: [1.0], "p": [3.0]}).quartiles("p") == (3.0, 3.0)


@pytest.mark.parametrize("peers", [{}, {"other": [1.0, 1.0, 1.0]}])
def test_memory_of_what_was_not_measured_has_no_ratio(peers: dict[str, list[float]]) -> None:
    assert Row("b", "c", {OURS: [1.0, 1.0, 1.0], **peers}, {OURS: 5}).memory_ratio is None


def test_every_way_is_called_equally_often_and_first_in_turn() -> None:
    called: list[str] = []
    ways = {name: (lambda name=name: called.append(name)) for name in "abc"}
    times = interleaved(ways, 3, warmups=1, repeat=2)
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("abc", 3)
    assert "".join(called) == "abc" + "aaaabbbbcccc" + "bbbbccccaaaa" + "ccccaaaabbbb"


def test_short_calls_are_timed_after_their_own_and_not_after_those_of_another_way() -> None:
    before = ""

    def call(name: str) -> None:
        nonlocal before
        if before != name:  # as where another way has left the caches
            time.sleep(0.02)
        before = name

    times = interleaved({name: partial(call, name) for name in "ab"}, 3, repeat=2)
    assert max(max(seconds) for seconds in times.values()) < 0.01


def test_peak_memory_counts_temporaries_and_not_what_was_there() -> None:
    kept = torch.ones(1000, 1000)

    def work() -> torch.Tensor:
        first = kept * 2
        second = first + 1
        del first
        return torch.cat((second, second))

    work()
    assert peak_bytes(work) == 3 * kept.nbytes
    assert peak_bytes(lambda: None) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.34, "12.3 s"), (0.5, "500 ms"), (0.0009994, "999 µs"), (2e-6, "2.00 µs")]
)
def test_durations_have_three_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_results_come_back_as_they_were_saved(tmp_path: Path) -> None:
    results = empty("train", Options(dtype=torch.bfloat16)).add(run_of(ROW))
    path = save(results, tmp_path)
    assert path.name == "train-bfloat16.json"
    assert load(path) == results


def test_a_new_run_replaces_its_cases_with_as_many_threads_and_nothing_else() -> None:
    other = replace(ROW, case="another")
    results = empty("train", Options()).add(run_of(ROW, other)).add(run_of(ROW, threads=2)).add(run_of(ROW))
    assert [(run.threads, [row.case for row in run.rows]) for run in results.runs] == [
        (1, ["another"]),
        (2, ["a case"]),
        (1, ["a case"]),
    ]
    assert [len(run.rows) for run in results.add(run_of(other)).runs] == [1, 1, 1]


def test_rows_of_another_processor_stand_beside_each_other() -> None:
    here = run_of(ROW)
    there = replace(here, machine={**here.machine, "processor": "another"}, date="2000-01-01T00:00:00+00:00")
    results = empty("train", Options()).add(there).add(here).add(here)
    assert [run.machine["processor"] for run in results.runs] == ["another", here.machine["processor"]]
    assert "another (" in markdown(results)


def test_the_figure_is_of_the_latest_machine() -> None:
    points = [replace(ROW, case=str(v), notes={"sweep": "experts", "value": v, "tokens": 1}) for v in (8, 16)]
    here = run_of(*points)
    there = replace(here, machine={**here.machine, "processor": "another"}, date="2000-01-01T00:00:00+00:00")
    one = replace(points[0], seconds={OURS: [9.0]})
    results = empty("train", Options()).add(replace(there, rows=(one,))).add(here)
    assert sweeps(results)["experts"] == points


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object"),
        ('{"bench": "train"}', "no list of runs in it"),
        ('{"bench": "train", "device": "cpu", "dtype": "float32", "runs": [1]}', r"runs\[0\]: no list of rows"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "train.json")


def test_tables_show_both_times_ratio_limit_and_memory() -> None:
    lines = text_table([ROW]).splitlines()
    assert lines[1].split() == ["a", "case", "2.00", "s", "2.00", "s", "fast", "1.50", "1.25–1.75", "0.50", "0.50"]
    table = markdown(empty("train", Options()).add(run_of(ROW)))
    row = "| a case | 2.00 s | 2.00 s | fast | 1.50 (1.25–1.75) | 0.50 | 0.50 | slow 4.50 |"
    assert table.splitlines()[-1] == row
    assert "1 thread;" in table


def test_prose_stays_and_tables_are_made_anew() -> None:
    results = {"train": empty("train", Options()).add(run_of(ROW))}
    before = "# Title\n\n<!-- zoo bench: train -->\nold\n<!-- end -->\n\nProse.\n"
    after = document.filled(before, results)
    assert after.startswith("# Title\n") and after.endswith("<!-- end -->\n\nProse.\n")
    assert "old" not in after and "| a case |" in after
    assert document.filled(after, results) == after


def test_results_without_a_place_get_one_at_the_end() -> None:
    after = document.filled("# Title\n", {"load": empty("load", Options()).add(run_of(ROW))})
    assert after.startswith("# Title\n\n## `load`\n\n<!-- zoo bench: load -->\n")


def test_the_document_and_its_figure_are_written_from_the_files_alone(tmp_path: Path) -> None:
    (tmp_path / document.DOCUMENT).write_text("# Title\n")
    points = [replace(ROW, notes={"sweep": "experts", "value": n, "tokens": 8}) for n in (8, 16)]
    save(empty("train", Options()).add(run_of(*points)), tmp_path / document.FOLDER)
    document.write(tmp_path)
    text = (tmp_path / document.DOCUMENT).read_text()
    assert "![Cost of a token](performance/train-cost.png)" in text
    assert (tmp_path / document.FOLDER / "train-cost.png").is_file()


def test_a_file_of_another_name_is_refused(tmp_path: Path) -> None:
    save(empty("train", Options()), tmp_path).rename(tmp_path / "load.json")
    with pytest.raises(ValueError, match=r"load\.json: holds train; rename it to train\.json"):
        document.load_all(tmp_path)


def test_the_cost_plot_needs_a_sweep() -> None:
    results = empty("train", Options()).add(run_of(ROW))
    assert cost_plot(results) is None
    points = [replace(ROW, notes={"sweep": "experts", "value": n, "tokens": 8}) for n in (8, 16)]
    png = cost_plot(empty("train", Options()).add(run_of(*points)))
    assert png is not None and png.startswith(b"\x89PNG")


def test_the_documentation_shows_the_committed_results(repository: Path) -> None:
    docs = repository / "docs"
    text = (docs / document.DOCUMENT).read_text(encoding="utf-8")
    results: dict[str, Results] = document.load_all(docs / document.FOLDER)
    assert document.filled(text, results) == text, "run `zoo bench --write-docs`"
