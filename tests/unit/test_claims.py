"""Claims: reading them, planning their runs, measuring, judging, and one from text to verdict."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.claims.board import board, kept
from zoo.claims.claim import Claim, Expectation, claim_files, load_claim
from zoo.claims.measures import DEAD, MEASURES, PROBE_FILE, measure, spikes
from zoo.claims.run import plan
from zoo.claims.verdict import find, judge
from zoo.cli.main import main
from zoo.registry import configs_dir

FOLDER = configs_dir() / "studies" / "claims"


@pytest.fixture(scope="module")
def balancing() -> Claim:
    return load_claim(FOLDER / "balancing.yaml")


# ---------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------


def measures(a: list[float], b: list[float]) -> dict[str, dict[int, dict[str, float]]]:
    return {
        arm: {seed: {"validation_loss": value} for seed, value in enumerate(values)}
        for arm, values in (("a", a), ("b", b))
    }


def expect(**bound: float) -> Expectation:
    return Expectation(measure="validation_loss", contrast={"a": 1, "b": -1}, **bound)


def test_contrast_is_paired_by_seed_with_students_interval() -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.302653, so 2 ± 4.302653 / √3.
    finding = find(expect(at_least=0.0), measures([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]), (0, 1, 2))
    assert finding.by_seed == (1.0, 2.0, 3.0)
    assert finding.estimate.value == pytest.approx(2.0)
    assert finding.estimate.low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-6)
    assert finding.outcome == "open"  # below 0 is not excluded


@pytest.mark.parametrize(
    ("bound", "differences", "outcome"),
    [
        ({"at_least": 0.5}, [1.0, 1.1, 0.9], "seen"),
        ({"at_least": 0.5}, [0.0, 0.1, -0.1], "refuted"),
        ({"at_least": 0.5}, [0.0, 0.5, 1.0], "open"),
        ({"at_most": 0.5}, [0.0, 0.1, -0.1], "seen"),
        ({"at_most": 0.5}, [1.0, 1.1, 0.9], "refuted"),
        ({"within": 0.5}, [0.0, 0.1, -0.1], "seen"),
        ({"within": 0.5}, [1.0, 1.1, 0.9], "refuted"),
        ({"within": 0.5}, [-1.0, -1.1, -0.9], "refuted"),
        ({"within": 0.05}, [0.0, 0.1, -0.1], "open"),
        ({"at_least": 0.0}, [1.0, float("nan"), 1.0], "open"),
        ({"at_least": 0.0}, [0.0, 0.0, 0.0], "open"),
    ],
)
def test_outcome(bound: dict[str, float], differences: list[float], outcome: str) -> None:
    assert find(expect(**bound), measures(differences, [0.0] * 3), (0, 1, 2)).outcome == outcome


def test_logarithm_measures_a_ratio() -> None:
    expectation = Expectation(measure="validation_loss", contrast={"a": 1, "b": -1}, log=True, at_least=0.0)
    finding = find(expectation, measures([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]), (0, 1, 2))
    assert finding.by_seed == pytest.approx([0.693147] * 3)
    with pytest.raises(ValueError, match=r"'b', seed 1: validation_loss = 0\.0 has no logarithm"):
        find(expectation, measures([2.0, 4.0, 6.0], [1.0, 0.0, 3.0]), (0, 1, 2))


@given(
    st.lists(st.floats(-5, 5), min_size=3, max_size=6),
    st.floats(-3, 3),
    st.sampled_from(["at_least", "at_most"]),
)
def test_a_bound_is_never_both_seen_and_refuted_by_its_mirror(values: list[float], bound: float, kind: str) -> None:
    seeds = range(len(values))
    one = find(expect(**{kind: bound}), measures(values, [0.0] * len(values)), seeds).outcome
    other = find(
        expect(**{"at_most" if kind == "at_least" else "at_least": -bound}),
        measures([-value for value in values], [0.0] * len(values)),
        seeds,
    ).outcome
    assert one == other


def test_verdict_needs_all_expectations_and_the_conditions(balancing: Claim) -> None:
    def judged(given_: list[float], first: list[float], second: list[float]) -> str:
        found = {
            "balanced": {s: {"load_entropy": v, "dead_experts": 0.0} for s, v in enumerate(first)},
            "unbalanced": {
                s: {"load_entropy": 0.0, "dead_experts": v, "spikes": g}
                for s, (v, g) in enumerate(zip(second, given_, strict=True))
            },
        }
        condition = Expectation(measure="spikes", contrast={"unbalanced": 1}, at_least=1.0)
        return judge(replace(balancing, given=(condition,), seeds=(0, 1, 2)), found)[0]

    yes, no = [1.0, 1.01, 1.02], [0.0, 0.01, 0.02]
    assert judged([2.0, 2.1, 2.2], yes, yes) == "holds here"
    assert judged([2.0, 2.1, 2.2], yes, no) == "does not hold here"
    assert judged([2.0, 2.1, 2.2], yes, [0.0, 0.1, 0.5]) == "not decidable at this size"
    assert judged([0.0, 0.1, 0.2], yes, yes) == "not decidable at this size"


# ---------------------------------------------------------------------------------------------------------------
# Claims and their runs
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", claim_files(FOLDER), ids=lambda path: path.stem)
@pytest.mark.parametrize("smoke", [False, True])
def test_every_claim_of_the_zoo_can_be_planned(path: Path, smoke: bool, tmp_path: Path) -> None:
    claim = load_claim(path, smoke)
    assert claim.name == path.stem
    assert len(claim.seeds) >= 3
    runs = plan(claim, tmp_path)
    assert set(runs) == set(claim.arms)
    used = {arm for e in (*claim.expect, *claim.given) for arm in e.contrast}
    started_from = {arm.start.of for arm in claim.arms.values() if arm.start}
    assert used | started_from == set(claim.arms), "an arm that nothing uses"


def test_arms_that_are_trained_alike_are_one_run(balancing: Claim, tmp_path: Path) -> None:
    fine = load_claim(FOLDER / "fine_grained.yaml")
    one, other = plan(balancing, tmp_path)["balanced"][0], plan(fine, tmp_path)["coarse"][0]
    assert one.directory == other.directory
    assert one.fit == other.fit
    directories = {run.directory for arms in plan(fine, tmp_path).values() for run in arms.values()}
    assert len(directories) == 3 * len(fine.seeds)


def test_sources_may_be_replaced(tmp_path: Path) -> None:
    claim = load_claim(FOLDER / "balancing.yaml", sources={"general": ["a.txt", "b.txt"]})
    assert claim.texts["general"].sources == ("a.txt", "b.txt")
    with pytest.raises(ValueError, match=r"--text other=….*no such text; it has general, small, domain"):
        load_claim(FOLDER / "balancing.yaml", sources={"other": ["a.txt"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seeds: [0, 1]", "give at least 3"),
        ("arms: {balanced: {}}", "give exactly one of the two"),
        ("arms: {balanced: {model: other}}", "model = 'other': use one of"),
        ("arms: {balanced: {model: coarse, text: other}}", "text = 'other': use one of general, small, domain"),
        ("expect: []", "say what would have to be seen"),
        ("expect: [{measure: speed, contrast: {balanced: 1}, at_least: 0}]", "'speed': use one of validation_loss"),
        ("expect: [{measure: spikes, contrast: {other: 1}, at_least: 0}]", "'other' is no arm"),
        ("expect: [{measure: spikes, contrast: {balanced: 1}}]", "give exactly one of at_least"),
        ("expect: [{measure: spikes, contrast: {balanced: 1}, within: 0.0}]", "give the positive distance"),
        (
            "arms: {a: {start: {of: b}}, b: {start: {of: a}}, balanced: {model: coarse}, unbalanced: {model: coarse}}",
            "arms a, b: they start from each other",
        ),
    ],
)
def test_mistakes_in_a_claim(change: str, message: str, tmp_path: Path) -> None:
    text = (FOLDER / "balancing.yaml").read_text(encoding="utf-8")
    (tmp_path / "common.yaml").write_text((FOLDER / "common.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    path = tmp_path / "wrong.yaml"
    key = change.partition(":")[0]
    lines = text.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if line.startswith(f"{key}:")), len(lines))
    end = next((i for i in range(start + 1, len(lines)) if lines[i][0].isalpha()), len(lines))
    path.write_text("".join([*lines[:start], change + "\n", *lines[end:]]), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_claim(path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------


def test_spikes_by_hand() -> None:
    calm = [3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4]
    assert spikes(calm) == 0
    assert spikes([*calm, 3.3, 2.4, 2.3]) == 1  # the median of the seven before is 2.7
    assert spikes([*calm, 3.2, 2.4, 2.3]) == 0
    assert spikes([9.0, 2.0, 9.0]) == 0  # the first ones have too few before them


def test_measures_of_a_run_by_hand(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "train/lm_loss": 4.0, "train/skipped_steps": 0, "train/z_loss": 2.0},
        {"step": 2, "train/lm_loss": 3.0, "train/skipped_steps": 1, "train/z_loss": 4.0},
        {"step": 2, "val/loss": 3.0},
        {"step": 3, "train/lm_loss": 2.0, "train/skipped_steps": 1, "train/z_loss": 5.0},
        {"step": 4, "train/lm_loss": 1.0, "train/skipped_steps": 2, "train/z_loss": 6.0},
        {"step": 4, "val/loss": 3.5},
    ]
    for layer, entropy in ((1, 0.5), (2, 0.7)):
        rows[4] |= {f"router/layer_{layer}/entropy": entropy, f"router/layer_{layer}/max_over_mean": 2 * entropy}
    with (tmp_path / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / PROBE_FILE).write_text(json.dumps({"step_seconds": 0.5, "memory": 100.0}), encoding="utf-8")
    load = {"1": [0.5, 0.46, 0.03, 0.01], "2": [0.25] * 4}  # of four experts, one has less than 0.025
    (tmp_path / "expert_load.jsonl").write_text(json.dumps({"step": 4, "layers": load}) + "\n", encoding="utf-8")
    found = measure(tmp_path)
    assert found == pytest.approx(
        {
            "validation_loss": 3.5,
            "least_validation_loss": 3.0,
            "validation_loss_rise": 0.5,
            "training_loss": 1.0,
            "spikes": 0.0,
            "skipped_steps": 2.0,
            "step_seconds": 0.5,
            "memory": 100.0,
            "router_z": 6.0,
            "load_entropy": 0.6,
            "busiest_load": 1.2,
            "dead_experts": 1 / 8,
        }
    )
    assert set(found) <= set(MEASURES)
    assert DEAD == 0.1


# ---------------------------------------------------------------------------------------------------------------
# From text to verdict
# ---------------------------------------------------------------------------------------------------------------

TINY = """\
name: tiny
says: Balanced experts are balanced
sources: [nobody]
texts:
  general: {sources: [TEXT], separator: "\\n", validation_fraction: 0.2}
