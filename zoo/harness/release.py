"""From a finished study to a checkpoint of the zoo: weights small enough to commit, and a card that says what they are.

``zoo.yaml  model.safetensors  tokenizer.*``  the zoo checkpoint, with the hash of its weights in ``SHA256SUMS``
``README.md``        model card, with metadata as the hub reads it
``release.json``     the numbers of the card, and which items were answered rightly: for programs such as ``zoo list``
``expert-load.png``  load of each expert on the validation text, of a sparse model
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from zoo.accounting import count_parameters
from zoo.config import CONFIG_FILE, ModelSpec, load_spec, save_spec
from zoo.config_reading import to_dict
from zoo.files import write_text
from zoo.generation import generate
from zoo.harness import facts, plots
from zoo.harness.compare import Notify
from zoo.harness.facts.build import DATASET, ORIGIN
from zoo.harness.measure import guess_rate, item_scores, validate
from zoo.harness.measurement import EVALUATION_BATCH
from zoo.harness.model_card import model_card
from zoo.harness.significance import chance_p_value, is_accuracy
from zoo.harness.statistics import Array, align, bootstrap
from zoo.harness.study import Study, load_study
from zoo.harness.suites.dataset import MIRROR
from zoo.harness.summary import SKILLS
from zoo.registry import RELEASE_FILE, all_names, read_json
from zoo.tokenizer import Tokenizer
from zoo.training.run import environment
from zoo.weights.loading import load
from zoo.weights.target import copy_tokenizer, new_directory, write_tensors
from zoo.weights.verify import record_hashes, verify

if TYPE_CHECKING:
    from zoo.model import Decoder

MAX_BYTES = 20_000_000
"""Of a released directory: what a source repository can carry."""

CARD_FILE = "README.md"
LOAD_FILE = "expert-load.png"
DTYPES = ("bfloat16", "float32")
SAMPLE_TOKENS = 16

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class FinishedRun:
    """One trained and measured model of a study."""

    study_directory: Path
    study: Study
    model: str
    seed: int

    @property
    def directory(self) -> Path:
        """Of the run."""
        return self.study_directory / "models" / f"{self.model}-seed{self.seed}"

    @property
    def checkpoint(self) -> Path:
        """The trained weights."""
        return self.directory / "fit" / "final"

    def measured(self) -> dict[str, Any]:
        """What the study measured of them."""
        return read_json(self.directory / "measured" / f"step-{self.study.training.steps:08d}.json")

    def commits(self) -> list[str]:
        """The code of every start of the training, in order."""
        starts = read_json(self.directory / "fit" / "run.json")["starts"]
        return list(dict.fromkeys(_code(start["git"]) for start in starts))


def release(study_directory: Path, model: str, out: Path, *, seed: int, dtype: str, notify: Notify) -> dict[str, Any]:
    """Write a model of a study as a checkpoint of the zoo, all of it or nothing.

    The scores are those of the weights as they are written: they are loaded from there and evaluated on every item.

    Args:
        study_directory: of a finished ``zoo compare``.
        model: name in the study.
        out: directory to make; its name becomes the model's.
        seed: which training of the model.
        dtype: of the weights, one of ``DTYPES``. Buffers stay as they are.
        notify: told what begins.

    Returns:
        The content of ``release.json``.

    Raises:
        ValueError: the study is not finished, has no such model or seed, or was trained on data whose licence is not
            known; the name is taken by a config, or the directory by something else; more than ``MAX_BYTES``.
        OSError: ``out`` cannot be written.
    """
    run = _finished_run(study_directory, model, seed)
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: use one of {', '.join(DTYPES)}")
    if not _NAME.fullmatch(out.name) or out.name in all_names():
        raise ValueError(f"{out}: its name must be of small letters, digits, '.' and '-', and none of configs/models")
    spec = replace(load_spec(run.checkpoint / CONFIG_FILE), name=out.name)
    with new_directory(out) as aside:
        copy_tokenizer(run.checkpoint, aside, spec.model.vocab_size)
        write_tensors(aside, _converted(load(run.checkpoint), getattr(torch, dtype)))
        save_spec(spec, aside / CONFIG_FILE)
        record_hashes(verify(aside))
        _check_size(aside, out)
        notify(f"{out.name}: evaluating the weights in {dtype}")
        record = _provenance(run, spec, dtype) | _measure(run, aside)
        if record["expert_load"]:
            with matplotlib.rc_context({"figure.constrained_layout.use": True}):
                (aside / LOAD_FILE).write_bytes(plots.expert_load(record).png)
        write_text(aside / RELEASE_FILE, json.dumps(record, indent=1, allow_nan=False) + "\n")
        write_text(aside / CARD_FILE, model_card(record, spec.model, LOAD_FILE))
        _check_size(aside, out)
    return record


def _finished_run(study_directory: Path, model: str, seed: int) -> FinishedRun:
    for name in ("study.yaml", "report.json"):
        if not (study_directory / name).is_file():
            raise ValueError(f"{study_directory}: no {name}; give the directory of a finished `zoo compare`")
    study = load_study(study_directory / "study.yaml")
    if study.data.facts is None:
        raise ValueError(f"{study_directory}: trained on sources; only the embedded facts have a licence to publish by")
    run = FinishedRun(study_directory, study, model, seed)
    if seed not in study.seeds or not (run.checkpoint / CONFIG_FILE).is_file():
        names = sorted(path.name for path in (study_directory / "models").glob("*-seed*"))
        raise ValueError(f"{study_directory}: no {run.directory.name}; its runs are {', '.join(names)}")
    return run


def _converted(model: Decoder, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The state of ``model`` with its parameters in ``dtype``."""
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        yield name, tensor.to(dtype) if name in parameters else tensor


