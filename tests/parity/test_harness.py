"""Evaluation: equal to lm-eval's own ``hf`` model sample by sample, and to a loop over tokens written out here."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import zoo
from zoo.cli.main import main
from zoo.harness.lm import ZooLM
from zoo.harness.runner import evaluate, interval, summary_rows, task_manager
from zoo.registry import find_spec
from zoo.tokenizer import Tokenizer
from zoo.training.data.sources import Source
from zoo.training.data.tokenizer_training import train_tokenizer
from zoo.weights import export_checkpoint, import_checkpoint, save_model

TASKS = ["triviaqa", "boolq", "copa", "cb", "sglue_rte", "wic", "wsc"]
TOLERANCE = 1e-4
"""On log-likelihoods, in nats."""


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model with 512 positions, as a zoo checkpoint: some contexts of the tasks are longer."""
    out = tmp_path_factory.mktemp("stories") / "zoo"
    import_checkpoint(shared_data / "models" / "stories260K_hf", out)
    return out


@pytest.fixture(scope="module")
def exported(stories: Path) -> Path:
    export_checkpoint(stories, stories.parent / "hf")
    return stories.parent / "hf"


@pytest.fixture(scope="module")
def lm(stories: Path) -> ZooLM:
    return ZooLM(str(stories), batch_size=4)


@pytest.fixture(scope="module")
def hf(exported: Path) -> HFLM:
    return HFLM(pretrained=str(exported), device="cpu", batch_size=4)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def run(lm: ZooLM | HFLM, mirror: Path, limit: int, tasks: list[str] = TASKS, **settings: Any) -> dict[str, Any]:
    manager = task_manager(tasks, None, mirror)
    return lm_eval.simple_evaluate(
        lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, **settings
    )


def assert_equal_samples(ours: dict[str, Any], theirs: dict[str, Any], limit: int) -> None:
    assert list(ours["samples"]) == list(theirs["samples"])
    for task, samples in ours["samples"].items():
        expected = theirs["samples"][task]
        assert len(samples) == len(expected) == min(limit, ours["n-samples"][task]["original"])
        for mine, other in zip(samples, expected, strict=True):
            where = f"{task} {mine['doc_id']}"
            assert mine["doc_hash"] == other["doc_hash"], where
            assert mine["arguments"] == other["arguments"], where
            if task == "triviaqa":
                assert mine["resps"] == other["resps"], where
                continue
            for [(log_prob, greedy)], [(their_log_prob, their_greedy)] in zip(
                mine["resps"], other["resps"], strict=True
            ):
                assert log_prob == pytest.approx(their_log_prob, abs=TOLERANCE), where
                assert greedy == their_greedy, where


@pytest.mark.parametrize(
    ("limit", "num_fewshot"),
    [(12, None), (4, 2), pytest.param(150, None, marks=pytest.mark.slow)],
    ids=["12", "4-two-shot", "150"],
)
def test_seven_tasks_score_as_lm_evals_hf_model_scores_the_export(
    lm: ZooLM, hf: HFLM, shared_data: Path, limit: int, num_fewshot: int | None
) -> None:
    mirror, truncated = shared_data / "hub", lm.num_truncated
    ours = run(lm, mirror, limit, num_fewshot=num_fewshot)
    assert_equal_samples(ours, run(hf, mirror, limit, num_fewshot=num_fewshot), limit)
    assert lm.num_truncated > truncated, "no context was longer than the model's positions: truncation was not tested"


