"""What the planner finds, by its own figures, and its command; nothing is run in parallel here.

What real processes hold and send is compared in ``tests/distributed/test_plan_figures.py``.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import H100, model_of, work

from zoo.cli.main import main
from zoo.parallel.estimate import Workload, gpu_hours_per_trillion, utilisation
from zoo.parallel.hardware import GPUS, Gpu
from zoo.parallel.memory import USABLE_MEMORY
from zoo.parallel.planner import Result, divisors, search
from zoo.registry import find_spec, model_names

# ---------------------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> Result:
    return search(work())


def test_fitting_layouts_fit_and_are_ranked(found: Result) -> None:
    times = [one.step_seconds for one in found.fitting]
    assert times and times == sorted(times)
    for one in found.fitting:
        assert one.total_memory <= USABLE_MEMORY * H100.memory
        assert one.layout.sizes.world == 64
        assert one.setting.micro_batch * one.setting.micro_batches * one.layout.sizes.data == 64
        assert 0 < utilisation(work(), one) < 0.5


def test_every_layout_is_there_once(found: Result) -> None:
    seen = [(one.layout.plan, one.layout.sizes) for one in found.fitting]
    assert len(set(seen)) == len(seen)
    rejected = [(one.plan, *one.sizes.values()) for one in found.rejected]
    assert len(set(rejected)) == len(rejected)
    assert {one.plan for one in found.rejected} | {plan for plan, _ in seen} == {
        "ddp",
        "ep",
        "ep_fsdp",
        "fsdp",
        "tp_ep_fsdp",
    }


def test_reasons(found: Result) -> None:
    reasons = {(one.plan, *one.sizes.values()): one for one in found.rejected}
    ddp = reasons["ddp", 64, 1, 1]
    assert ddp.kind == "memory" and ddp.needed > 16 * 46.7e9 and "optimizer" in ddp.reason
    assert "num_experts = 8" in reasons["ep_fsdp", 1, 1, 64].reason
    assert "num_kv_heads = 8" in reasons["tp_ep_fsdp", 1, 16, 1].reason
    across = search(work("olmoe-1b-7b"), only=("tp_ep_fsdp", {"tensor": 2})).rejected
    assert across and all("attention.qk_norm = projection is over all heads" in one.reason for one in across)
    uneven = search(work(batch=48), only=("ep_fsdp", {"expert": 8})).rejected
    assert [(one.kind, one.reason) for one in uneven] == [
        ("batch", "48 sequences a step are not divisible by 64 data ranks")
    ]
    (dense,) = search(work("llama-3-8b"), only=("ep_fsdp", {})).rejected
    assert dense.kind == "plan" and "matches no parameter" in dense.reason


def test_a_dense_model_has_layouts() -> None:
    assert {one.layout.plan for one in search(work("llama-3-8b")).fitting} == {"fsdp", "tp_ep_fsdp"}


RECURRENT = [name for name in model_names() if find_spec(name).model.mamba]


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([name for name in model_names() if name not in ("deepseek-v3", "deepseek-v2", *RECURRENT)]),
    st.integers(0, 13),
    st.sampled_from([1, 3, 8]),
    st.sampled_from(list(GPUS.values())),
)
def test_no_figure_is_absurd(name: str, power: int, rows: int, gpu: Gpu) -> None:
    config, gpus = model_of(name), 2**power
    length = min(4096, config.max_position_embeddings)
    asked = Workload(config=config, gpu=gpu, gpus=gpus, sequence_length=length, global_batch=rows * gpus)
    for one in search(asked).fitting:
        for figures in (one.memory, one.sent, one.between_nodes, one.seconds):
            assert all(math.isfinite(figure) and figure >= 0 for figure in figures.values()), (one.layout, figures)
        assert 0 < utilisation(asked, one) <= asked.efficiency
        assert all(0 <= size <= one.sent[kind] * (1 + 1e-9) for kind, size in one.between_nodes.items())
        assert one.memory["activations"] > 0 and one.total_memory <= USABLE_MEMORY * gpu.memory
        assert (one.hops > 0) == (one.layout.sizes.expert > 1)
        assert one.between_nodes == {} or gpus > gpu.gpus_per_node


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_not_estimated(name: str) -> None:
    with pytest.raises(ValueError, match="mamba: memory and time of recurrent layers are not estimated; choose a plan"):
        work(name)


def test_prediction_modules_are_not_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ValueError, match="mtp_depth = 1: memory and time of MTP modules are not estimated; plan the model"
    ):
        Workload(config=find_spec("deepseek-v3").model, gpu=H100, gpus=8, sequence_length=4096, global_batch=8)
    assert main(["plan", "deepseek-v3", "--gpus", "8", "--layout", "fsdp"]) == 1
    assert "deepseek-v3 without its MTP modules on 8 h100" in capsys.readouterr().out


def test_one_gpu() -> None:
    fitting = search(work("mixtral-tiny", 1, 1, 256)).fitting
    assert fitting and not any(one.sent for one in fitting)


def test_gpu_hours() -> None:
    one = search(work(), only=("ep_fsdp", {"expert": 8})).fitting[0]
    tokens_per_hour = 64 * 4096 / one.step_seconds * 3600
    assert gpu_hours_per_trillion(work(), one) == pytest.approx(64 * 1e12 / tokens_per_hour)


@pytest.mark.parametrize("number", [1, 12, 2048, 97])
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_gpus_are_plausible(gpu: Gpu) -> None:
    assert 1e12 < gpu.memory_bandwidth < 1e13 and 50e9 < gpu.memory < 300e9
    assert gpu.fp32_flops < gpu.bf16_flops and gpu.inter_bandwidth < gpu.intra_bandwidth and gpu.source


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "gpus"), [("deepseek-v3", 2048), ("mixtral-8x7b", 64)])
def test_large_worlds_take_seconds_and_little_memory(name: str, gpus: int) -> None:
    code = (
        "import resource, sys\n"
        "from zoo.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-c", code, "plan", name, "--gpus", str(gpus), "--gpu", "h100", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stderr.split()[-1]) * 1024 < 4 * 2**30
    plan = json.loads(done.stdout)
    best = plan["fitting"][0]
    assert plan["tokens_per_step"] == gpus * 4096
    assert best["memory_bytes"]["total"] == pytest.approx(sum(best["memory_bytes"].values()) / 2)
    assert best["seconds"]["step"] > 0 and best["sent_bytes_per_step"]["all_to_all_dispatch"] > 0
    assert all(one["reason"] for one in plan["rejected"])


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mixtral-8x7b", "--gpus", "64", "--layout", "ep_fsdp,expert=8", "--global-batch", "128"]) == 0
    text = capsys.readouterr().out
    assert "128 sequences of 4,096 tokens" in text and "all to all dispatch" in text


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mixtral-8x7b", "--gpus", "1"]) == 1
    assert "for their memory, such as ddp" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpu", "h10"], "gpu 'h10': did you mean 'h100'?"),
        (["--gpus", "0"], "gpus = 0: give a positive integer"),
        (["--efficiency", "2"], "efficiency = 2.0"),
        (["--sequence-length", "1000000"], "the model has positions up to 32768"),
        (["--tokens-per-step", "5000"], "give a multiple of the sequence length, 4096"),
        (["--layout", "ep_fsdp,pipeline=2"], "'pipeline=2' is none of tensor=N, expert=N, replicate=N"),
        (["--layout", "zero3"], "plan 'zero3'"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    assert main(["plan", "mixtral-8x7b", "--gpus", "8", *more]) == 2
    assert message in capsys.readouterr().err
