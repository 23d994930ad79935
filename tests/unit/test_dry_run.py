"""A dry run names what a study would train, read and cost, and refuses what the study would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zoo.accounting import training_flops
from zoo.config_reading import from_dict
from zoo.harness.compare import Run, fit_config
from zoo.harness.dry_run import dry_run
from zoo.harness.study import Study, load_study, resolve_models
from zoo.harness.tasks import with_leaf_tasks
from zoo.training.data.sources import Source

MODELS = [
    {"name": "moe", "base": "mixtral-8x7b", "layout": {"strategy": "ep_fsdp", "expert": 8}},
    {"name": "dense", "twin": {"of": "moe", "by": "active"}, "layout": {"strategy": "fsdp", "recompute": "block"}},
]
CLUSTER = {"gpus": 64, "gpu": "h100", "dollars_per_gpu_hour": 2.0}


def study(**changes: Any) -> Study:
    content = {
        "name": "s",
        "data": {"sources": ["HuggingFaceFW/fineweb-edu:sample-10BT"], "vocab_size": 32000},
        "training": {
            "steps": 100,
            "batch_size": 64,
            "sequence_length": 4096,
            "fit": {"trainer": {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}},
        },
        "models": MODELS,
        "tasks": {"knowledge": ["triviaqa_full_answer"], "comprehension": ["superglue"]},
        "seeds": [0, 1],
        "cluster": CLUSTER,
    }
    return from_dict(Study, content | changes, "study")


def test_a_dry_run_sums_up_size_time_and_cost_of_all_seeds() -> None:
    of = study()
    plan = dry_run(of, None, lambda _: None)
    assert plan["tokens"] == 100 * 64 * 2 * 4096 == of.training.tokens
    moe, dense = plan["models"]
    assert moe["total_parameters"] == pytest.approx(46.7e9, rel=0.001)
    assert dense["total_parameters"] == pytest.approx(moe["active_parameters"], rel=0.01)
    assert moe["training_flops"] == training_flops(resolve_models(of, 32000)[0].spec.model, 4096) * plan["tokens"]
    assert (moe["layout"]["strategy"], moe["layout"]["expert"], dense["layout"]["strategy"]) == ("ep_fsdp", 8, "fsdp")
    assert moe["gpu_hours"] == pytest.approx(2 * 100 * 64 * moe["step_seconds"] / 3600)
    assert moe["dollars"] == 2 * moe["gpu_hours"]
    # Nothing computes faster than the GPUs: time at their peak is the least.
    assert moe["step_seconds"] > moe["training_flops"] / 100 / (64 * 989.4e12)
    assert plan["compare"] == [["moe", "dense", "active"]]
    assert plan["sources"] == [{"name": "HuggingFaceFW/fineweb-edu:sample-10BT", "from": "hub"}]
    assert {task["data_set"] for task in plan["tasks"]} >= {"mandarjoshi/trivia_qa:rc.nocontext", "aps/super_glue:wic"}
    assert len(plan["tasks"]) == 1 + 8 and {task["from"] for task in plan["tasks"]} == {"hub"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"sources": ["a name/with spaces"], "vocab_size": 300}}, "'a name/with spaces': no name of a data"),
        ({"data": {"sources": ["missing.txt"], "vocab_size": 300}}, "missing.txt: no such file"),
        ({"cluster": CLUSTER | {"gpus": 8}}, "model 'moe' on 8 h100: ep_fsdp: needs .* GB at least"),
        ({"tasks": {"knowledge": ["trivia"], "comprehension": ["superglue"]}}, "unknown task 'trivia'"),
    ],
)
def test_what_cannot_run_is_named(changes: dict[str, Any], message: str) -> None:
    changes = {"models": MODELS[:1]} | changes
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dry_run(study(**changes), None, lambda _: None)


def test_data_sets_are_looked_for_in_the_mirror(shared_data: Path, tmp_path: Path) -> None:
    small = study(models=[{"name": "dense", "base": "llama-tiny"}], training=TINY, cluster=None)
    found = dry_run(small, shared_data / "hub", lambda _: None)
    assert {task["from"] for task in found["tasks"]} == {"mirror"} and "gpu_hours" not in found["models"][0]
    with pytest.raises(ValueError, match="task 'triviaqa_full_answer': its data set is not in the mirror"):
        dry_run(small, tmp_path, lambda _: None)


TINY = {"steps": 1, "batch_size": 1, "sequence_length": 8}


def test_a_source_in_hub_layout_is_read_as_one_from_the_hub(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(5)]
    (tmp_path / "owner" / "set" / "part").mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), tmp_path / "owner" / "set" / "part" / "train-00000-of-00001.parquet")
    readme = "---\nconfigs:\n- config_name: part\n  data_files:\n  - split: train\n    path: part/train-*\n---\n"
    (tmp_path / "owner" / "set" / "README.md").write_text(readme, encoding="utf-8")
    location = f"{tmp_path / 'owner' / 'set'}:part"
    assert [text for text, _ in Source(location).documents()] == texts
    of = study(data={"sources": [location], "vocab_size": 300}, models=MODELS[:1], cluster=None)
    assert dry_run(of, None, lambda _: None)["sources"] == [{"name": location, "from": "directory"}]


def test_groups_and_suites_stand_for_the_tasks_in_them() -> None:
    tasks = with_leaf_tasks(study(tasks={"knowledge": ["facts_knowledge"], "comprehension": ["facts", "superglue"]}))
    assert tasks.tasks.knowledge == ("facts_knowledge",)
    assert tasks.tasks.comprehension[:4] == ("facts_knowledge", "facts_boolq", "facts_copa", "facts_rte")
    assert len(tasks.tasks.comprehension) == 4 + 8 and with_leaf_tasks(tasks) == tasks


def test_a_layout_becomes_keys_of_zoo_fit() -> None:
    of = study()
    moe, dense = (fit_config(of, Run(m, 0, Path("out")), Path("data")) for m in resolve_models(of, 32000))
    assert moe["trainer"]["strategy"] == "ep_fsdp" and moe["parallel"] == {"expert": 8}
    assert dense["trainer"]["strategy"] == "fsdp" and dense["parallel"] == {"recompute": "block"}


def test_the_full_study_has_the_sizes_that_were_published(repository: Path) -> None:
    full = load_study(repository / "configs" / "studies" / "full" / "trivia_vs_superglue.yaml")
    assert full.training.tokens == 24_000 * 1024 * 4096
    bases = [entry.base for entry in full.entries if entry.base]
    assert bases == ["mixtral-8x7b", "deepseek-moe-16b", "qwen1.5-moe-a2.7b"]
    assert len(full.models) == 3 * (1 + 2) and len(full.seeds) == 3