def test_a_sparse_model_with_a_tokenizer_of_ours_scores_as_its_export(shared_data: Path, tmp_path: Path) -> None:
    source = Source(str(shared_data / "text" / "tinystories_sample.txt"))
    tokenizer = train_tokenizer([source], 500, tmp_path / "tokenizer")
    spec = find_spec("mixtral-tiny")
    spec = replace(spec, model=replace(spec.model, vocab_size=tokenizer.vocab_size, max_position_embeddings=512))
    model = zoo.build(spec.model, seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # as built, all logits are nearly equal
    save_model(model, spec, tmp_path / "zoo", tmp_path / "tokenizer")
    export_checkpoint(tmp_path / "zoo", tmp_path / "hf")
    ours = ZooLM(str(tmp_path / "zoo"), batch_size=4)
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", batch_size=4)
    # No triviaqa: random weights write bytes that are no UTF-8, and the two libraries show those differently.
    mirror, tasks = shared_data / "hub", ["copa", "cb", "wic"]
    assert_equal_samples(run(ours, mirror, 10, tasks), run(theirs, mirror, 10, tasks), 10)


def test_scores_do_not_depend_on_the_batch_size(lm: ZooLM, shared_data: Path) -> None:
    alone = ZooLM(lm.model, lm.tokenizer, batch_size=1)
    many = ZooLM(lm.model, lm.tokenizer, batch_size=32)
    assert_equal_samples(run(many, shared_data / "hub", 5), run(alone, shared_data / "hub", 5), 5)


def test_the_same_seed_writes_the_same_files_apart_from_times(lm: ZooLM, shared_data: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        evaluate(
            lm.model,
            lm.tokenizer,
            ["copa"],
            data_root=shared_data / "hub",
            limit=5,
            num_fewshot=1,
            seed=3,
            output=tmp_path / name,
        )
    first, second = (next((tmp_path / name).glob("results_*.json")) for name in ("first", "second"))
    # The hash is that of the checkout, which someone may commit to meanwhile.
    times = {"date", "start_time", "end_time", "total_evaluation_time_seconds", "git_hash"}
    mine, other = (
        {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key not in times}
        for path in (first, second)
    )
    assert mine == other
    samples = [path.read_bytes() for path in sorted(tmp_path.rglob("samples_copa_*.jsonl"))]
    assert len(samples) == 2 and samples[0] == samples[1]


# The model's own methods ---------------------------------------------------------------------------------------


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def token_by_token(lm: ZooLM, tokens: list[int], first: int) -> tuple[float, bool]:
    """Log-probability of ``tokens[first:]``, each from a forward over all tokens before it."""
    total, greedy = 0.0, True
    with torch.no_grad():
        for end in range(first, len(tokens)):
            scores = lm.model(torch.tensor([tokens[:end]])).logits[0, -1].double().log_softmax(-1)
            total += float(scores[tokens[end]])
            greedy &= int(scores.argmax()) == tokens[end]
    return total, greedy


def test_loglikelihood_equals_a_loop_over_tokens(lm: ZooLM) -> None:
    pairs = [
        ("Once upon a time, there was a", " little girl"),
        ("Once upon a time, there was a", " big red ball"),
        ("Lily said:", " yes"),
        ("", "The dog ran."),
        ("The sun was ", "hot"),
    ]
    results = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (log_prob, greedy) in zip(pairs, results, strict=True):
        whole = lm.tokenizer.encode(context + continuation, bos=True)
        expected, is_greedy = token_by_token(lm, whole, len(lm.tokenizer.encode(context.rstrip(), bos=True)))
        assert log_prob == pytest.approx(expected, abs=TOLERANCE)
        assert greedy == is_greedy
    assert results[0][1] and not results[2][1], "one continuation should be the greedy one, and one not"


def test_odd_texts_are_tokenised_as_by_lm_evals_hf_model(lm: ZooLM, hf: HFLM) -> None:
    """Spaces at the end of a context, no context, BOS spelled out, and one text as context and as whole."""
    pairs = [
        ("", "The dog"),
        ("The dog ran \n\n ", " and ran"),
        ("The", " dog ran"),
        ("The dog", " ran"),
        ("The dog ran", " and"),
        ("<s>The dog", " ran"),
    ]
    requests = [request("loglikelihood", *pair) for pair in pairs]
    ours = lm.loglikelihood(requests, disable_tqdm=True)
    # One by one: lm-eval 0.4.13 mixes up requests that cut one text in different places.
    theirs = [hf.loglikelihood([one], disable_tqdm=True)[0] for one in requests]
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-3)


def test_rolling_loglikelihood_predicts_every_token_once(lm: ZooLM, hf: HFLM, shared_data: Path) -> None:
    text = (shared_data / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")
    texts = [text[:150], text[:3000], text[500:2500]]
    requests = [request("loglikelihood_rolling", part) for part in texts]
    ours = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours == pytest.approx(hf.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-3)
    bos = lm.prefix_token_id
    assert ours[0] == pytest.approx(token_by_token(lm, [bos, *lm.tok_encode(texts[0])], 1)[0], abs=TOLERANCE)
    assert len(lm.tok_encode(texts[1])) > 2 * lm.max_length, "the second text should need several windows"


@pytest.mark.parametrize("until", [["\n"], ["friend", "park. "], [" "], []])
def test_continuations_end_before_the_first_stop_sequence(lm: ZooLM, hf: HFLM, until: list[str]) -> None:
    settings = {"until": until, "max_gen_toks": 40, "do_sample": False}
    prompts = ["Once upon a time", "Lily had a dog. The dog", "Tom", "One day, a bird saw a big red"]
    requests = [request("generate_until", prompt, dict(settings)) for prompt in prompts]
    ours = lm.generate_until(requests, disable_tqdm=True)
    assert ours == hf.generate_until(requests, disable_tqdm=True)
    assert not any(stop in text for stop in until for text in ours)


def test_each_task_generates_by_its_own_settings(lm: ZooLM) -> None:
    lengths = [3, 9, 3, 1]
    requests = [
        request("generate_until", "Once upon a time", {"until": ["zzz"], "max_gen_toks": length}) for length in lengths
    ]
    texts = lm.generate_until(requests, disable_tqdm=True)
    assert texts[0] == texts[2]
    assert len(texts[1]) > len(texts[0]) > len(texts[3])
    assert texts[1].startswith(texts[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_gen_toks": 512}, "max_gen_toks = 512 leaves no room"), ({"num_beams": 4}, "'num_beams' is not supported")],
)
def test_settings_that_cannot_be_met_are_refused(lm: ZooLM, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lm.generate_until([request("generate_until", "Once", {"until": ["\n"], **settings})], disable_tqdm=True)


# The runner ----------------------------------------------------------------------------------------------------


def test_results_are_written_offline_in_lm_evals_layout(
    lm: ZooLM, shared_data: Path, tmp_path: Path, no_network: None
) -> None:
    results = evaluate(
        lm.model, lm.tokenizer, ["copa", "cb"], data_root=shared_data / "hub", limit=6, output=tmp_path, seed=5
    )
    [path] = tmp_path.glob("results_*.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["results"]["copa"]["acc,none"] == results["results"]["copa"]["acc,none"]
    assert written["config"]["fewshot_seed"] == 5
    assert set(written["task_hashes"]) == {"copa", "cb"}
    [samples] = tmp_path.glob("samples_copa_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert [line["doc_id"] for line in lines] == list(range(6))
    assert lines[0]["arguments"]["gen_args_1"]["arg_0"].endswith(" therefore")
    assert sum(line["acc"] for line in lines) / 6 == results["results"]["copa"]["acc,none"]
    assert {row["task"] for row in summary_rows(results)} == {"copa", "cb"}


def test_a_failed_write_leaves_no_half_file(
    lm: ZooLM, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(lm.model, lm.tokenizer, ["copa"], data_root=shared_data / "hub", limit=2, output=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tasks", "data_root", "message"),
    [
        (["bolq"], None, "unknown task 'bolq'; did you mean 'boolq'"),
        ([], None, "no tasks"),
        (["copa"], "", r"task 'copa' .* its data set 'aps/super_glue' .* looked for .*/aps/super_glue"),
        (["copa"], "nowhere", "data_root = .*nowhere: no such directory"),
    ],
)
def test_mistakes_are_named(lm: ZooLM, tmp_path: Path, tasks: list[str], data_root: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(lm.model, lm.tokenizer, tasks, data_root=None if data_root is None else tmp_path / data_root)


def test_a_configuration_that_the_mirror_lacks_is_named(lm: ZooLM, tmp_path: Path) -> None:
    directory = tmp_path / "aps" / "super_glue"
    directory.mkdir(parents=True)
    (directory / "validation.jsonl").write_text('{"premise": "x"}\n')
    with pytest.raises(ValueError, match=r"task 'copa' with data from .*: .*'copa' not found"):
        evaluate(lm.model, lm.tokenizer, ["copa"], data_root=tmp_path)


def test_tasks_of_a_folder_read_the_mirror_too(lm: ZooLM, tmp_path: Path) -> None:
    tasks, data = tmp_path / "tasks", tmp_path / "mirror" / "me" / "colours"
    tasks.mkdir()
    data.mkdir(parents=True)
    (tasks / "colours.yaml").write_text(
        "task: colours\ndataset_path: me/colours\noutput_type: multiple_choice\nvalidation_split: validation\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: label\ndoc_to_choice: ["red", "blue"]\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    rows = [{"text": "The ball is", "label": 0}, {"text": "The sky is", "label": 1}]
    (data / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = evaluate(lm.model, lm.tokenizer, ["colours"], data_root=tmp_path / "mirror", include_path=tasks)
    assert results["n-samples"]["colours"] == {"original": 2, "effective": 2}


def test_interval_of_a_proportion_is_wilsons() -> None:
    # Hand-computed: 8 of 10, and none of 20.
    assert interval(0.8, (0.8 * 0.2 / 9) ** 0.5, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert interval(0.0, 0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert interval(0.3, 0.05, 10) == pytest.approx((0.3 - 1.96 * 0.05, 0.3 + 1.96 * 0.05), abs=1e-4)


# The command lines ---------------------------------------------------------------------------------------------


def test_zoo_eval_prints_json(stories: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        ["eval", str(stories), "--tasks", "copa", "--limit", "4", "--data-root", str(shared_data / "hub"), "--json"]
    )
    [row] = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (row["task"], row["metric"], row["documents"]) == ("copa", "acc", 4)
    assert row["interval"][0] <= row["value"] <= row["interval"][1]


def test_zoo_generate_streams_the_text(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(stories), "--prompt", "Once upon a time, there was a", "--max-new-tokens", "30"]
    assert main(arguments) == 0
    streamed = capsys.readouterr()
    assert "new tokens/s" in streamed.err
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] + "\n" == streamed.out
    tokenizer = Tokenizer.load(stories)
    [tokens] = zoo.generate(
        zoo.load(stories), [tokenizer.encode(arguments[3], bos=True)], max_new_tokens=30, eos_id=tokenizer.eos_id
    )
    assert result["tokens"] == tokens


@pytest.mark.slow
def test_lm_evals_own_command_line_knows_the_model(stories: Path, shared_data: Path, repository: Path) -> None:
    command = [sys.executable, "-m", "zoo.harness", "run", "--model", "zoo", "--model_args", f"pretrained={stories}"]
    done = subprocess.run(
        [*command, "--tasks", "copa", "--limit", "4"],
        cwd=shared_data / "hub",
        env={"PYTHONPATH": str(repository), "HOME": str(stories.parent), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "|copa" in done.stdout
