"""The ``zoo`` command itself: what it answers at once, and how it says that something is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import zoo
from zoo.cli.main import COMMANDS, main

HEAVY = {"torch", "lightning", "transformers", "lm_eval", "datasets", "matplotlib"}

ZOO = [sys.executable, "-m", "zoo.cli.main"]


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error just printed, which is one line, on stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("zoo: error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_an_example_and_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\n"
        "from zoo.cli.main import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        f"print('imported:', *({HEAVY!r} & set(sys.modules)))\n"
        "sys.exit(code)\n"
    )
    words = [command, "--help"] if command else ["--help"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    text, _, imported = done.stdout.rpartition("imported:")
    assert imported.strip() == ""
    _, _, examples = text.partition("example")
    assert f"zoo {command}".strip() in examples


def test_help_answers_in_under_a_second() -> None:
    """The best of some runs: the machine may be busy, the command is not."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([*ZOO, "--help"], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 1


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"zoo {zoo.__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crad", "mixtral-8x7b"]) == 2
    assert "unknown command 'crad'; did you mean 'card'?" in one_error_line(capsys)


def test_an_unknown_command_near_to_none_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyzzy"]) == 2
    assert "commands are fit, data, import," in one_error_line(capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["card"], "the following arguments are required: NAME; see zoo card --help"),
        (["card", "mixtral-tiny", "--jsn"], "unrecognized arguments: --jsn"),
        (["match", "mixtral-tiny", "--by", "size"], "invalid choice: 'size'"),
    ],
)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in one_error_line(capsys)


def test_a_mistake_in_the_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", "mixtral-8x7"]) == 2
    line = one_error_line(capsys)
    assert "mixtral-8x7'" in line and "did you mean 'mixtral-8x7b'?" in line


def test_the_operating_system_refusing_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["match", "mixtral-tiny", "--by", "active", "--out", str(tmp_path / "absent" / "twin.yaml")]) == 2
    assert str(tmp_path / "absent") in one_error_line(capsys)


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such model"):
        main(["card", "nothing"])


def test_ctrl_c_exits_130(tmp_path: Path) -> None:
    """A command that reads a pipe to which nothing is written is interrupted: what Ctrl-C raises, by another signal.

    Not by its own: a test run may itself ignore or block that, and children inherit it.
    """
    pipe = tmp_path / "study.yaml"
    os.mkfifo(pipe)
    code = (
        "import signal, sys; from zoo.cli.main import main; signal.signal(signal.SIGALRM, signal.default_int_handler); "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "compare", str(pipe), "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with pipe.open("w"):  # comes back once the command has opened it, with all imports behind it
        process.send_signal(signal.SIGALRM)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "zoo: interrupted\n")


def test_a_reader_that_closes_early_is_no_error() -> None:
    process = subprocess.Popen([*ZOO, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert process.stderr.read() == ""


def test_the_package_is_lazy_and_complete() -> None:
    code = "import sys, zoo; assert 'torch' not in sys.modules; zoo.load, zoo.build, zoo.generate; print(*dir(zoo))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"build", "generate", "load"} <= set(done.stdout.split())


def test_an_unknown_attribute_of_the_package() -> None:
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = zoo.laod
