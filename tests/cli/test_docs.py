"""The commands in the documentation do what the text beside them shows.

In a fenced ``console`` block after the line ``<!-- tested -->``, a line that starts with ``$`` is a command, lines that
start with ``>`` continue it, and the others are what it must print; ``...`` stands for any lines. The blocks of a file
share one directory, which has nothing but ``checkpoints``, ``configs``, ``evaluation`` and ``scripts`` of the checkout.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

BLOCK = re.compile(r"^<!-- tested -->\n+```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    text: str
    expected: list[str]


def commands_of(document: Path) -> list[Command]:
    commands = []
    for block in BLOCK.findall(document.read_text(encoding="utf-8")):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            first, *lines = part.splitlines()
            continued = list(takewhile(lambda line: line.startswith(">"), lines))
            text = "\n".join([first, *(line.removeprefix(">").removeprefix(" ") for line in continued)])
            commands.append(Command(text, lines[len(continued) :]))
    return commands


DOCUMENTS = [
    path
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md"))
    if path.exists() and commands_of(path)
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_print_what_the_document_shows(document: Path, tmp_path: Path) -> None:
    for folder in ("checkpoints", "configs", "evaluation", "scripts"):
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
    """Compare line by line, blanks at the ends of lines and of the output left out."""
    lines = [line.rstrip() for line in printed.rstrip().splitlines()]
    expected = "\n".join(command.expected).rstrip().splitlines()
    pattern = "".join(r"(?:.*\n)*" if line == "..." else re.escape(line.rstrip()) + r"\n" for line in expected)
    if expected and not re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)):
        assert lines == expected, command.text
