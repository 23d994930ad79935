"""The zoo's own checkpoints are whole, small, and do what their cards say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from zoo.accounting import count_parameters
from zoo.cli.main import main
from zoo.config import load_spec
from zoo.harness.release import MAX_BYTES
from zoo.registry import RELEASE_FILE, find_spec, model_names
from zoo.weights import load

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"

NAMES = ("facts-deepseek-moe", "facts-dense", "facts-mixtral", "facts-qwen3-moe")

LIMIT = 12
"""Items of each task that are evaluated again."""


def record(name: str) -> dict[str, Any]:
    return json.loads((CHECKPOINTS / name / RELEASE_FILE).read_text(encoding="utf-8"))


def test_there_is_one_of_each_kind() -> None:
    assert sorted(path.parent.name for path in CHECKPOINTS.glob(f"*/{RELEASE_FILE}")) == list(NAMES)
    assert [record(name)["family"] for name in NAMES] == ["deepseek_moe", "llama", "mixtral", "qwen3_moe"]
    assert not set(NAMES) & set(model_names())


def test_all_are_small_and_of_one_study() -> None:
    sizes = [sum(path.stat().st_size for path in (CHECKPOINTS / name).iterdir()) for name in NAMES]
    assert max(sizes) < MAX_BYTES and sum(sizes) < 2 * MAX_BYTES
    records = [record(name) for name in NAMES]
    for key in ("study", "seed", "tokens", "data", "training"):
        assert all(made[key] == records[0][key] for made in records), key
    active = [count_parameters(find_spec(name).model).active for name in NAMES]
    assert max(active) < 1.02 * min(active)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_whole_and_what_its_card_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    directory, made = CHECKPOINTS / name, record(name)
    assert main(["verify", str(directory), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hashed"] == 1
    model = load(directory, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == made["parameters"]["total"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert load_spec(directory / "zoo.yaml").name == name
    card = ModelCard.load(directory / "README.md")
    shown = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert shown == {task: round(100 * made["scores"][task]["value"], 2) for task in made["metrics"]}
    assert (directory / "expert-load.png").is_file() == ("expert-load.png" in card.text) == bool(made["expert_load"])
    for task, right in made["right"].items():
        assert made["scores"][task]["value"] == pytest.approx(right.count("1") / len(right), abs=1e-12)
        assert made["scores"][task]["items"] == len(right)


@pytest.mark.parametrize("name", NAMES)
def test_it_answers_the_items_that_its_card_says(name: str, tmp_path: Path) -> None:
    """From its name alone: the questions come with the tasks."""
    made = record(name)
    tasks = ",".join(made["metrics"])
    assert main(["eval", name, "--tasks", tasks, "--limit", str(LIMIT), "--output", str(tmp_path)]) == 0
    for task, metric in made["metrics"].items():
        [path] = tmp_path.glob(f"samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        right = {sample["doc_id"]: f"{sample[metric]:.0f}" for sample in samples}
        assert right == dict(enumerate(made["right"][task][:LIMIT]))


@pytest.mark.parametrize("name", NAMES)
def test_it_continues_a_prompt_as_its_card_shows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    sample = record(name)["sample"]
    command = ["generate", name, "--prompt", sample["prompt"], "--max-new-tokens", str(sample["tokens"]), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["text"] == sample["text"]
