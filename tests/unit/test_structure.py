"""The rules of the house that a machine can check (docs/architecture.md)."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
import tomllib
import types
import typing
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, Literal

import pytest

from zoo.config import ModelConfig
from zoo.encoder_decoder_config import EncoderDecoderConfig
from zoo.families import ENCODER_DECODERS, FAMILIES
from zoo.registry import all_names, find_any_spec

TOP_LEVEL = {".ci", "checkpoints", "configs", "docs", "evaluation", "scripts", "tests", "zoo"}

MODEL_PLACES = ("zoo/layers", "zoo/moe", "zoo/model.py", "zoo/encoder_decoder.py", "zoo/cache.py")
"""Where the architecture is written down: no collectives, and no family by name."""

FAMILY_NAMES = {part for name in FAMILIES for part in re.findall(r"[a-z]+", name)} - {"moe", "v"}


def python_files(repository: Path, *places: str) -> list[Path]:
    return [f for place in places for f in sorted((repository / place).rglob("*.py") or [repository / place])] + [
        repository / place for place in places if place.endswith(".py")
    ]


@pytest.fixture(scope="module")
def tracked(repository: Path) -> list[str]:
    """Files of the checkout that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (repository / name).exists()]


def test_top_level_folders_are_fixed(tracked: list[str]) -> None:
    assert {name.split("/")[0] for name in tracked if "/" in name} <= TOP_LEVEL


def test_no_file_names_a_place_of_one_machine(repository: Path, tracked: list[str]) -> None:
    place = re.compile(rb"(?<![\w.:/-])/(?:work|root|home|opt|tmp|Users)/\w+")
    found = {name: hit.group() for name in tracked if (hit := place.search((repository / name).read_bytes()))}
    assert found == {}


def test_blocks_have_no_word_of_distribution(repository: Path) -> None:
    """In code, comments and docstrings; ``lora_rank`` is another kind of rank. Nor do they import who has one."""
    words = r"distributed|c10d|parallel|process|\branks?\b|world|shard|fsdp|dtensor|mesh|all_?(reduce|gather|to_?all)"
    blocks = ("zoo.cache", "zoo.config", "zoo.encoder_decoder_config", "zoo.layers", "zoo.model", "zoo.moe")
    for path in python_files(repository, *MODEL_PLACES):
        found = [m.group() for m in re.finditer(words, path.read_text(), re.IGNORECASE)]
        assert found == [], path
        ours = [name for name in imports(path) if name.startswith(("zoo", "lightning"))]
        assert [name for name in ours if not name.startswith(blocks)] == [], path


def test_linear_layers_of_blocks_are_ours(repository: Path) -> None:
    """torch's own would leave their products to MKL where that is slow (``zoo.layers.linear``)."""
    paths = python_files(repository, *MODEL_PLACES)
    assert [path for path in paths if "nn.Linear(" in path.read_text()] == []


def test_blocks_name_no_family(repository: Path) -> None:
    """In docstrings and comments papers are cited; ``llama3`` is the common name of a rotary scaling."""
    for path in python_files(repository, *MODEL_PLACES):
        words = [w for name in identifiers(path) for w in re.findall(r"[a-z]+", name.lower().replace("llama3", ""))]
        assert FAMILY_NAMES.intersection(words) == set(), path
        assert not [name for name in identifiers(path) if any(family in name.lower() for family in ENCODER_DECODERS)]


def test_no_block_has_an_option_that_no_config_uses() -> None:
    used = {option for name in all_names() for option in options(find_any_spec(name).model)}
    declared = {
        (block.__name__, field.name, choice)
        for block in blocks_of(ModelConfig) | blocks_of(EncoderDecoderConfig)
        for field in dataclasses.fields(block)
        for choice in choices(typing.get_type_hints(block)[field.name]) or ("given",)
    }
    assert declared - used == set()


def blocks_of(block: type) -> set[type]:
    """``block`` and every dataclass that may stand in it."""
    hints = typing.get_type_hints(block).values()
    arms = [arm for hint in hints for arm in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(arm)]
    return {block}.union(*map(blocks_of, arms))


def options(block: Any) -> Iterator[tuple[str, str, str]]:
    """(block, field, choice) of all that is not left at its default in ``block`` and the blocks in it.

    The choice is the value of a field that lists its values, and ``given`` for others. A default that is one of listed
    values is used by whoever leaves it.
    """
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if choices(typing.get_type_hints(type(block))[field.name]):
            yield type(block).__name__, field.name, str(value)
        elif value != field.default:
            yield type(block).__name__, field.name, "given"
        if dataclasses.is_dataclass(value):
            yield from options(value)


def choices(hint: Any) -> tuple[str, ...]:
    """The values of a ``Literal``, alone or beside ``None``."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return tuple(value for arm in arms if typing.get_origin(arm) is Literal for value in typing.get_args(arm))


def test_what_is_imported_is_declared_and_what_is_declared_is_imported(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    declared = {normal(requirement) for requirement in project["dependencies"]}
    optional = project["optional-dependencies"]
    extras = {normal(requirement) for extra in ("gpu", "bench") for requirement in optional[extra]}
    used = {distribution_of(m) for path in python_files(repository, "zoo", "evaluation") for m in imports(path)}
    assert used - declared - extras == {None, "moe-zoo"} | LEFT_TO_USERS
    assert declared - used == NOT_IMPORTED


NOT_IMPORTED: set[str] = {"tensorboard"}
"""Needed without an import of ours: Lightning's TensorBoard logger."""


LEFT_TO_USERS: set[str] = {"deep-ep", "litgpt"}
"""Taken where a user has installed them: the one is not on the package index, the other asks for another version of a
library than transformers does, so that nothing can declare them."""


def imports(path: Path) -> Iterator[str]:
    """Absolute modules that a file imports, late imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def identifiers(path: Path) -> Iterator[str]:
    """Names, attributes and string values in a file, docstrings left out."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def distribution_of(module: str) -> str | None:
    """Distribution that a module comes from; None for the standard library."""
    top = module.split(".")[0]
    if top in sys.stdlib_module_names:
        return None
    return normal(DISTRIBUTIONS.get(top, [top])[0]) if top != "zoo" else "moe-zoo"


DISTRIBUTIONS = packages_distributions()


def normal(requirement: str) -> str:
    """Normalised distribution name of a requirement (PEP 503)."""
    name = re.match(r"[\w.-]+", requirement)
    assert name
    return re.sub(r"[-_.]+", "-", name.group()).lower()
