"""Studies are read strictly, and their models follow from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from zoo.accounting import count_parameters
from zoo.harness.compare import Run, fit_config, run_study
from zoo.harness.study import load_study, resolve_models

QUICKSTART = Path("configs") / "studies" / "quickstart.yaml"


@pytest.fixture
def quickstart(repository: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(repository / QUICKSTART))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def saved(content: dict[str, Any], directory: Path) -> Path:
    path = directory / "study.yaml"
    OmegaConf.save(OmegaConf.create(content), path)
    return path


def test_twins_of_the_quickstart_match_their_sparse_model(repository: Path) -> None:
    models = {m.name: m for m in resolve_models(load_study(repository / QUICKSTART), vocab_size=1000)}
    sparse = count_parameters(models["sparse"].spec.model)
    assert models["sparse"].spec.model.moe is not None
    assert all(m.spec.model.vocab_size == 1000 and m.spec.name == m.name for m in models.values())
    active, total = (count_parameters(models[f"dense-{by}"].spec.model) for by in ("active", "total"))
    assert active.total == pytest.approx(sparse.active, rel=0.01)
    assert total.total == pytest.approx(sparse.total, rel=0.01)


def test_smoke_replaces_only_what_it_names(repository: Path) -> None:
    whole, smoke = load_study(repository / QUICKSTART), load_study(repository / QUICKSTART, smoke=True)
    assert smoke.training.tokens < whole.training.tokens / 50
    assert smoke.training.fit["model"]["optimizer"] == whole.training.fit["model"]["optimizer"]
    assert (smoke.models, smoke.tasks, smoke.seeds) == (whole.models, whole.tasks, whole.seeds)


def test_models_are_trained_alike_but_for_the_balance_losses(repository: Path) -> None:
    study = load_study(repository / QUICKSTART)
    runs = [Run(model, 0, Path("out") / model.name) for model in resolve_models(study, 1000)]
    configs = [fit_config(study, run, Path("data")) for run in runs]
    for config in configs:
        config["model"].pop("name")
        config["trainer"].pop("default_root_dir")
    sparse, *dense = configs
    assert {key: sparse["model"].pop(key) for key in study.training.balance} == study.training.balance
    assert dense == [sparse, sparse]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 5}, "unknown key 'step'"),
        ({"training": {"steps": 5, "batch_sise": 2, "sequence_length": 8}}, "did you mean 'batch_size'"),
        ({"training": {"steps": 0, "batch_size": 2, "sequence_length": 8}}, "steps = 0"),
        (
            {"data": {"facts": {}, "sources": ["a.txt"], "vocab_size": 300}},
            "facts / generated / sources: give exactly one",
        ),
        ({"data": {"facts": {}}}, "vocab_size / tokenizer: give exactly one"),
        (
            {"data": {"facts": {}, "tasks": {"a_trained": {}}, "vocab_size": 300}},
            "tasks: their train rows stand beside",
        ),
        ({"data": {"sources": ["a"], "documents": 0, "vocab_size": 300}}, "documents = 0: give a positive number"),
        ({"data": {"sources": ["a"], "tasks": {"a": {"rows": 0}}, "vocab_size": 300}}, "rows = 0: give a positive"),
        ({"tasks": {"knowledge": [], "comprehension": ["boolq"]}}, "knowledge: name at least one task"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\]"),
        ({"models": [{"name": "a"}]}, "model 'a': give exactly one of base, variant and twin"),
        ({"models": [{"name": "../a", "base": "mixtral-tiny"}]}, "it names a directory"),
        ({"models": [{"name": "a", "twin": {"of": "b", "by": "active"}}]}, "twin of 'b', which is not among"),
        ({"models": [{"name": "a", "twin": {"of": "b", "by": "size"}}]}, "use one of 'active'"),
    ],
)
def test_mistakes_are_one_line_that_names_them(
    quickstart: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = saved({**quickstart, **change}, tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_study(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_no_more_rows_are_evaluated_than_were_trained_on(quickstart: dict[str, Any], tmp_path: Path) -> None:
    trained = {"sources": ["a"], "tasks": {"triviaqa_trained": {"rows": 10}}, "vocab_size": 300}
    tasks = {"knowledge": ["triviaqa_trained"], "comprehension": ["superglue_cb"], "apart": ["triviaqa"]}
    study = {**quickstart, "data": trained, "tasks": tasks}
    for limit in ({}, {"limit": 11}):
        with pytest.raises(ValueError, match="triviaqa_trained is trained on 10 rows; evaluate no more"):
            load_study(saved({**study, **limit}, tmp_path))
    assert load_study(saved({**study, "limit": 10}, tmp_path)).tasks.apart == ("triviaqa",)


def test_a_twin_of_a_twin_and_an_unknown_base_are_refused(quickstart: dict[str, Any], tmp_path: Path) -> None:
    twice = {"name": "again", "twin": {"of": "dense-active", "by": "active"}}
    study = load_study(saved({**quickstart, "models": [*quickstart["models"], twice]}, tmp_path))
    with pytest.raises(ValueError, match="'dense-active' is a twin itself"):
        resolve_models(study, 1000)
    study = load_study(saved({**quickstart, "models": [{"name": "a", "base": "mixtral-tin"}]}, tmp_path))
    with pytest.raises(ValueError, match="did you mean 'mixtral-tiny'"):
        resolve_models(study, 1000)


def test_an_unknown_task_is_named_before_anything_is_made(quickstart: dict[str, Any], tmp_path: Path) -> None:
    tasks = {"knowledge": ["facts_knowlege"], "comprehension": ["facts_boolq"]}
    study = load_study(saved({**quickstart, "tasks": tasks}, tmp_path))
    with pytest.raises(ValueError, match="did you mean 'facts_knowledge'"):
        run_study(study, tmp_path / "out", None, print)
    assert not (tmp_path / "out").exists()


def test_a_task_without_item_scores_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    """lm-eval's CoLA has Matthews' correlation alone, which is one of all items."""
    mirror = tmp_path / "mirror" / "nyu-mll" / "glue"
    (mirror / "cola").mkdir(parents=True)
    files = "".join(f"  - split: {split}\n    path: cola/{split}.jsonl\n" for split in ("train", "validation"))
    (mirror / "README.md").write_text(f"---\nconfigs:\n- config_name: cola\n  data_files:\n{files}---\n")
    for split in ("train", "validation"):
        (mirror / "cola" / f"{split}.jsonl").write_text('{"sentence": "They sang.", "label": 1, "idx": 0}\n')
    (tmp_path / "text.txt").write_text("They sang. " * 1000)
    content = {
        "name": "cola",
        "data": {"sources": [str(tmp_path / "text.txt")], "vocab_size": 260},
        "training": {"steps": 2, "batch_size": 1, "sequence_length": 8},
        "models": [{"name": "sparse", "base": "mixtral-tiny"}],
        "tasks": {"knowledge": ["facts_knowledge"], "comprehension": ["cola"]},
    }
    study = load_study(saved(content, tmp_path))
    with pytest.raises(ValueError, match=r"task 'cola': its first metric, 'mcc', has no score for each item"):
        run_study(study, tmp_path / "out", mirror.parents[1], print)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["study.yaml"]


def test_smoke_needs_a_smoke_size(quickstart: dict[str, Any], tmp_path: Path) -> None:
    quickstart.pop("smoke")
    with pytest.raises(ValueError, match="no smoke size"):
        load_study(saved(quickstart, tmp_path), smoke=True)
