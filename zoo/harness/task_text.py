"""Training text out of the train rows of evaluation tasks.

A row is written as its own lm-eval task asks and answers it, by the code that writes lm-eval's solved examples, so that
training and evaluation have one format. Validation rows never get here: a task is accepted only if what it evaluates is
its train split, and train rows that ask what the validation split asks are left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.files import write_text
from zoo.harness.suites.dataset import TRAINING_TEXT

MANIFEST = "tasks.json"


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """What of an evaluation task's train rows is trained on: the task is one of ``evaluation/tasks/trained``."""

    rows: int | None = None
    """Only the first ones, in the order in which the task evaluates them."""
    repeat: int = 1
    """How often each is in the training text."""

    def __post_init__(self) -> None:
        for name, value in (("rows", self.rows), ("repeat", self.repeat)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: give a positive number")


def write(tasks: Mapping[str, TaskRows], data_root: Path | None, directory: Path) -> None:
    """Write ``train.jsonl`` into ``directory``, one row a line and shuffled, and ``tasks.json``, which counts them.

    The latter is written last. Where it is, nothing is done.

    Args:
        tasks: those whose train rows are trained on, by name.
        data_root: mirror of their data sets; ``None`` reads the hub.

    Raises:
        ValueError: a task is unknown, is not in the mirror, or is refused by ``solved_rows``.
    """
    from zoo.harness.runner import load_tasks

    if (directory / MANIFEST).exists():
        return
    documents: list[str] = []
    counts = {}
    loaded = load_tasks([*tasks], data_root)
    for name, amount in tasks.items():
        rows, left_out = solved_rows(loaded[name], amount.rows)
        documents += rows * amount.repeat
        counts[name] = {"rows": len(rows), "repeat": amount.repeat, "left_out": left_out}
    random.Random(0).shuffle(documents)
    directory.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
    write_text(directory / TRAINING_TEXT, "".join(lines))
    write_text(directory / MANIFEST, json.dumps(counts, indent=2) + "\n")


def solved_rows(task: Any, number: int | None) -> tuple[list[str], int]:
    """The first ``number`` train rows of ``task``, solved, and how many more were left out for being in validation.

    Raises:
        ValueError: ``task`` evaluates other rows than those of its train split, or has fewer than ``number``.
    """
    config = task.config
    splits = {split for split in (config.test_split, config.validation_split) if split is not None}
    if splits != {config.training_split}:
        raise ValueError(
            f"task {config.task!r} evaluates the split {' and '.join(sorted(splits))}: only train rows may be trained "
            "on; name a task that evaluates them, such as triviaqa_trained"
        )
    validation = {_prompt(task, row) for row in task.dataset["validation"]} if "validation" in task.dataset else set()
    rows: list[str] = []
    left_out = 0
    for row in task.eval_docs:
        if len(rows) == number:
            break
        if _prompt(task, row) in validation:
            left_out += 1
        else:
            rows.append(solved(task, row))
    if not rows or (number is not None and len(rows) < number):
        raise ValueError(f"task {config.task!r} has {len(rows)} train rows to train on, not the {number} asked for")
    return rows, left_out


def solved(task: Any, row: Mapping[str, Any]) -> str:
    """``row`` as lm-eval shows it as a solved example: prompt and right answer, the first one where several are."""
    choices = task.doc_to_choice(row) if task.config.doc_to_choice is not None else None
    turn = task.build_qa_turn(
        q=task.doc_to_text(row),
        c=choices,
        a=task.doc_to_target(row),
        tgt_delim=task.config.target_delimiter,
        few_delim="",
    )
    return "".join(message.to_text() for message in turn)


def _prompt(task: Any, row: Mapping[str, Any]) -> str:
    """What is compared between splits: the prompt, without regard to case and runs of white space."""
    return " ".join(str(task.doc_to_text(row)).casefold().split())
