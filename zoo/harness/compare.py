"""Run a study: make its data, train every model on the same tokens in the same order, evaluate, collect the numbers.

Everything lands in one directory. What is finished there is not done again, so a study that was stopped goes on:

``study.yaml``          the study as it is run
``facts/``              the embedded data set, where the study uses it
``generated/``          other generated data sets, and the mirror of their questions
``tasks/``              train rows of evaluation tasks as text, where the study uses them
``tokenizer/  data/``   tokenizer and token data
``twins/``              what twins by time were found to be, and how they were timed
``models/<run>/``       ``model.yaml``, ``fit.yaml``, ``fit/`` (the run directory of ``zoo fit``, with the checkpoints
                        evaluated along the way in ``snapshots/``), ``cost.jsonl``, ``evaluation/`` (lm-eval's files)
                        and ``measured/`` (one file for each checkpoint); a run is a model and a seed
``report.*  figures/``  Markdown, HTML and JSON; every figure as PNG and CSV
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from omegaconf import OmegaConf

from zoo.accounting import training_flops
from zoo.config import save_spec
from zoo.config_reading import load_yaml, to_dict
from zoo.files import write_text
from zoo.harness import facts, task_text
from zoo.harness.child import run_command, side_by_side
from zoo.harness.entries import Model
from zoo.harness.measurement import Measurement, Point
from zoo.harness.snapshots import Snapshots, seconds_file, snapshot_directory
from zoo.harness.study import Study, resolve_models
from zoo.harness.suites.dataset import MIRROR, TRAINING_TEXT, VALIDATION_TEXT
from zoo.harness.suites.generators import write_mixture
from zoo.harness.time_twins import TimeTwins
from zoo.tokenizer import Tokenizer

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """One model trained with one seed."""

    model: Model
    seed: int
    directory: Path

    @property
    def fit_directory(self) -> Path:
        """Where ``zoo fit`` works."""
        return self.directory / "fit"

    @property
    def checkpoint(self) -> Path:
        """The trained model."""
        return self.fit_directory / "final"

    @property
    def cost_file(self) -> Path:
        """Wall time and peak memory, one line for each start of the training that ended by itself."""
        return self.directory / "cost.jsonl"

    def measured_file(self, step: int) -> Path:
        """Scores, perplexity and expert load after optimizer step ``step``."""
        return self.directory / "measured" / f"step-{step:08d}.json"

    def seconds(self, step: int) -> float | None:
        """What the optimizer steps up to ``step`` took; ``None`` where the study keeps no checkpoints."""
        path = seconds_file(self.fit_directory, step)
        return float(json.loads(path.read_text(encoding="utf-8"))["seconds"]) if path.exists() else None

    def costs(self) -> list[dict[str, float]]:
        """What each start of the training took; none where the study was killed before it could be written down."""
        if not self.cost_file.exists():
            return []
        return [json.loads(line) for line in self.cost_file.read_text(encoding="utf-8").splitlines()]


def run_study(study: Study, out: Path, data_root: Path | None, notify: Notify, jobs: int = 1) -> list[Run]:
    """Train and evaluate what is not done yet.

    Args:
        out: directory of the study; it is made, or continued.
        data_root: mirror of the evaluation data sets; not needed where the study makes its own data.
        notify: told what begins.
        jobs: models trained, and then evaluated, side by side, each with an equal share of the cores.

    Raises:
        ValueError: an unknown model or task, a task that cannot be read or has no score for each item, ``out`` holds
            another study, or a run fails.
    """
    from zoo.harness.tasks import with_leaf_tasks

    out = out.absolute()
    # Mistakes in the study show before the first minute is spent on it.
    vocab_size = study.data.vocab_size or Tokenizer.load(str(study.data.tokenizer)).vocab_size
    resolve_models(study, vocab_size)
    study = with_leaf_tasks(study)
    _claim(study, out)
    data = _prepare_data(study, out, data_root, notify)
    models = resolve_models(study, vocab_size, TimeTwins(study, out, max(1, cores() // jobs), notify))
    runs = [Run(m, seed, out / "models" / f"{m.name}-seed{seed}") for seed in study.seeds for m in models]
    _train_all(study, [run for run in runs if not run.checkpoint.exists()], data, notify, jobs)
    _measure_all(study, runs, data, _mirror(study, out) or data_root, notify, jobs)
    return runs


def _claim(study: Study, out: Path) -> None:
    """Write the study into its directory, or check that it is the one there."""
    path, content = out / "study.yaml", OmegaConf.to_yaml(OmegaConf.create(to_dict(study)))
    if path.exists():
        before: Any = load_yaml(path)
        now: Any = OmegaConf.to_container(OmegaConf.create(content))
        if before != now:
            changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            raise ValueError(f"{out} holds another study (it differs in {', '.join(changed)}): give another --out")
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: it holds files that are no study; give a new or empty directory")
    out.mkdir(parents=True, exist_ok=True)
    write_text(path, content)


def _prepare_data(study: Study, out: Path, data_root: Path | None, notify: Notify) -> Path:
    """Tokenizer and token data of the study, once every task was tried; returns the data directory."""
    from zoo.harness.measure import check_item_scores
    from zoo.training.data.builder import build
    from zoo.training.data.sources import Source
    from zoo.training.data.tokenizer_training import train_tokenizer

    data = out / "data"
    if (data / "manifest.json").exists():
        return data
    config = study.data
    training = [Source(path, separator=config.separator, first=config.documents) for path in config.sources]
    if config.tasks:
        notify(f"writing train rows of {', '.join(config.tasks)} as text")
        task_text.write(config.tasks, data_root, out / "tasks")
        training.append(Source(str(out / "tasks" / TRAINING_TEXT), held_out=False))
    if config.facts is not None:
        notify("making the embedded data set")
        facts.write(config.facts, out / "facts")
    if config.generated is not None:
        notify(f"making {', '.join(config.generated.parts)}")
        write_mixture(config.generated, out / "generated")
    notify(f"trying {', '.join(study.tasks.all)}")
    check_item_scores(study.tasks.all, _mirror(study, out) or data_root)
    made = _made_data(study, out)
    training += [Source(str(directory / TRAINING_TEXT)) for directory in made]
    validation = [Source(str(directory / VALIDATION_TEXT)) for directory in made]
    tokenizer = Path(study.data.tokenizer) if study.data.tokenizer else out / "tokenizer"
    if study.data.vocab_size is not None and not tokenizer.exists():
        notify("training the tokenizer")
        train_tokenizer(training, study.data.vocab_size, tokenizer)
    notify("tokenising")
    build(
        training,
        Tokenizer.load(tokenizer),
        data,
        validation_fraction=config.validation_fraction,
        validation_sources=validation,
    )
    return data


def _made_data(study: Study, out: Path) -> list[Path]:
    """Directories of the data sets that the study makes."""
    if study.data.facts is not None:
        return [out / "facts"]
    return [out / "generated" / name for name in study.data.generated.parts] if study.data.generated else []


def _mirror(study: Study, out: Path) -> Path | None:
    """Questions of the data that the study makes, if it makes any."""
    if study.data.facts is not None:
        return out / "facts" / MIRROR
    return out / "generated" / MIRROR if study.data.generated is not None else None


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


def fit_config(study: Study, run: Run, data: Path) -> dict[str, Any]:
    """The config of ``zoo fit``: equal for all models but for the model and its balance losses."""
    training = study.training
    own: dict[str, Any] = {
        "seed_everything": run.seed,
        "model": {"name": str(run.directory / "model.yaml")},
        "data": {
            "data_dir": str(data),
            "sequence_length": training.sequence_length,
            "batch_size": training.batch_size,
            "seed": run.seed,
        },
        "trainer": {"default_root_dir": str(run.fit_directory), "max_steps": training.steps},
    }
    if training.checkpoints > 1:
        snapshots = {
            "class_path": Snapshots.__module__ + ".Snapshots",
            "init_args": {"steps": [*training.evaluated_steps]},
        }
        own["trainer"]["callbacks"] = [*training.fit.get("trainer", {}).get("callbacks", []), snapshots]
    if run.model.layout:
        own["trainer"]["strategy"] = run.model.layout["strategy"]
        own["parallel"] = {key: value for key, value in run.model.layout.items() if key != "strategy"}
    if run.model.spec.model.moe is not None:
        own["model"] |= training.balance
    merged = OmegaConf.to_container(OmegaConf.merge(training.fit, own))
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def _train_all(study: Study, runs: Sequence[Run], data: Path, notify: Notify, jobs: int) -> None:
    """Train ``runs``, the most expensive first, so that the last ones to end are short."""
    if jobs < 1:
        raise ValueError(f"jobs = {jobs}: train at least 1 model at a time")
    length, stop = study.training.sequence_length, Event()
    ordered = sorted(runs, key=lambda run: -training_flops(run.model.spec.model, length))

    def train(run: Run) -> None:
        if not stop.is_set():
            notify(f"{run.model.name}, seed {run.seed}: training on {study.training.tokens:,} tokens")
            _train(study, run, data, jobs, stop)

    side_by_side(train, ordered, jobs, stop)


def _train(study: Study, run: Run, data: Path, jobs: int, stop: Event) -> None:
    """Call ``zoo fit`` in a process of its own, whose time and memory are those of the training alone.

    It ends with this one: a study that is killed leaves no training behind, and goes on from its last checkpoint.
    """
    run.directory.mkdir(parents=True, exist_ok=True)
    save_spec(run.model.spec, run.directory / "model.yaml")
    config = run.directory / "fit.yaml"
    write_text(config, OmegaConf.to_yaml(OmegaConf.create(fit_config(study, run, data))))
    threads = max(1, cores() // jobs)
    name = f"{run.model.name}, seed {run.seed}"
    # One training alone has the terminal, and its progress bar; lines of several say whose they are.
    ended = run_command(["fit", "--config", str(config)], threads, stop, None if jobs == 1 else name)
    if ended is None:
        return
    cost = {"wall_seconds": ended.wall_seconds, "peak_memory_bytes": ended.peak_memory, "threads": threads}
    with run.cost_file.open("a", encoding="utf-8") as file:
        file.write(json.dumps(cost) + "\n")
    if ended.code != 0:
        raise ValueError(
            f"{name}: zoo fit --config {config} ended with exit code {ended.code}; see above, then run the same "
            "command again to go on"
        )


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------


def _measure_all(
    study: Study, runs: Sequence[Run], data: Path, data_root: Path | None, notify: Notify, jobs: int
) -> None:
    """Measure ``runs`` at every step that the study evaluates, as many side by side as are trained so."""
    stop = Event()

    def measure(run: Run) -> None:
        steps = [step for step in study.training.evaluated_steps if not run.measured_file(step).exists()]
        if steps and not stop.is_set():
            at = ", ".join(f"{step:,}" for step in steps)
            notify(f"{run.model.name}, seed {run.seed}: evaluating {', '.join(study.tasks.all)} at step {at}")
            _measure(_measurement(study, run, steps, data, data_root), jobs, stop)

    side_by_side(measure, runs, jobs, stop)


def _measurement(study: Study, run: Run, steps: Sequence[int], data: Path, data_root: Path | None) -> Measurement:
    samples, last = run.directory / "evaluation", study.training.steps
    points = [
        Point(
            weights=str(run.checkpoint if step == last else snapshot_directory(run.fit_directory, step)),
            samples=str(samples if step == last else samples / f"step-{step:08d}"),
            file=str(run.measured_file(step)),
            last=step == last,
        )
        for step in steps
    ]
    return Measurement(
        name=run.model.name,
        tokenizer=str(run.checkpoint),
        points=tuple(points),
        tasks=tuple(study.tasks.all),
        data_root=None if data_root is None else str(data_root.absolute()),
        limit=study.limit,
        seed=run.seed,
        data=str(data),
        sequence_length=study.training.sequence_length,
        batch_size=study.training.batch_size,
    )


def _measure(measurement: Measurement, jobs: int, stop: Event) -> None:
    name = f"{measurement.name}, seed {measurement.seed}"
    ended = run_command(
        [json.dumps(asdict(measurement))],
        max(1, cores() // jobs),
        stop,
        None if jobs == 1 else name,
        module="zoo.harness.measure",
    )
    if ended is not None and ended.code != 0:
        raise ValueError(
            f"{name}: its evaluation ended with exit code {ended.code}; see above, then run the same command again to "
            "go on"
        )
