"""A model for lm-eval that answers as it is told, and tasks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from zoo.harness.runner import task_manager

SUPERGLUE = {
    "superglue_boolq": "boolq",
    "superglue_cb": "cb",
    "superglue_copa": "copa",
    "superglue_multirc": "multirc",
    "superglue_rte": "sglue_rte",
    "superglue_wic": "wic",
    "superglue_wsc": "wsc",
}
"""Corrected task → stock task, of those that lm-eval can load."""


TRIVIA_TASKS = [f"triviaqa{answer}{shots}" for answer in ("", "_full_answer") for shots in ("", "_5shot")]


class Scripted(LM):
    """Prefers the choice and writes the text that ``choose`` and ``write`` say, cut at the stop sequences."""

    def __init__(self, choose: Callable[[Instance], bool], write: Callable[[Instance], str] = lambda _: "") -> None:
        super().__init__()
        self.choose, self.write = choose, write

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        return [(float(self.choose(request)), False) for request in requests]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        texts = []
        for request in requests:
            text = self.write(request)
            for stop in request.args[1]["until"]:
                text = text.split(stop)[0]
            texts.append(text)
        return texts

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        raise AssertionError("no task asks for this")


def run(lm: LM, tasks: Sequence[str], mirror: Path | None, limit: int | None = None, **settings: Any) -> dict[str, Any]:
    manager = task_manager(tasks, None, mirror)
    return lm_eval.simple_evaluate(
        lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=100, **settings
    )


def scores(results: Mapping[str, Any], task: str) -> dict[str, float]:
    return {
        key.split(",")[0]: value
        for key, value in results["results"][task].items()
        if "," in key and "_stderr" not in key
    }
