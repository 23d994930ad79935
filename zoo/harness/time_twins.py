"""Dense twins by measured time in a study: each is timed once, and recorded with what was timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.config import ModelSpec
from zoo.config_reading import from_dict, to_dict
from zoo.files import write_text
from zoo.harness.match_time import Timer, match_time
from zoo.harness.study import Study
from zoo.training.run import environment


@dataclass(frozen=True)
class TimeTwins:
    """Finds the dense twin by time of a study's sparse model, or reads it from the study's directory.

    A step is timed as it is trained: at the study's sequence length and batch size, with as many threads, and on the
    GPU if there is one. A study that is resumed trains the twin that it began with.

    Attributes:
        out: directory of the study.
        threads: of one training.
        timer: what times two models; by default ``time_steps``.
    """

    study: Study
    out: Path
    threads: int
    notify: Callable[[str], None]
    timer: Timer | None = None

    def __call__(self, sparse: ModelSpec) -> ModelSpec:
        """The twin of ``sparse``.

        Raises:
            ValueError: no twin is equal within the tolerance, times vary too much to tell, or the recorded twin is that
                of another model.
        """
        path = self.out / "twins" / f"{sparse.name}-time.json"
        if path.exists():
            recorded = json.loads(path.read_text(encoding="utf-8"))
            if from_dict(ModelSpec, recorded["of"], f"{path}: of") != sparse:
                raise ValueError(f"{path}: the twin of another model than {sparse.name!r}; remove it to time again")
            return from_dict(ModelSpec, recorded["spec"], f"{path}: spec")
        self.notify(f"timing training steps of {sparse.name} and its twin")
        training = self.study.training
        device = "cuda" if torch.cuda.is_available() else "cpu"
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            found = match_time(
                sparse, training.sequence_length, training.batch_size, device=device, progress=True, timer=self.timer
            )
        finally:
            torch.set_num_threads(before)
        record: dict[str, Any] = {
            "of": to_dict(sparse),
            "spec": to_dict(found.spec),
            "timing": found.as_dict(),
            "sequence_length": training.sequence_length,
            "batch_size": training.batch_size,
            "threads": self.threads,
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            **environment(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=1) + "\n")
        return found.spec
