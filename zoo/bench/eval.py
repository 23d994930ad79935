"""Log-likelihoods of lm-eval tasks: our adapter beside lm-eval's ``hf`` model, text in and scores out.

The same requests go to random weights of the tiny models and to their export, which ``hf`` scores at several batch
sizes; ours has one, because it packs by tokens. The tokenizer is trained on the text of the requests. There is no limit
to compare with: what ours saves is tokens that need not be computed. Freed memory is given back, which `zoo eval`
keeps: all share one process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM

from zoo.bench.rows import OURS, Options, Row
from zoo.bench.timing import interleaved
from zoo.harness.lm import ZooLM
from zoo.harness.runner import offline, quiet, task_manager
from zoo.model import build
from zoo.registry import find_spec
from zoo.training.data.sources import Source
from zoo.training.data.tokenizer_training import train_tokenizer
from zoo.weights import export_checkpoint, save_model

PIECES = 2000
"""Of the tokenizer."""
SHORT = (("copa", 0), ("wic", 0), ("cb", 0))
TASKS = (*SHORT, ("boolq", 0), ("boolq", 5))
"""With the number of examples before each question."""
MODELS = {
    "dense": ("llama-tiny", PIECES, TASKS),
    "mixtral": ("mixtral-tiny", PIECES, TASKS),
    "large vocabulary": ("mixtral-tiny", 129_280, SHORT),
}
"""Name → model, rows of its embedding, and tasks. Rows beyond the tokenizer's cost as much as the others; ``hf`` has
logits of whole texts for all of them, which for the long ones take more than 24 GiB at batch size 32."""
DOCUMENTS = 40
"""Of each task."""
BATCH_SIZE, THEIR_BATCH_SIZES = 8, (1, 8, 32)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.0}
"""Largest difference of a log-likelihood in nats."""

Scores = list[tuple[float, bool]]


@dataclass(frozen=True)
class Case:
    """A model and a task."""

    model: str
    task: str
    shots: int

    @property
    def name(self) -> str:
        """As it is selected and shown."""
        return f"{self.model}, {self.task}, {self.shots} examples"


class Recorder(LM):
    """A model that only remembers what it was asked."""

    def loglikelihood(self, requests: list[Instance]) -> Scores:
        """See ``LM``."""
        self.requests = requests
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """See ``LM``."""
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """See ``LM``."""
        raise NotImplementedError


def rows(options: Options) -> Iterator[Row]:
    """Seconds for the requests of every case that ``options`` asks for."""
    cases = [Case(model, task, shots) for model, (*_, tasks) in MODELS.items() for task, shots in tasks]
    cases = [case for case in cases if options.wants(case.name)]
    if not cases:
        return
    with ExitStack() as stack:
        stack.enter_context(offline(options.data_root is not None))
        stack.enter_context(quiet())
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        asked = {key: recorded(*key, options.data_root) for key in dict.fromkeys((c.task, c.shots) for c in cases)}
        _train_tokenizer(asked, work)
        for model in dict.fromkeys(case.model for case in cases):
            ours, theirs = models(model, work, options)
            for case in (case for case in cases if case.model == model):
                yield measured(case, asked[case.task, case.shots], ours, theirs, options)


def recorded(task: str, shots: int, data_root: Path | None) -> list[Instance]:
    """The log-likelihood requests of the first ``DOCUMENTS`` documents.

    Raises:
        ValueError: the mirror lacks the data set.
    """
    recorder, manager = Recorder(), task_manager([task], None, data_root)
    lm_eval.simple_evaluate(
        recorder, tasks=[task], task_manager=manager, limit=DOCUMENTS, num_fewshot=shots, bootstrap_iters=0
    )
    return recorder.requests


def measured(
    case: Case, requests: list[Instance], ours: TemplateLM, theirs: Mapping[int, TemplateLM], options: Options
) -> Row:
    """All ``requests``, of which no score differs by more than ``TOLERANCE``; ``theirs`` by batch size.

    Raises:
        RuntimeError: one does.
    """
    lms = {OURS: ours, **{f"lm-eval hf, batch size {size}": lm for size, lm in theirs.items()}}
    ways: dict[str, Callable[[], Scores]] = {name: partial(_scores, lm, requests) for name, lm in lms.items()}
    expected = ways[OURS]()
    largest = 0.0
    for name, way in ways.items():
        difference = max(abs(a[0] - b[0]) for a, b in zip(expected, way(), strict=True))
        if not difference <= TOLERANCE[options.dtype]:
            raise RuntimeError(f"{case.name}: {name} differs from ours by {difference:.1e} nats")
        largest = max(largest, difference)
    seconds = interleaved(ways, options.rounds, warmups=0)
    return Row("eval", case.name, seconds, notes={"requests": len(requests), "largest_difference": largest})


def _scores(lm: TemplateLM, requests: list[Instance]) -> Scores:
    return lm.loglikelihood(requests, disable_tqdm=True)


def _train_tokenizer(asked: Mapping[tuple[str, int], Sequence[Instance]], work: Path) -> None:
    """Write ``work / "tokenizer"``, made from the text of all requests."""
    text = "\n".join(part for requests in asked.values() for request in requests for part in request.args)
    (work / "text.txt").write_text(text, encoding="utf-8")
    train_tokenizer([Source(str(work / "text.txt"))], PIECES, work / "tokenizer")


def models(name: str, work: Path, options: Options) -> tuple[TemplateLM, dict[int, TemplateLM]]:
    """Random weights behind our adapter, and behind lm-eval's at each of its batch sizes."""
    from lm_eval.models.huggingface import HFLM

    preset, vocab_size, _ = MODELS[name]
    spec = find_spec(preset)
    spec = replace(spec, model=replace(spec.model, vocab_size=vocab_size))
    model, place = build(spec.model), work / name.replace(" ", "-")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # as built, all logits are nearly equal
    save_model(model, spec, place / "zoo", work / "tokenizer")
    export_checkpoint(place / "zoo", place / "hf")
    dtype = str(options.dtype).removeprefix("torch.")
    ours = ZooLM(str(place / "zoo"), batch_size=BATCH_SIZE, device=options.device, dtype=dtype)
    theirs = {
        size: HFLM(pretrained=str(place / "hf"), device=options.device, dtype=dtype, batch_size=size)
        for size in THEIR_BATCH_SIZES
    }
    return ours, theirs