vocab_size: 300
fit:
  model: {optimizer: {lr: 0.01}}
  data: {sequence_length: 32, batch_size: 4}
  trainer: {max_steps: 6, log_every_n_steps: 2, val_check_interval: 3, enable_progress_bar: false}
  checkpoint: {every_n_steps: 3}
models:
  - name: dense
    base: llama-tiny
    overrides:
      {num_layers: 1, hidden_size: 16, intermediate_size: 16, attention: {num_heads: 2, num_kv_heads: 2, head_dim: 8}}
arms:
  first: {model: dense}
  same: {model: dense}
  sparse:
    start: {of: first, upcycle: [--experts, "4"]}
    fit: {model: {load_balance_coef: 0.01}, finetune: {freeze: [attention]}}
expect:
  - {measure: load_entropy, contrast: {sparse: 1}, at_least: 0.2}
  - {measure: memory, log: true, contrast: {first: 1, same: -1}, within: 0.001}
  - {measure: validation_loss, contrast: {first: 1, sparse: -1}, within: 5.0}
"""


@pytest.mark.slow
def test_from_text_to_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(f"the {i} of {i * i} is a number, and {i % 7} is one as well\n" for i in range(900))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("TEXT", str(tmp_path / "text.txt")), encoding="utf-8")
    out = tmp_path / "claims"
    assert main(["claims", str(path), "--out", str(out), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "holds here"
    assert [finding["outcome"] for finding in found["expect"]] == ["seen"] * 3
    first, sparse = found["arms"]["first"]["0"], found["arms"]["sparse"]["0"]
    assert first == found["arms"]["same"]["0"], "two arms that are trained alike are one run"
    assert len(list((out / "runs").iterdir())) == 6
    # fp32 weights and AdamW's two moments are there all the time.
    assert first["memory"] > 3 * 4 * first["trainable_parameters"]
    width, vocabulary, experts = 16, 300, 4
    weights = 2 * vocabulary * width + experts * (3 * width * width + width) + 3 * width
    assert sparse["trainable_parameters"] == weights, "all but attention"
    assert "load_entropy" not in first
    assert kept(out / "claims") == [found]
    assert "| **holds here** |" in board([found])

    runs = {run: run.stat().st_mtime_ns for run in (out / "runs").glob("*/fit/final/model*.safetensors")}
    assert len(runs) == 6
    assert main(["claims", str(path), "--out", str(out), "--json"]) == 0
    assert runs == {run: run.stat().st_mtime_ns for run in runs}, "nothing is trained twice"
    assert json.loads(capsys.readouterr().out)[0]["arms"] == found["arms"]

    path.write_text(path.read_text(encoding="utf-8").replace("vocab_size: 300", "vocab_size: 301"), encoding="utf-8")
    assert main(["claims", str(path), "--out", str(out)]) == 2
    assert "names other texts than tiny has" in capsys.readouterr().err


def test_list_names_every_claim(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["claims", "--out", str(tmp_path), "--json"]) == 0
    listed = {row["claim"]: row["verdict"] for row in json.loads(capsys.readouterr().out)}
    assert listed == {path.stem: None for path in claim_files(FOLDER)}
    assert main(["claims", "balancin", "--out", str(tmp_path)]) == 2
    assert "one of balancing" in capsys.readouterr().err


def test_peak_counts_what_is_allocated_and_freed() -> None:
    from zoo.bench.memory import Peak

    with Peak() as peak:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b[:10] * 2
    assert 8000 <= peak.bytes <= 8300
    assert len(c) == 10
