"""The run directory: one process at a time, and enough written down to repeat the run.

``config.yaml`` resolved config, ``run.json`` seed, versions and git state of every start, ``metrics.csv`` and
``tensorboard/`` metrics, ``expert_load.jsonl``, ``checkpoints/`` for resuming, ``final/`` the trained zoo checkpoint.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

import zoo
from zoo.config import CONFIG_FILE
from zoo.config_reading import load_yaml
from zoo.files import write_text
from zoo.training.checkpoint import list_checkpoints

RESUMABLE_CHANGES = (
    *("data.num_workers", "model.max_skipped_steps", "trainer.max_time", "trainer.enable_progress_bar", "checkpoint."),
    *("trainer.accelerator", "trainer.strategy", "trainer.devices", "trainer.num_nodes"),
    *("parallel.tensor", "parallel.expert", "parallel.replicate", "parallel.timeout", "parallel.recompute"),
    *("parallel.overlap_shared_experts", "parallel.reshard_after_forward", "parallel.compile_backend"),
    *("parallel.ranks_per_node", "parallel.reduce_every_micro_batch", "parallel.async_save"),
)
"""Keys (or their beginnings) that may differ when a run resumes: they do not change what it computes, except that sums
over another number of processes are rounded differently."""

LIBRARIES = ("torch", "lightning", "torchmetrics", "omegaconf", "jsonargparse", "safetensors", "numpy")


class RunDirectory:
    """A run directory that this process owns until it ends.

    Args:
        path: Made if it is not there.
        writes: Of the processes of one run only the first owns the directory and ``writes``; the others read.

    Raises:
        ValueError: another process owns it.
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire() if writes else None

    def _acquire(self) -> IO[str]:
        """Take the lock. The system frees it when the process ends, however it ends, so that none is ever stale."""
        file = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            # A record lock: unlike flock's, it is not inherited by the workers of a data loader.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise ValueError(
                f"{self.path}: process {owner} is writing to this run directory; wait for it or give another "
                "trainer.default_root_dir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        return file

    @property
    def final(self) -> Path:
        """Where the trained model goes."""
        return self.path / "final"

    @property
    def finished(self) -> bool:
        """Whether the run was completed."""
        return (self.final / CONFIG_FILE).exists()

    @property
    def latest_checkpoint(self) -> Path | None:
        """The training checkpoint to resume from."""
        found = list_checkpoints(self.path)
        return found[-1] if found else None

    @property
    def latest_step(self) -> int:
        """Optimizer steps that the latest checkpoint has behind it; 0 without one."""
        latest = self.latest_checkpoint
        return int(latest.stem.removeprefix("step-")) if latest else 0

    def record(self, config: str, seed: int, step: int) -> None:
        """Write the resolved config and what this start of the run, from optimizer step ``step``, was made with.

        Raises:
            ValueError: the run was started with another config, and goes on from a checkpoint.
        """
        config_path = self.path / "config.yaml"
        if step > 0 and config_path.exists():
            now: Any = OmegaConf.to_container(OmegaConf.create(config))
            _check_unchanged(load_yaml(config_path), now, config_path)
        write_text(config_path, config)
        run_path = self.path / "run.json"
        starts = json.loads(run_path.read_text(encoding="utf-8"))["starts"] if step > 0 and run_path.exists() else []
        starts.append({"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, **environment()})
        write_text(run_path, json.dumps({"seed": seed, "starts": starts}, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions of the code and of the libraries that numbers depend on."""
    versions = {"moe-zoo": zoo.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"versions": versions, "platform": platform.platform(), "git": git_state()}


def git_state() -> dict[str, Any] | None:
    """Commit of the zoo's source and whether it was changed since; ``None`` where it is not a checkout."""
    source = Path(zoo.__file__).parent
    try:
        commit = _git(source, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(source, "status", "--porcelain", "--", str(source)))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _check_unchanged(old: Mapping[str, Any], new: Mapping[str, Any], where: Path) -> None:
    before, now = dict(_flatten(old)), dict(_flatten(new))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(RESUMABLE_CHANGES):
            raise ValueError(
                f"{key} = {now.get(key)}: the run in {where.parent} was started with {before.get(key)}; give the same "
                "value to resume it, or another trainer.default_root_dir"
            )


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