def _check_size(directory: Path, out: Path) -> None:
    size = sum(path.stat().st_size for path in directory.iterdir())
    if size > MAX_BYTES:
        raise ValueError(
            f"{out}: {size / 1e6:.1f} MB; a checkpoint of the zoo has at most {MAX_BYTES / 1e6:.0f} MB: release a "
            "smaller model, or in bfloat16"
        )


# ---------------------------------------------------------------------------------------------------------------
# The record
# ---------------------------------------------------------------------------------------------------------------


def _provenance(run: FinishedRun, spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """What the weights are and how they were made."""
    assert run.study.data.facts is not None
    parameters = count_parameters(spec.model)
    return {
        "name": spec.name,
        "family": spec.family,
        "parameters": {"total": parameters.total, "active": parameters.active},
        "dtype": dtype,
        "study": run.study.name,
        "model": run.model,
        "seed": run.seed,
        "tokens": run.study.training.tokens,
        "data": {"name": DATASET, **asdict(ORIGIN), "config": asdict(run.study.data.facts)},
        "training": to_dict(run.study.training),
        "command": read_json(run.study_directory / "report.json")["command"],
        "commits": run.commits(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": environment()["versions"],
    }


def _measure(run: FinishedRun, checkpoint: Path) -> dict[str, Any]:
    """Scores, perplexity, expert load and a first answer of ``checkpoint``, as the study measures its own."""
    from zoo.harness.runner import evaluate

    study = run.study
    model, tokenizer = load(checkpoint), Tokenizer.load(checkpoint)
    results = evaluate(
        model,
        tokenizer,
        list(study.tasks.all),
        data_root=run.study_directory / "facts" / MIRROR,
        limit=study.limit,
        batch_size=EVALUATION_BATCH,
        seed=run.seed,
        name=run.model,
    )
    validated = validate(model, run.study_directory / "data", study.training.sequence_length, study.training.batch_size)
    items = {task: item_scores(results, task) for task in study.tasks.all}
    guesses = {task: guess_rate(results, task) for task in study.tasks.all}
    guesses |= {task: rate for task, rate in facts.guess_rates(run.study_directory / "facts").items() if task in items}
    skills = {skill: list(getattr(study.tasks, skill)) for skill in SKILLS}
    before = scores_of(run.measured()["scores"], skills, guesses)
    prompt = results["samples"][study.tasks.knowledge[0]][0]["arguments"][0][0]
    return {
        **validated,
        "perplexity": math.exp(validated["validation_loss"]),
        "tasks": skills,
        "limit": study.limit,
        "metrics": {task: results["configs"][task]["metric_list"][0]["metric"] for task in items},
        "scores": scores_of(items, skills, guesses),
        "study_scores": {name: score["value"] for name, score in before.items()},
        "right": {task: "".join(f"{score:.0f}" for score in scores.values()) for task, scores in items.items()},
        "sample": {"prompt": prompt, "tokens": SAMPLE_TOKENS, "text": _continuation(model, tokenizer, prompt)},
    }


def scores_of(
    items: Mapping[str, Mapping[str, float]], skills: Mapping[str, list[str]], guesses: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Scores of one training by skill and task: intervals over items, and tests against guessing, as in a report.

    Args:
        items: ones and zeros by task and item.
        skills: tasks by skill.
        guesses: what guessing reaches, by task.

    Raises:
        ValueError: a score is neither 0 nor 1.
    """
    tables = {task: align([scores])[None] for task, scores in items.items()}  # [1, N, 1]: a seed, items, a model
    for task, table in tables.items():
        if not is_accuracy(table):
            raise ValueError(f"task {task!r}: its items are not right or wrong; release a study of tasks that are")
    groups = {skill: (tasks, seed) for seed, (skill, tasks) in enumerate(skills.items())}
    groups |= {task: ([task], 0) for task in tables}
    return {
        name: _score([tables[t] for t in tasks], [guesses[t] for t in tasks], seed)
        for name, (tasks, seed) in groups.items()
    }


def _score(tables: Sequence[Array], rates: Sequence[float], seed: int) -> dict[str, Any]:
    counts = [table.size for table in tables]
    chance = float(np.average(rates, weights=counts))
    right = round(sum(float(table.sum()) for table in tables))
    estimate = bootstrap(tables, seed=seed).score(0)
    p_value = chance_p_value(right, sum(counts), chance)
    return {**asdict(estimate), "items": sum(counts), "guess": chance, "p_value": p_value}


def _continuation(model: Decoder, tokenizer: Tokenizer, prompt: str) -> str:
    """What ``zoo generate`` prints."""
    ids = tokenizer.encode(prompt, bos=tokenizer.add_bos)
    [new] = generate(model, [ids], max_new_tokens=SAMPLE_TOKENS, eos_id=tokenizer.eos_id)
    return tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :]


def _code(git: Mapping[str, Any] | None) -> str:
    return "not a git checkout" if git is None else git["commit"] + (" with changes" if git["dirty"] else "")
