"""One checkpoint by `zoo eval`, by lm-eval's command with our model, and its export by `hf`: the same scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM

from zoo.harness.lm import ZooLM
from zoo.harness.runner import task_manager
from zoo.registry import evaluation_dir
from zoo.weights import export_checkpoint, import_checkpoint

TASKS = {
    "knowledge": ["triviaqa_full_answer", "facts_knowledge", "phone_book"],
    "comprehension": ["superglue_cb", "superglue_multirc", "superglue_record", "facts_rte", "shortest_path"],
}
TOLERANCE = 1e-4
"""On log-likelihoods, in nats."""
SUM_TOLERANCE = 5e-7
"""Of a log-likelihood: lm-eval's model sums in fp32, whose neighbours at -587 (ReCoRD) are 6e-5 apart."""


@pytest.fixture(scope="module", params=["dense", pytest.param("sparse", marks=pytest.mark.slow)])
def checkpoint(
    request: pytest.FixtureRequest, shared_data: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A trained model of either kind, each with fewer positions than some passages have tokens."""
    if request.param == "sparse":
        return repository / "checkpoints" / "facts-mixtral"
    out = tmp_path_factory.mktemp("stories") / "zoo"
    import_checkpoint(shared_data / "models" / "stories260K_hf", out)
    return out


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "hf"
    export_checkpoint(checkpoint, out)
    return out


def assert_equal_responses(mine: Any, other: Any, where: str) -> None:
    """``resps`` of one document: a text, or log-likelihood and greediness of each choice."""
    assert len(mine) == len(other), where
    for [ours], [theirs] in zip(mine, other, strict=True):
        if isinstance(ours, str):
            assert ours == theirs, where
        else:
            assert float(ours[0]) == pytest.approx(float(theirs[0]), abs=TOLERANCE, rel=SUM_TOLERANCE), where
            assert str(ours[1]) == str(theirs[1]), where


@pytest.mark.parametrize("suite", TASKS)
def test_suites_score_as_lm_evals_hf_model_scores_the_export(
    suite: str, checkpoint: Path, exported: Path, shared_data: Path
) -> None:
    def run(lm: Any) -> dict[str, Any]:
        manager = task_manager(TASKS[suite], None, shared_data / "hub")
        return lm_eval.simple_evaluate(lm, tasks=TASKS[suite], task_manager=manager, limit=6, bootstrap_iters=0)

    ours = run(ZooLM(str(checkpoint), batch_size=4))
    theirs = run(HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=4))
    for task in TASKS[suite]:
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            where = f"{task} {mine['doc_id']}"
            assert (mine["doc_hash"], mine["arguments"]) == (other["doc_hash"], other["arguments"]), where
            assert_equal_responses(mine["resps"], other["resps"], where)
    assert ours["results"] == theirs["results"]


@pytest.mark.slow
def test_three_commands_write_the_same_samples(
    checkpoint: Path, exported: Path, shared_data: Path, repository: Path, tmp_path: Path
) -> None:
    hub, tasks = shared_data / "hub", "triviaqa_full_answer,phone_book,superglue_multirc,shortest_path"
    lm_eval_run = ["lm_eval", "run", "--include_path", str(evaluation_dir()), "--log_samples", "--device", "cpu"]
    ours = ["--model", "zoo", "--model_args", f"pretrained={checkpoint}"]
    # The sparse checkpoint is in bf16, in which lm-eval's model would compute by default.
    theirs = ["--model", "hf", "--model_args", f"pretrained={exported},dtype=float32"]
    register = repository / "zoo" / "harness" / "lm.yaml"
    commands = {
        "zoo-eval": ["zoo.cli.main", "eval", str(checkpoint), "--data-root", str(hub), "--tasks", tasks, "--output"],
        "zoo": [*lm_eval_run, *ours, "--tasks", f"{register},{tasks}", "--output_path"],
        "hf": [*lm_eval_run, *theirs, "--tasks", tasks, "--output_path"],
    }
    samples = {}
    for name, command in commands.items():
        done = subprocess.run(
            [sys.executable, "-m", *command, str(tmp_path / name), "--limit", "5"],
            cwd=hub,  # where lm-eval finds its data sets
            env={**os.environ, "PYTHONPATH": str(repository), "HF_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        samples[name] = {
            (task, sample["doc_hash"]): sample
            for task in tasks.split(",")
            for path in (tmp_path / name).rglob(f"samples_{task}_2*.jsonl")
            for sample in map(json.loads, path.read_text(encoding="utf-8").splitlines())
        }
    assert set(samples["zoo-eval"]) == set(samples["zoo"]) == set(samples["hf"])
    assert len(samples["zoo"]) == 4 * 5
    for key, sample in samples["zoo-eval"].items():
        for other in (samples["zoo"][key], samples["hf"][key]):
            assert sample["arguments"] == other["arguments"], key
            assert_equal_responses(sample["resps"], other["resps"], str(key))
            metrics = set(sample["metrics"])
            assert {metric: sample[metric] for metric in metrics} == {metric: other[metric] for metric in metrics}, key
