"""The subjects of ``zoo bench`` on models so small that they only show that all ways compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zoo.bench import attention, load, train
from zoo.bench.eval import Case, measured, models, recorded
from zoo.bench.peers import check_equal, exported, in_transformers
from zoo.bench.rows import LIMIT, OURS, Options
from zoo.bench.run import cases
from zoo.cli.bench import subjects
from zoo.config import ModelSpec
from zoo.model import build
from zoo.training.data.sources import Source
from zoo.training.data.tokenizer_training import train_tokenizer

OPTIONS = Options(rounds=1)


def small(spec: ModelSpec) -> ModelSpec:
    """A narrow variant of a model of ``train``."""
    moe = spec.model.moe
    assert moe is not None
    moe = replace(moe, num_experts=8, top_k=2, moe_intermediate_size=16)
    sizes = {"hidden_size": 32, "num_layers": 2, "vocab_size": 64, "intermediate_size": 16}
    return replace(spec, model=replace(spec.model, moe=moe, **sizes))


@pytest.mark.parametrize("make", [train.mixtral, train.deepseek, train.qwen], ids=lambda make: make.__name__)
def test_a_training_step_has_the_loss_of_transformers(make: Callable[[], ModelSpec]) -> None:
    row = train.measured(train.Case("small", small(make()), 2, 24), OPTIONS)
    left_out = row.notes["left_out_seconds"]
    peers = {"transformers eager", "transformers batched_mm", "transformers grouped_mm"}
    assert peers <= row.seconds.keys() | left_out.keys()
    assert {OURS, LIMIT} <= row.seconds.keys() and row.bytes.keys() == row.seconds.keys()
    assert row.best_peer is not None and row.best_peer not in left_out
    assert all(size > 0 for size in row.bytes.values())


def test_the_limit_of_a_training_step_has_its_flops() -> None:
    for case in train.cases():
        flops = [train.training_flops(model, case.length) for model in (case.spec.model, train.dense(case).model)]
        assert flops[1] == pytest.approx(flops[0], rel=0.01), case.name


@pytest.mark.parametrize("name", ["MLA", "GQA"])
def test_a_cached_step_has_the_logits_of_transformers(name: str) -> None:
    spec = attention.specs()[name]
    spec = replace(spec, model=replace(spec.model, hidden_size=64))
    ours = build(spec.model).eval()
    with exported(ours, spec) as published:
        theirs = in_transformers(published, OPTIONS)
    row = attention.measured(name, ours, theirs, batch=2, context=12, options=OPTIONS)
    assert row.notes["cache_bytes"] == ours.new_cache(2, 12).bytes
    assert row.seconds.keys() == {OURS, "transformers dynamic cache", "transformers static cache", LIMIT}


def test_the_checkpoint_is_of_the_size_asked_for_and_made_once(tmp_path: Path) -> None:
    options = replace(OPTIONS, cache=tmp_path, checkpoint_bytes=6_000_000)
    place, size = load.made(options)
    assert size == pytest.approx(6_000_000, rel=0.2)
    shards = list((place / "published").glob("*.safetensors"))
    assert len(shards) >= load.SHARDS
    before = {path: path.stat().st_mtime_ns for path in shards}
    assert load.made(options) == (place, size)
    assert {path: path.stat().st_mtime_ns for path in shards} == before


@pytest.mark.parametrize("size", [10**9, 2 * 10**9])
def test_checkpoints_of_full_size_come_near_to_it(size: int) -> None:
    for itemsize in (2, 4):
        assert load.weight_bytes(load.sized(size, itemsize).model, itemsize) == pytest.approx(size, rel=0.06)


@pytest.mark.slow
def test_loading_takes_less_memory_than_transformers_and_gives_its_logits(tmp_path: Path) -> None:
    options = replace(OPTIONS, cache=tmp_path, checkpoint_bytes=250_000_000)
    rows = {row.case: row for row in load.rows(options)}
    assert list(rows) == cases("load", options)
    peak = {name: row.bytes[OURS] / row.notes["weight_bytes"] for name, row in rows.items() if row.bytes}
    assert peak["published layout, load"] < 1.2
    assert rows["published layout, load"].bytes[LIMIT] == pytest.approx(250_000_000, rel=0.3)


@pytest.mark.parametrize("way", ["zoo", "read"])
def test_a_child_reports_what_loading_took(tmp_path: Path, way: str) -> None:
    options = replace(OPTIONS, cache=tmp_path, checkpoint_bytes=20_000_000)
    place, size = load.made(options)
    report = load.child(way, place / "published", options)
    assert report["seconds"] > 0 and report["bytes"] > 0.9 * size
    assert ("first_token" in report) == (way == "zoo")


def test_log_likelihoods_are_those_of_lm_eval(shared_data: Path, tmp_path: Path) -> None:
    requests = recorded("copa", 0, shared_data / "hub")[:4]
    text = shared_data / "text" / "tinystories_sample.txt"
    train_tokenizer([Source(str(text))], 2000, tmp_path / "tokenizer")
    ours, theirs = models("mixtral", tmp_path, OPTIONS)
    row = measured(Case("mixtral", "copa", 0), requests, ours, {8: theirs[8]}, OPTIONS)
    assert row.notes["requests"] == 4
    assert 0 < row.notes["largest_difference"] < 1e-3
    assert row.seconds.keys() == {OURS, "lm-eval hf, batch size 8"}


def test_a_peer_that_computes_something_else_ends_the_benchmark() -> None:
    ours = torch.tensor([0.0, 1.0, 2.0])
    check_equal("a case", "peer", ours, ours + 1e-4, torch.float32)
    with pytest.raises(RuntimeError, match=r"a case: peer differs from ours by 5\.0e-01 of its range"):
        check_equal("a case", "peer", ours, ours + torch.tensor([0.0, 1.0, 0.0]), torch.float32)
    with pytest.raises(RuntimeError, match="nan"):
        check_equal("a case", "peer", ours, ours * torch.nan, torch.float32)


@pytest.mark.parametrize("subject", subjects())
def test_every_subject_lists_its_cases_without_measuring(subject: str) -> None:
    names = cases(subject, OPTIONS)
    assert names and len(set(names)) == len(names)
    assert cases(subject, replace(OPTIONS, cases=(names[-1],)))[-1] == names[-1]
    assert cases(subject, replace(OPTIONS, cases=("no such case",))) == []
