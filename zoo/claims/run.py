"""Training the arms of claims, each once: arms of several claims that are trained alike are one run.

``data.yaml``          what the texts and the tokenizer are made from
``tokenizer/ data/``   the tokenizer, and the tokens of every text
``runs/<key>/``        ``model.yaml``, ``fit.yaml``, ``fit/`` (the run directory of ``zoo fit``); an arm with one seed
``claims/<name>.json`` what was found (``zoo.claims.board``)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any, cast

from omegaconf import OmegaConf

from zoo.claims.claim import Claim
from zoo.claims.measures import measure
from zoo.claims.probe import Probe
from zoo.config import ModelSpec, load_yaml, save_spec, to_dict
from zoo.files import write_text
from zoo.harness.child import run_command, side_by_side
from zoo.harness.compare import Notify, cores
from zoo.harness.entries import resolve
from zoo.tokenizer import Tokenizer
from zoo.training.data.builder import build
from zoo.training.data.sources import Source
from zoo.training.data.tokenizer_training import train_tokenizer


@dataclass(frozen=True)
class ArmRun:
    """One arm trained with one seed."""

    name: str
    """For messages."""
    directory: Path
    spec: ModelSpec | None
    """Of an arm with weights drawn from the seed."""
    start: ArmRun | None
    """Whose weights it begins with."""
    upcycle: tuple[str, ...] | None
    fit: Mapping[str, Any]

    @property
    def run_directory(self) -> Path:
        """Of ``zoo fit``."""
        return self.directory / "fit"

    @property
    def checkpoint(self) -> Path:
        """The trained model."""
        return self.run_directory / "final"

    @property
    def cost_file(self) -> Path:
        """Seconds of each command that ended by itself, one a line."""
        return self.directory / "cost.jsonl"


def run_claim(claim: Claim, out: Path, notify: Notify, jobs: int) -> dict[str, dict[int, dict[str, float]]]:
    """Train what is not trained yet.

    Args:
        out: directory of the claims; it is made, or continued.
        notify: told what begins.
        jobs: arms trained side by side, each with an equal share of the cores.

    Returns:
        Arm → seed → measure → value.

    Raises:
        ValueError: a model that cannot be, other texts than ``out`` was begun with, or a run that fails.
    """
    if jobs < 1:
        raise ValueError(f"jobs = {jobs}: train at least 1 arm at a time")
    out = out.absolute()
    runs = plan(claim, out)
    _prepare_texts(claim, out, notify)
    threads, stop = max(1, cores() // jobs), Event()

    def train(run: ArmRun) -> None:
        if not run.checkpoint.exists() and not stop.is_set():
            notify(f"{run.name}: training")
            _train(run, threads, jobs, stop)

    for arm in _stages(claim):
        # Two arms that are trained alike are one run: once is enough.
        batch = {run.directory: run for name in arm for run in runs[name].values()}
        side_by_side(train, list(batch.values()), jobs, stop)
    return {arm: {seed: measure(run.run_directory) for seed, run in by_seed.items()} for arm, by_seed in runs.items()}


def plan(claim: Claim, out: Path) -> dict[str, dict[int, ArmRun]]:
    """Arm → seed → its run, with the directory that its settings name.

    Raises:
        ValueError: a model that cannot be.
    """
    models = resolve(claim.models, claim.vocab_size, int(claim.fit["data"]["sequence_length"]))
    specs = {model.name: model.spec for model in models}
    runs: dict[str, dict[int, ArmRun]] = {}
    for name in claim.ordered():
        arm = claim.arms[name]
        spec = specs[arm.model] if arm.model else None
        runs[name] = {}
        for seed in claim.seeds:
            start = runs[arm.start.of][seed] if arm.start else None
            upcycle = arm.start.upcycle if arm.start else None
            fit = _merged(claim.fit, arm.fit)
            key = _key(spec, start, upcycle, fit, to_dict(claim.texts[arm.text]), seed)
            directory = out / "runs" / key
            settings = _merged(fit, _own(directory, out / "data" / arm.text, spec, start, upcycle, seed))
            label = f"{claim.name}: {name}, seed {seed}"
            runs[name][seed] = ArmRun(label, directory, spec, start, upcycle, settings)
    return runs


def _own(
    directory: Path, data: Path, spec: ModelSpec | None, start: ArmRun | None, upcycle: object, seed: int
) -> dict[str, Any]:
    """Keys of ``zoo fit`` that are this run's own."""
    if spec is not None or start is None:
        name = directory / "model.yaml"
    else:
        name = start.checkpoint if upcycle is None else directory / "upcycled"
    return {
        "seed_everything": seed,
        "model": {"name": str(name)},
        "data": {"data_dir": str(data), "seed": seed},
        "trainer": {
            "default_root_dir": str(directory / "fit"),
            "callbacks": [{"class_path": f"{Probe.__module__}.{Probe.__name__}"}],
        },
    }


