"""``zoo new-family``: what it proposes, against the families that are there, and the files that it writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.cli.main import main
from zoo.config import load_spec
from zoo.families import FAMILIES, get_family
from zoo.registry import find_spec
from zoo.scaffold.proposal import _given, propose
from zoo.scaffold.stub import literal

NEW = {
    **get_family("mixtral").to_hf(find_spec("mixtral-tiny").model),
    "model_type": "sparkling",
    "architectures": ["SparklingForCausalLM"],
    "fizz_multiplier": 0.5,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu",
}
"""Mixtral with something that no block has, something that another family has, and another value."""

ABSENT = {"mixtral-8x7b", "qwen3-30b-a3b", "qwen2-57b-a14b", "deepseek-v2", "olmoe-1b-7b", "gemma-2-9b", "llama-3.1-8b"}


def config_of(name: str) -> dict[str, Any]:
    spec = find_spec(name)
    return get_family(spec.family).to_hf(spec.model)


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_with_its_family_the_proposal_is_what_the_family_reads(name: str) -> None:
    proposal = propose(config_of(name))
    assert not proposal.notes.unread and not proposal.notes.renamed
    assert proposal.config == find_spec(name).model or proposal.family != find_spec(name).family


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_without_its_family_nothing_that_is_said_to_be_in_the_file_is_wrong(name: str) -> None:
    """The right values are those that the family's own module reads: each is proposed, left unread, or admitted."""
    spec = find_spec(name)
    proposal = propose(config_of(name), {key: family for key, family in FAMILIES.items() if key != spec.family})
    right, proposed = dict(_given(spec.model)), dict(_given(proposal.config))
    read = proposed.keys() & proposal.origins.keys()
    assert {path: proposed[path] for path in read} == {path: right.get(path) for path in read}
    assert {"vocab_size", "hidden_size", "num_layers", "norm_eps", "rope.theta"} <= read
    assert proposed.keys() - read == proposal.assumed.keys()
    if any(path not in proposed for path in right):
        assert proposal.notes.unread or proposal.assumed or proposal.family in ("llama", "mistral")


def test_what_cannot_be_expressed_is_listed_with_its_value_and_who_knows_it() -> None:
    proposal = propose(NEW)
    assert proposal.family == "mixtral"
    assert proposal.notes.unread == {"fizz_multiplier": 0.5, "final_logit_softcapping": 30.0, "hidden_act": "gelu"}
    assert proposal.known_to["fizz_multiplier"] == []
    assert "gemma2" in proposal.known_to["final_logit_softcapping"]
    assert proposal.assumed == {"moe.score_func": "softmax", "moe.norm_topk_prob": True}
    assert proposal.origins["moe.num_experts"] == "num_local_experts"


def test_a_spelling_of_another_family_is_taken() -> None:
    """Experts as DeepSeek counts them, everything else as Mixtral."""
    hf = {key: value for key, value in NEW.items() if key not in ("num_local_experts", "fizz_multiplier")}
    proposal = propose(hf | {"n_routed_experts": 12})
    assert proposal.config.moe is not None and proposal.config.moe.num_experts == 12
    assert proposal.origins["moe.num_experts"] == "n_routed_experts"


@pytest.mark.parametrize("hf", [{}, {"model_type": 3}, {"vocab_size": "many"}, {"rope_scaling": []}])
def test_what_no_family_reads_is_one_line(hf: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no family can read this config\.json: ") as caught:
        propose(hf)
    assert "\n" not in str(caught.value)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory to write into, and the config.json that is read."""
    (tmp_path / "config.json").write_text(json.dumps(NEW))
    return tmp_path


def begin(checkout: Path, name: str = "sparkling") -> int:
    return main(["new-family", name, "--from-hf", str(checkout / "config.json"), "--out", str(checkout)])


def written(checkout: Path) -> list[Path]:
    names = ("zoo/families/sparkling.py", "tests/parity/test_sparkling.py", "configs/models/sparkling.yaml")
    return [checkout / name for name in names]


def test_files_are_written_once(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert begin(checkout) == 0
    text = capsys.readouterr().out
    assert "fizz_multiplier" in text and "tests/parity/test_sparkling.py" in text
    assert load_spec(checkout / "configs/models/sparkling.yaml").model == propose(NEW).config
    before = [path.read_bytes() for path in written(checkout)]
    assert begin(checkout) == 2
    assert "sparkling.py: already there" in capsys.readouterr().err
    assert [path.read_bytes() for path in written(checkout)] == before


@pytest.mark.parametrize("taken", range(3))
def test_one_file_that_is_there_keeps_all_from_being_written(checkout: Path, taken: int) -> None:
    path = written(checkout)[taken]
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert begin(checkout) == 2
    assert [p.read_text() for p in written(checkout) if p.exists()] == ["mine"]


@pytest.mark.parametrize("name", ["../escape", "Sparkling", "class", "3d", "mixtral", "", "a b", "a.b"])
def test_names_of_no_module(checkout: Path, name: str) -> None:
    assert begin(checkout, name) == 2
    assert sorted(path.name for path in checkout.iterdir()) == ["config.json"]


@pytest.mark.slow
def test_what_is_written_is_clean_and_fails_for_the_right_reasons(checkout: Path, repository: Path) -> None:
    """In a copy of the package: the stub imports, is typed and formatted, and its test names what is not read yet."""
    shutil.copytree(repository / "zoo", checkout / "zoo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(repository / "configs", checkout / "configs")
    shutil.copytree(repository / "tests" / "parity", checkout / "tests" / "parity")
    shutil.copy(repository / "tests" / "conftest.py", checkout / "tests")
    shutil.copy(repository / "pyproject.toml", checkout)
    assert begin(checkout) == 0
    python = [str(path) for path in written(checkout)[:2]]
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, *python], cwd=checkout, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
    code = "from zoo.families.sparkling import FAMILY; print(FAMILY.name)"
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.stdout == "sparkling\n", done.stderr
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", python[1], "-k", "published"]
    done = subprocess.run(test, cwd=checkout, env=environment, capture_output=True, text=True)
    assert "hidden_act = 'gelu' is not supported; only 'silu' is" in done.stdout
    filled = (
        Path(python[0])
        .read_text()
        .replace(
            "return mixtral.FAMILY.read(fields)",
            'fields.skip("fizz_multiplier", "final_logit_softcapping")\n    return mixtral.FAMILY.read(fields)',
        )
    )
    Path(python[0]).write_text(filled)
    Path(python[1]).write_text(Path(python[1]).read_text().replace('"gelu"', '"silu"'))
    done = subprocess.run(test, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_literals_are_read_back_by_python(value: Any) -> None:
    assert eval(literal(value), {"__builtins__": {}}) == value


def test_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError):
        literal({"a": float("nan")})
