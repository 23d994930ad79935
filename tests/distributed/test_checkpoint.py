"""Sharded checkpoints: saved in one layout and loaded in another, written while training goes on, and failed."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS, MODELS, Layout, Result, batch, make_parallel, micro_loss, snapshot, whole
from pool import TIMEOUT, Pools

from zoo.model import Decoder, build
from zoo.moe.router import Router, update_selection_bias
from zoo.parallel.checkpoint import Saver, load, load_alone, optimizer_state
from zoo.parallel.grads import clip_gradients, global_norm, set_last_micro_batch, sum_over_data
from zoo.parallel.mesh import Meshes

NAMES = ["dp2", "fsdp2", "ep2", "tp2", "dp2_ep2", "fsdp2_ep2", "tp2_ep2"]
MODEL = "deepseek-v3"
MICRO_BATCHES = 4
"""Of a step, dealt out to the data ranks: the data is the same in every layout."""
SAVED_STEP, STEPS = 2, 4


@dataclass
class Training:
    """A tiny model in training, on one process or as one rank of several."""

    model: Decoder
    meshes: Meshes | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1)
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}

    def run(self, first: int, last: int) -> Result:
        """Steps ``first`` to ``last`` (without it): losses, norms, and everything at the end."""
        losses, norms = zip(*(self._step(step) for step in range(first, last)), strict=True)
        return {"loss": np.array(losses), "norm": np.array(norms)} | snapshot(self.model, self.optimizer)

    def _step(self, step: int) -> tuple[float, float]:
        rank, ranks = (0, 1) if self.meshes is None else (self.meshes.data.get_local_rank(), self.meshes.data.size())
        share = MICRO_BATCHES // ranks
        micros = [batch(self.model.config.vocab_size, step, i, 0) for i in range(rank * share, (rank + 1) * share)]
        labels = self._sum(torch.stack([(y != -100).sum() for _, y in micros]).sum())
        self.optimizer.zero_grad()
        losses, counts = [], []
        for i, (ids, y) in enumerate(micros):
            if self.meshes is not None:
                set_last_micro_batch(self.model, i == share - 1)
            loss, count = micro_loss(self.model, ids, y)
            (loss / labels).backward()
            losses.append(loss.detach() / labels)
            counts.append(count)
        norm = global_norm(self.model.parameters())
        clip_gradients(self.model.parameters(), 0.5, norm)
        self.optimizer.step()
        routers = [m for m in self.model.modules() if isinstance(m, Router)]
        for router, count in zip(routers, self._sum(torch.stack(counts).sum(0)), strict=True):
            update_selection_bias(router.bias, count, 0.01)
        return self._sum(torch.stack(losses).sum()).item(), norm.item()

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.meshes is None else sum_over_data(value, self.meshes)

    def checkpoint(self, step: int) -> dict[str, Any]:
        """What Lightning hands over to be saved; the step is the position in the data."""
        parallel = self.meshes is not None
        state = optimizer_state(self.optimizer, self.names) if parallel else self.optimizer.state_dict()
        return {"state_dict": self.model.state_dict(), "optimizer_states": [state], "step": step}


def alone() -> Training:
    return Training(build(MODELS[MODEL], seed=3, dtype=torch.float64))


def together(layout: Layout) -> Training:
    return Training(*make_parallel(MODEL, layout))


def saver(background: bool) -> Saver:
    return Saver(timedelta(seconds=TIMEOUT), background=background)


def files_of_one_process() -> Any:
    # Imported only here: the workers import this file, and need no Lightning.
    from zoo.training.checkpoint import AtomicCheckpointIO

    return AtomicCheckpointIO()


# ---------------------------------------------------------------------------------------------------------------
# From any layout to any other
# ---------------------------------------------------------------------------------------------------------------


def save_on_the_way(layout: Layout, path: Path) -> Result:
    """The run of a layout that saves and goes on."""
    training, writing = together(layout), saver(background=True)
    training.run(0, SAVED_STEP)
    writing.save(path, training.checkpoint(SAVED_STEP))
    result = training.run(SAVED_STEP, STEPS)
    writing.wait()
    return result


@pytest.fixture(scope="module")
def runs(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Result]]]:
    """Layout, or ``alone`` → (its checkpoint, its undisturbed results by rank)."""
    directory = tmp_path_factory.mktemp("checkpoints")
    training = alone()
    training.run(0, SAVED_STEP)
    files_of_one_process().save_checkpoint(training.checkpoint(SAVED_STEP), directory / "alone")
    made = {"alone": (directory / "alone", [training.run(SAVED_STEP, STEPS)])}
    for name in NAMES:
        results = pools[LAYOUTS[name].world].run(save_on_the_way, LAYOUTS[name], directory / name)
        made[name] = (directory / name, results)
    return made


def go_on_from_each(layout: Layout, paths: dict[str, Path]) -> dict[str, Result]:
    training = together(layout)
    results = {}
    for source, path in paths.items():
        found = load(path, training.model.state_dict(), training.optimizer, training.names)
        results[source] = training.run(found["step"], STEPS)
    return results


def go_on_alone(path: Path) -> Result:
    training = alone()
    found = files_of_one_process().load_checkpoint(path, weights_only=True)
    training.model.load_state_dict(found["state_dict"])
    training.optimizer.load_state_dict(found["optimizer_states"][0])
    return training.run(found["step"], STEPS)


def assert_close(result: Result, expected: Result, source: str) -> None:
    assert result.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(result[name], values, rtol=1e-9, atol=1e-9, err_msg=f"from {source}: {name}")


def assert_same_bits(result: Result, expected: Result) -> None:
    assert result.keys() == expected.keys()
    assert [name for name, values in expected.items() if not np.array_equal(result[name], values)] == []


@pytest.mark.parametrize("target", NAMES)
def test_a_checkpoint_of_any_layout_goes_on_in_this_one(pools: Pools, runs: dict[str, Any], target: str) -> None:
    expected = runs["alone"][1][0]
    paths = {source: path for source, (path, _) in runs.items()}
    ranks = pools[LAYOUTS[target].world].run(go_on_from_each, LAYOUTS[target], paths)
    for results, undisturbed in zip(ranks, runs[target][1], strict=True):
        assert_same_bits(results[target], undisturbed)
        for source, result in results.items():
            assert_close(result, expected, source)


def test_a_checkpoint_of_any_layout_goes_on_in_one_process(runs: dict[str, Any]) -> None:
    expected = runs["alone"][1][0]
    assert_same_bits(go_on_alone(runs["alone"][0]), expected)
    for source in NAMES:
        assert_close(go_on_alone(runs[source][0]), expected, source)


# ---------------------------------------------------------------------------------------------------------------
# While training goes on
# ---------------------------------------------------------------------------------------------------------------


def train_while_writing(layout: Layout, path: Path) -> Result:
    """Take steps, whose collectives meet those of the saving, while the disk does not answer; return what was saved."""
    training, writing = together(layout), saver(background=True)
    training.run(0, 1)
    saved = {name: whole(tensor) for name, tensor in training.model.state_dict().items()}
    answer, fsync = threading.Event(), os.fsync
    os.fsync = lambda file: fsync(file) if answer.wait(TIMEOUT) else None
    try:
        writing.save(path, training.checkpoint(1))
        training.run(1, 3)
        assert not writing.idle
        assert not path.exists()
    finally:
        answer.set()
        os.fsync = fsync
    writing.wait()
    return saved


@pytest.mark.parametrize("layout", ["fsdp2", "tp2_ep2"])
def test_steps_are_taken_while_a_checkpoint_is_written(pools: Pools, tmp_path: Path, layout: str) -> None:
    path = tmp_path / "step-1"
    saved = pools[LAYOUTS[layout].world].run(train_while_writing, LAYOUTS[layout], path)[0]
    found = load_alone(path)["state_dict"]
    assert found.keys() == saved.keys()
    assert all(np.array_equal(found[name].numpy(), values) for name, values in saved.items())


@contextlib.contextmanager
def full_disk(rank: int) -> Iterator[None]:
    """On one rank, no file can have more than some bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def save_on_a_full_disk(directory: Path, background: bool) -> str:
    training, writing = together(LAYOUTS["fsdp2"]), saver(background)
    training.run(0, 1)
    writing.save(directory / "step-1", training.checkpoint(1))
    writing.wait()
    # A save in the background fails when it is asked for: here by the next one.
    with full_disk(rank=1), pytest.raises(OSError) as caught:
        writing.save(directory / "step-2", training.checkpoint(1))
        training.run(1, 2)
        writing.save(directory / "step-3", training.checkpoint(2))
    writing.save(directory / "step-4", training.checkpoint(2))
    writing.wait()
    return str(caught.value)


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_all_ranks_raise_what_one_could_not_write(pools: Pools, tmp_path: Path, background: bool) -> None:
    messages = pools[2].run(save_on_a_full_disk, tmp_path, background)
    assert messages[0] == messages[1]
    assert f"{tmp_path / 'step-2'}: cannot write the checkpoint: rank 1: File too large; earlier" in messages[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-4"]
    assert load_alone(tmp_path / "step-1")["step"] == 1
