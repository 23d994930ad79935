"""``zoo release`` on the directory of a small study, whose models were never trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import zoo
from zoo.cli.main import main
from zoo.config import ModelConfig, ModelSpec, load_spec
from zoo.config_reading import from_dict, to_dict
from zoo.harness import facts, release
from zoo.harness.measure import item_scores, validate
from zoo.harness.measurement import EVALUATION_BATCH
from zoo.harness.runner import evaluate
from zoo.harness.study import load_study
from zoo.registry import RELEASE_FILE, find_spec
from zoo.tokenizer import Tokenizer
from zoo.training.data.builder import build
from zoo.training.data.sources import Source
from zoo.training.data.tokenizer_training import train_tokenizer
from zoo.weights import load, save_model

STUDY = """
name: tiny
data:
  facts: {cities: 20, statements_per_fact: 2, questions_per_fact: 2, passages: 80, items: 8}
  vocab_size: 512
training: {steps: 4, batch_size: 2, sequence_length: 32}
models:
  - {name: sparse, base: deepseek-v3-tiny}
  - {name: dense, base: llama-tiny}
tasks:
  knowledge: [facts_knowledge]
  comprehension: [facts_boolq, facts_copa, facts_rte]
seeds: [3]
"""

TASKS = ("facts_knowledge", "facts_boolq", "facts_copa", "facts_rte")

SMALL = {
    "sparse": {
        "hidden_size": 32,
        "num_layers": 2,
        "intermediate_size": 64,
        "mla": {
            "num_heads": 2,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
        "moe": {"num_experts": 8, "moe_intermediate_size": 16},
    },
    "dense": {"hidden_size": 32, "num_layers": 1, "intermediate_size": 48},
}


def small(base: str, changes: dict[str, object]) -> ModelConfig:
    """The model of ``base`` with 512 pieces and other sizes."""
    config = to_dict(find_spec(base).model) | {"vocab_size": 512}
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    return from_dict(ModelConfig, config, base)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study as ``zoo compare`` leaves it, with weights as they were drawn."""
    directory = tmp_path_factory.mktemp("study")
    (directory / "study.yaml").write_text(STUDY, encoding="utf-8")
    (directory / "report.json").write_text('{"command": "zoo compare tiny.yaml"}', encoding="utf-8")
    config = load_study(directory / "study.yaml")
    assert config.data.facts is not None
    facts.write(config.data.facts, directory / "facts")
    text, held_out = (Source(str(directory / "facts" / f"{split}.jsonl")) for split in ("train", "validation"))
    tokenizer = train_tokenizer([text], 512, directory / "tokenizer")
    build([text], tokenizer, directory / "data", validation_sources=[held_out])
    for name, base, family in (("sparse", "deepseek-v3-tiny", "deepseek_v3"), ("dense", "llama-tiny", "llama")):
        run = directory / "models" / f"{name}-seed3"
        spec = ModelSpec(name=name, family=family, model=small(base, SMALL[name]))
        model = zoo.build(spec.model, seed=1)
        for buffer in model.buffers():  # a selection bias that bf16 would round
            buffer += torch.rand_like(buffer) / 1000
        save_model(model, spec, run / "fit" / "final", directory / "tokenizer")
        starts = [{"git": {"commit": "c0ffee", "dirty": dirty}} for dirty in (False, False, True)]
        (run / "fit" / "run.json").write_text(json.dumps({"starts": starts}), encoding="utf-8")
        results = evaluate(model.eval(), tokenizer, TASKS, data_root=directory / "facts" / "hub", batch_size=64, seed=3)
        measured = {
            "scores": {task: item_scores(results, task) for task in TASKS},
            **validate(model, directory / "data", 32, 2),
        }
        (run / "measured").mkdir()
        (run / "measured" / "step-00000004.json").write_text(json.dumps(measured), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def released(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory whose ``checkpoints`` hold the sparse model in bf16 and the dense one in fp32."""
    directory = tmp_path_factory.mktemp("here")
    for model, dtype in (("sparse", "bfloat16"), ("dense", "float32")):
        out = directory / "checkpoints" / f"my-{model}"
        assert main(["release", str(study), model, "--seed", "3", "--dtype", dtype, "--to", str(out)]) == 0
    return directory


def record(directory: Path) -> dict:
    return json.loads((directory / RELEASE_FILE).read_text(encoding="utf-8"))


def test_weights_are_those_of_the_study_in_the_dtype_asked_for(study: Path, released: Path) -> None:
    for model, dtype in (("sparse", torch.bfloat16), ("dense", torch.float32)):
        before = load_file(study / "models" / f"{model}-seed3" / "fit" / "final" / "model.safetensors")
        after = load_file(released / "checkpoints" / f"my-{model}" / "model.safetensors")
        assert before.keys() == after.keys()
        buffers = [name for name in before if name.endswith(".bias")]
        assert len(buffers) == (1 if model == "sparse" else 0)
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor if name in buffers else tensor.to(dtype)), name
    spec = load_spec(released / "checkpoints" / "my-sparse" / "zoo.yaml")
    assert (spec.name, spec.family) == ("my-sparse", "deepseek_v3")


def test_scores_are_those_of_the_stored_weights(study: Path, released: Path) -> None:
    for model in ("sparse", "dense"):
        directory = released / "checkpoints" / f"my-{model}"
        results = evaluate(
            load(directory),
            Tokenizer.load(directory),
            TASKS,
            data_root=study / "facts" / "hub",
            batch_size=EVALUATION_BATCH,
            seed=3,
        )
        for task in TASKS:
            scores = list(item_scores(results, task).values())
            assert record(directory)["right"][task] == "".join(str(int(score)) for score in scores)
            assert record(directory)["scores"][task]["value"] == pytest.approx(sum(scores) / len(scores), abs=1e-12)


def test_fp32_weights_have_the_scores_that_the_study_measured(study: Path, released: Path) -> None:
    measured = json.loads((study / "models/dense-seed3/measured/step-00000004.json").read_text(encoding="utf-8"))
    dense = record(released / "checkpoints" / "my-dense")
    assert dense["validation_loss"] == measured["validation_loss"]
    assert {name: score["value"] for name, score in dense["scores"].items()} == dense["study_scores"]
    for task, scores in measured["scores"].items():
        assert dense["study_scores"][task] == pytest.approx(sum(scores.values()) / len(scores), abs=1e-12)
    knowledge, boolq = (dense["scores"][task] for task in ("facts_knowledge", "facts_boolq"))
    assert knowledge["guess"] == facts.guess_rates(study / "facts")["facts_knowledge"]
    assert boolq["items"] == 8 and boolq["guess"] == 0.5
    assert boolq["low"] <= boolq["value"] <= boolq["high"]


def test_the_card_is_a_model_card_of_the_hub(released: Path) -> None:
    for model in ("sparse", "dense"):
        directory = released / "checkpoints" / f"my-{model}"
        made = record(directory)
        card = ModelCard.load(directory / "README.md")
        assert (card.data.license, card.data.library_name, card.data.model_name) == (
            "apache-2.0",
            "moe-zoo",
            f"my-{model}",
        )
        shown = {result.dataset_name: result.metric_value for result in card.data.eval_results}
        assert shown == {task: round(100 * made["scores"][task]["value"], 2) for task in TASKS}
        for said in ("cc-by-4.0", "GeoNames", "zoo compare tiny.yaml", "c0ffee, c0ffee with changes", "seed 3"):
            assert said in card.text, said
        assert ("expert-load.png" in card.text) == (directory / "expert-load.png").is_file() == (model == "sparse")
    assert (released / "checkpoints" / "my-sparse" / "expert-load.png").read_bytes().startswith(b"\x89PNG")


def test_released_models_run_under_their_name(
    released: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(released)
    sample = record(Path("checkpoints/my-sparse"))["sample"]
    command = ["generate", "my-sparse", "--max-new-tokens", str(sample["tokens"]), "--prompt", sample["prompt"]]
    for _ in range(2):
        assert main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == sample["text"]
    assert main(["card", "my-dense", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert main(["list", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["checkpoints"]}
    assert listed["my-dense"]["total"] == card["parameters"]["total"]
    assert listed["my-dense"]["scores"] == record(Path("checkpoints/my-dense"))["scores"]
    assert main(["generate", "my-spars", "--prompt", "a"]) == 2
    assert "'my-spars': no such model, file or directory; did you mean 'my-sparse'?" in capsys.readouterr().err


def test_training_goes_on_from_the_weights_of_a_name(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.training.module import ZooModule

    monkeypatch.chdir(released)
    module = ZooModule("my-dense")
    assert module.checkpoint is not None
    assert module.checkpoint.resolve() == (released / "checkpoints" / "my-dense").resolve()
    with pytest.raises(ValueError, match="the weights in my-dense fix the model"):
        ZooModule("my-dense", overrides={"num_layers": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "--seed", "3"], "no absent-seed3; its runs are dense-seed3, sparse-seed3"),
        (["dense"], "no dense-seed0; its runs are"),
        (["dense", "--seed", "3", "--dtype", "float16"], "dtype = 'float16': use one of bfloat16, float32"),
    ],
)
def test_what_is_not_in_the_study_is_refused(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["release", str(study), *arguments, "--to", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_and_places_that_are_taken_are_refused(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine", encoding="utf-8")
    for name, message in (("taken", "already exists"), ("mixtral-tiny", "none of configs/models"), ("A b", "its name")):
        assert main(["release", str(study), "dense", "--seed", "3", "--to", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert (taken / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_what_is_too_large_leaves_nothing(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "MAX_BYTES", 50_000)
    assert main(["release", str(study), "dense", "--seed", "3", "--to", str(tmp_path / "large")]) == 2
    assert "large: 0.2 MB; a checkpoint of the zoo has at most" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_finished_studies_of_known_licence_are_released(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    command = ["release", str(other), "dense", "--seed", "3", "--to", str(tmp_path / "out")]
    own_text = STUDY.replace(STUDY.splitlines()[3], "  sources: [books.txt]")
    for name, content, message in (
        ("study.yaml", own_text, "no study.yaml; give the directory of a finished"),
        ("report.json", "{}", "no report.json; give the directory of a finished"),
        ("done", "", "trained on sources"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
        (other / name).write_text(content, encoding="utf-8")
