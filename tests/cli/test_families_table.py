"""docs/families.md says what the tests show, no more and no less."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_table_is_that_of_the_tests(repository: Path) -> None:
    """The tests are collected by their ids, not run; every cell is a test that there is, and every test its cell."""
    script = [sys.executable, str(repository / "scripts" / "families_table.py")]
    done = subprocess.run([*script, "--check"], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_lead_to_tests_that_are_written_there(repository: Path) -> None:
    """Without collecting: file and function of every cell."""
    page = (repository / "docs" / "families.md").read_text(encoding="utf-8")
    cells = re.findall(r"\[yes\]\(\.\./([\w/]+\.py) \"(\w+)(?:\[[\w.-]+\])?\"\)", page)
    assert len(cells) == page.count("[yes]") > 100
    for file, test in set(cells):
        assert f"\ndef {test}(" in (repository / file).read_text(encoding="utf-8"), (file, test)


@pytest.mark.slow
def test_a_family_without_a_test_has_an_empty_cell(repository: Path) -> None:
    sys.path.insert(0, str(repository / "scripts"))
    import families_table

    found = families_table.cells([])
    assert found and all(row == {} for row in found.values())
    sparse = families_table.families()
    table = families_table.table(found, sparse)
    assert table.count("–") == 8 * len(sparse) - sum(not experts for experts in sparse.values())