def _key(
    spec: ModelSpec | None,
    start: ArmRun | None,
    upcycle: tuple[str, ...] | None,
    fit: Mapping[str, Any],
    text: Mapping[str, Any],
    seed: int,
) -> str:
    """Name of a run: equal for equal settings."""
    settings = {
        "model": None if spec is None else to_dict(spec.model),
        "start": None if start is None else start.directory.name,
        "upcycle": upcycle,
        "fit": fit,
        "text": text,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(*map(dict, parts))))


def _stages(claim: Claim) -> list[list[str]]:
    """Arms that can be trained side by side, after those that they start from."""
    stages: list[list[str]] = []
    depth: dict[str, int] = {}
    for name in claim.ordered():
        start = claim.arms[name].start
        depth[name] = 0 if start is None else depth[start.of] + 1
        if depth[name] == len(stages):
            stages.append([])
        stages[depth[name]].append(name)
    return stages


def _prepare_texts(claim: Claim, out: Path, notify: Notify) -> None:
    """Tokenizer and tokens of the claim's texts."""
    texts = {name: asdict(text) for name, text in claim.texts.items()}
    made_from = json.loads(json.dumps({"texts": texts, "vocab_size": claim.vocab_size}))  # tuples as lists, as read
    record = out / "data.yaml"
    if not record.exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--out {out}: it holds files that are no claims; give a new or empty directory")
        out.mkdir(parents=True, exist_ok=True)
        write_text(record, OmegaConf.to_yaml(OmegaConf.create(made_from)))
    elif load_yaml(record) != made_from:
        raise ValueError(f"{record}: it names other texts than {claim.name} has; give another --out")
    sources = {
        name: [Source(path, separator=text.separator, first=text.documents) for path in text.sources]
        for name, text in claim.texts.items()
    }
    tokenizer = out / "tokenizer"
    if not tokenizer.exists():
        notify("training the tokenizer")
        train_tokenizer([source for of_text in sources.values() for source in of_text], claim.vocab_size, tokenizer)
    for name, of_text in sources.items():
        data = out / "data" / name
        if not (data / "manifest.json").exists():
            notify(f"tokenising the text {name}")
            fraction = claim.texts[name].validation_fraction
            build(of_text, Tokenizer.load(tokenizer), data, validation_fraction=fraction)


def _train(run: ArmRun, threads: int, jobs: int, stop: Event) -> None:
    """Call ``zoo fit``, and where it must be ``zoo upcycle`` before it, in processes of their own."""
    run.directory.mkdir(parents=True, exist_ok=True)
    if run.spec is not None:
        save_spec(run.spec, run.directory / "model.yaml")
    config = run.directory / "fit.yaml"
    write_text(config, OmegaConf.to_yaml(OmegaConf.create(dict(run.fit))))
    commands = [["fit", "--config", str(config)]]
    upcycled = run.directory / "upcycled"
    if run.upcycle is not None and not upcycled.exists():
        assert run.start is not None
        commands.insert(0, ["upcycle", str(run.start.checkpoint), *run.upcycle, "--out", str(upcycled)])
    for command in commands:
        ended = run_command(command, threads, stop, None if jobs == 1 else run.name)
        if ended is None:
            return
        with run.cost_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"command": command[0], "wall_seconds": ended.wall_seconds}) + "\n")
        if ended.code != 0:
            raise ValueError(
                f"{run.name}: zoo {' '.join(command)} ended with exit code {ended.code}; see above, then run the same "
                "command again to go on"
            )


def core_seconds(runs: Iterable[ArmRun]) -> float:
    """Wall time of all commands of these runs, one after the other; of what several arms share, once."""
    lines = [
        line
        for run in {run.directory: run for run in runs}.values()
        for line in run.cost_file.read_text(encoding="utf-8").splitlines()
    ]
    return sum(float(json.loads(line)["wall_seconds"]) for line in lines)
