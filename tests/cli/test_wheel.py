"""The wheel, built from this checkout and installed elsewhere, works without it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from zoo.registry import all_names

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(directory), str(repository)]
    subprocess.run(command, check=True, capture_output=True)
    [path] = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a fresh environment with the wheel in it.

    Its dependencies are those of the running environment, reached by path (which leaves an editable installation of
    this checkout out): downloading them again would test nothing that ``./scripts/test`` does not do in making .venv.
    """
    environment = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    paths = sysconfig.get_paths(vars={"base": str(environment), "platbase": str(environment)})
    (Path(paths["purelib"]) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return environment / "bin"


def run(installed: Path, directory: Path, *command: str) -> str:
    """Output of a command of the fresh environment, run in ``directory`` with nothing of this one on the path."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(installed / command[0]), *command[1:]], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_carries_the_data_and_one_package(wheel: Path, repository: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"zoo"}
    for folder in ("configs", "evaluation"):
        tracked = subprocess.run(
            ["git", "ls-files", folder], cwd=repository, capture_output=True, text=True, check=True
        )
        assert {f"zoo/_data/{name}" for name in tracked.stdout.split()} <= set(names)


def test_the_installed_command_answers_from_another_directory(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "python", "-c", "import zoo; print(zoo.__file__)")
    assert where.startswith(str(installed.parent))
    listed = run(installed, tmp_path, "zoo", "list")
    assert [line.split()[0] for line in listed.splitlines()[1:]] == all_names()
    assert "46,702,792,704" in run(installed, tmp_path, "zoo", "card", "mixtral-8x7b")
    assert "zoo fit --config" in run(installed, tmp_path, "zoo", "fit", "--help")


def test_the_installed_command_finds_checkpoints_where_they_are(
    installed: Path, tmp_path: Path, repository: Path
) -> None:
    """The wheel has none: they are found from inside the checkout, and elsewhere the error says so."""
    command = ["generate", "facts-mixtral", "--prompt", "The capital of France is", "--max-new-tokens", "4"]
    elsewhere = subprocess.run([str(installed / "zoo"), *command], cwd=tmp_path, capture_output=True, text=True)
    assert elsewhere.returncode == 2
    assert "the zoo's own checkpoints are in checkpoints/ of its source: run zoo there" in elsewhere.stderr
    assert run(installed, repository, "zoo", *command).strip()


def test_a_model_of_the_installed_package_runs(installed: Path, tmp_path: Path) -> None:
    code = (
        "import torch, zoo; from zoo.registry import find_spec\n"
        "model = zoo.build(find_spec('mixtral-tiny').model, seed=0)\n"
        "print(*model(torch.zeros(1, 3, dtype=torch.int64)).logits.shape)"
    )
    assert run(installed, tmp_path, "python", "-c", code).split()[:2] == ["1", "3"]
