"""``zoo bench`` as a command: mistakes in one line, results on standard output and in files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.bench.results import load
from zoo.bench.rows import LIMIT, OURS
from zoo.cli.main import main

CASE = "GQA, context 512, batch 1"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no subject is given: use one or more of "),
        (["trian"], "subject 'trian': use one of "),
        (["train", "--threads", "1", "0"], "--threads 0: give a positive number"),
        (["train", "--rounds", "0"], "--rounds 0: give a positive number"),
        (["train", "--dtype", "float16"], "--dtype float16: use float32 or bfloat16"),
        (["train", "--device", "gpu"], "--device gpu: give a torch device, such as cpu or cuda"),
        (["attention", "--case", "nothing"], "--case nothing: part of no case; there are MLA, context 512, batch 1; "),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "none",
)
def test_a_mistake_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"zoo: error: {message}") and error.count("\n") == 1


def test_a_missing_peer_names_the_extra() -> None:
    """The process finds no transformers; torchmetrics, which sees that it is installed, has been imported before."""
    code = (
        "import sys, torchmetrics\n"
        "from zoo.cli.main import main\n"
        "sys.modules['transformers'] = None\n"
        "sys.exit(main(['bench', 'attention', '--case', 'GQA, context 512, batch 1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "zoo: error: attention: transformers is not installed; pip install 'moe-zoo[bench]'\n"


def test_rows_are_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "attention", "--case", CASE, "--rounds", "2", "--out", str(tmp_path)]
    assert main([*argv, "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)
    kept = load(tmp_path / "attention.json")
    (run,) = kept.runs
    (row,) = run.rows
    assert (row.case, run.rounds, run.threads) == (CASE, 2, 1)
    assert len(row.seconds[OURS]) == len(row.seconds[LIMIT]) == 2
    assert {"torch", "transformers"} <= run.versions.keys()
    assert printed["runs"][0]["rows"][0]["seconds"] == row.seconds

    assert main(argv) == 0
    text = capsys.readouterr().out
    assert text.startswith("attention: ") and f"\n{CASE}  " in text
    assert [len(run.rows) for run in load(tmp_path / "attention.json").runs] == [1]
