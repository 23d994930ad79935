"""The set-up scripts, as far as they can be tried without downloading an environment."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TOOLS = ("bash", "cat", "dirname", "grep", "mkdir", "mktemp", "rm", "tail")


@pytest.fixture
def bare_clone(repository: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A clone with the scripts alone, and a directory of commands in which there is no Python."""
    clone, tools = tmp_path / "clone", tmp_path / "bin"
    shutil.copytree(repository / "scripts", clone / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(repository / name, clone / name)
    tools.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, tool
        (tools / tool).symlink_to(found)
    return clone, tools


def start(clone: Path, tools: Path, script: str) -> subprocess.CompletedProcess[str]:
    temporary = clone.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {"PATH": str(tools), "HOME": str(clone.parent / "home"), "TMPDIR": str(temporary)}
    return subprocess.run(
        [shutil.which("bash") or "bash", f"scripts/{script}"],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("script", ["quickstart", "test"])
def test_a_machine_without_python_3_11_is_told_what_to_do(bare_clone: tuple[Path, Path], script: str) -> None:
    clone, tools = bare_clone
    done = start(clone, tools, script)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "error: Python 3.11 was not found. Install it" in done.stderr and "set PYTHON" in done.stderr


def test_a_python_that_is_too_old_is_not_taken(bare_clone: tuple[Path, Path]) -> None:
    clone, tools = bare_clone
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")  # what any other version answers when asked for 3.11
    (tools / "python3").chmod(0o755)
    assert "Python 3.11 was not found" in start(clone, tools, "test").stderr


def test_a_failed_installation_shows_why_and_is_not_taken_for_complete(bare_clone: tuple[Path, Path]) -> None:
    """pip refuses the pins here; the half-made .venv that stood there is gone, and the next run would begin again."""
    clone, tools = bare_clone
    for tool in ("python3.11", "sleep"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    (clone / ".venv").mkdir()
    (clone / ".venv" / "rubbish").touch()
    (clone / "constraints.txt").write_text("hatchling==not a version\n")
    done = start(clone, tools, "test")
    assert done.returncode != 0
    assert "error: installation failed; the whole log is .cache/install.log" in done.stderr
    assert (clone / ".cache" / "install.log").stat().st_size > 0
    assert not (clone / ".venv" / ".fingerprint").exists() and not (clone / ".venv" / "rubbish").exists()


def test_nothing_is_left_outside_the_clone(bare_clone: tuple[Path, Path]) -> None:
    clone, tools = bare_clone
    start(clone, tools, "test")
    assert not (clone.parent / "home").exists()
    assert list((clone.parent / "tmp").iterdir()) == []
