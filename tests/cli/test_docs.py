"""The commands in the documentation do what the text beside them shows.

A fenced ``console`` block after the line ``<!-- tested -->`` is run, line by line where it starts with ``$``, with the
rest of the block as what must be printed; a line ``...`` stands for any lines. The blocks of a file share one empty
directory in which ``configs`` and ``evaluation`` are the checkout's.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

BLOCK = re.compile(r"^<!-- tested -->\n+```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    text: str
    expected: str


def commands_of(document: Path) -> list[Command]:
    commands = []
    for block in BLOCK.findall(document.read_text(encoding="utf-8")):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            # A backslash at the end of a line continues the command.
            text, _, expected = re.sub(r"\\\n\s*", "", part).partition("\n")
            commands.append(Command(text, expected))
    return commands


DOCUMENTS = [
    path
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md"))
    if path.exists() and commands_of(path)
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_print_what_the_document_shows(document: Path, tmp_path: Path) -> None:
    for folder in ("configs", "evaluation"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    zoo = tmp_path / "bin" / "zoo"
    zoo.parent.mkdir()
    zoo.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m zoo.cli.main "$@"\n')
    zoo.chmod(0o755)
    path = os.pathsep.join([str(zoo.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    for command in commands_of(document):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.text],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{command.text}\n{done.stdout}"
        assert_shown(done.stdout, command)


def assert_shown(printed: str, command: Command) -> None:
    pattern = "".join(
        r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\s*\n"
        for line in command.expected.rstrip().splitlines()
    )
    if pattern and not re.fullmatch(pattern, printed.rstrip() + "\n"):
        assert printed == command.expected, command.text
