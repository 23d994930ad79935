"""Which tasks a study's groups and suites stand for, and which data sets they read; no data set is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.tasks._index import Kind

from zoo.harness.runner import task_manager
from zoo.harness.study import Study, TasksConfig


def with_leaf_tasks(study: Study) -> Study:
    """``study`` with the tasks of its groups and suites in their place: those that have items.

    Raises:
        ValueError: an unknown task.
    """
    leaves = {part: tuple(leaf_tasks(names)) if names else () for part, names in vars(study.tasks).items()}
    return replace(study, tasks=TasksConfig(**leaves))


def leaf_tasks(tasks: Sequence[str]) -> list[str]:
    """``tasks`` with the tasks of groups and tags in their place, each once; no data set is read.

    Raises:
        ValueError: an unknown task, or a group that defines tasks of its own.
    """
    index = task_manager(tasks, None, None).task_index

    def leaves(name: str) -> Iterator[str]:
        entry = index[name]
        members: Sequence[Any] = sorted(entry.tags) if entry.kind == Kind.TAG else (entry.cfg or {}).get("task", [])
        if entry.kind not in (Kind.GROUP, Kind.TAG):
            yield name
            return
        for member in members:
            if not isinstance(member, str):
                raise ValueError(f"group {name!r}: it changes tasks or defines its own; name its tasks instead")
            yield from leaves(member)

    return list(dict.fromkeys(leaf for task in tasks for leaf in leaves(task)))


def data_set(task: str) -> tuple[str, str | None]:
    """Name and configuration of the data set that ``task`` reads, which is not read; of one that is made, "" and None.

    Raises:
        ValueError: an unknown task.
    """
    manager = task_manager([task], None, None)
    config = manager._factory._load_full_config(manager.task_index[task])
    return str(config.get("dataset_path", "")), config.get("dataset_name")
