"""Evaluation through lm-eval: tasks from the hub or a local mirror, results in lm-eval's files, a table."""

from __future__ import annotations

import contextlib
import datetime
import difflib
import inspect
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import huggingface_hub.constants
import lm_eval
from datasets.exceptions import DatasetsError
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Kind
from lm_eval.utils import handle_non_serializable, hash_string, sanitize_list

from zoo.files import replacing
from zoo.harness.lm import ZooLM
from zoo.model import Decoder
from zoo.registry import evaluation_dir
from zoo.tokenizer import Tokenizer
from zoo.training.memory import freed_memory_kept

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry
    from rich.table import Table


_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def evaluate(
    model: Decoder,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    data_root: Path | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    output: Path | None = None,
    seed: int | None = None,
    name: str = "zoo",
) -> dict[str, Any]:
    """Score ``model`` on lm-eval tasks.

    Args:
        tasks: names of tasks, groups or tags: lm-eval's own, those of this project, or those in ``include_path``.
        data_root: local mirror of data sets in the hub's layout (``<data_root>/aps/super_glue/…``). Every data set is
            then read from there and nothing from the network. ``None`` reads the hub.
        limit: only the first documents of each task.
        include_path: folder with further task YAMLs, which go before others of the same name.
        batch_size: see ``ZooLM``.
        num_fewshot: solved examples before each question; by default what each task says.
        output: directory for the results; see ``write_results``.
        seed: of the choice of examples and of sampling; by default lm-eval's own seeds.
        name: how the results call the model.

    Returns:
        lm-eval's results (``results``, ``configs``, ``n-samples``, …) with every document's ``samples``.

    Raises:
        ValueError: an unknown task, a data set that is not in the mirror, or settings that the model cannot meet.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: give a positive number of documents, or none for all")
    if data_root is not None and not data_root.is_dir():
        raise ValueError(f"data_root = {data_root}: no such directory; give the folder of the mirrored data sets")
    lm = ZooLM(model, tokenizer, batch_size=batch_size)
    seeds = {} if seed is None else dict.fromkeys(_SEEDS, seed)
    with offline(data_root is not None), quiet(), freed_memory_kept():
        results: dict[str, Any] = lm_eval.simple_evaluate(
            lm,
            tasks=list(tasks),
            task_manager=task_manager(tasks, include_path, data_root),
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            **seeds,
        )
    for config in results["configs"].values():
        (config.get("dataset_kwargs") or {}).pop("cache_dir", None)  # a temporary directory, another one in each run
    results["config"] |= {"model": "zoo", "model_args": {"pretrained": name}, "truncated_requests": lm.num_truncated}
    if output is not None:
        write_results(results, output)
    return results


# ---------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------


class _MirrorFactory(TaskFactory):
    """Builds tasks whose data sets are read from directories under ``data_root``."""

    def __init__(self, data_root: Path | None) -> None:
        super().__init__()
        self._data_root = data_root
        self._cache = tempfile.TemporaryDirectory()  # lives as long as this object

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        if self._data_root is None:
            return config
        options = config.get("dataset_kwargs") or {}
        load = config.get("custom_dataset")  # such as that of the generated tasks: it looks in data_root itself
        if load is not None and "data_root" in inspect.signature(load).parameters:
            config["dataset_kwargs"] = {**options, "data_root": str(self._data_root.absolute())}
        elif "dataset_path" in config and "data_files" not in options:  # as dataset_path "json" and the like have
            directory = (self._data_root / config["dataset_path"]).absolute()
            if not directory.is_dir():
                raise ValueError(
                    f"its data set {config['dataset_path']!r} is not in the mirror, looked for {directory}; "
                    "copy it there, or leave data_root out to read it from the hub"
                )
            config["dataset_path"] = str(directory)
            # A cache of its own: datasets' usual one takes two mirrors for one where their files are named alike.
            config["dataset_kwargs"] = {**options, "cache_dir": self._cache.name}
        return config

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Any:
        try:
            return super()._build_task(entry, overrides)
        except (DatasetsError, ImportError, OSError, ValueError) as error:
            source = "the hub" if self._data_root is None else str(self._data_root)
            raise ValueError(f"task {entry.name!r} with data from {source}: {error}") from error


def task_manager(tasks: Sequence[str], include_path: Path | None, data_root: Path | None) -> TaskManager:
    """A manager that knows all of ``tasks`` and reads their data sets from ``data_root`` where that is given.

    Raises:
        ValueError: no task, an unknown one (naming the nearest), or no such ``include_path``.
    """
    if not tasks:
        raise ValueError("no tasks are given: name at least one, such as boolq")
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"include_path = {include_path}: no such directory; give a folder with task YAMLs")
    folders = tuple(path for path in (evaluation_dir(), include_path) if path is not None)
    # Reading lm-eval's thousands of YAMLs takes seconds: only where a task is not one of ours.
    manager = _indexed(folders, stock=False)
    if not _knows(manager, tasks):
        manager = _indexed(folders, stock=True)
    for task in tasks:
        if task not in manager.task_index:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm_eval ls tasks` lists them"
            raise ValueError(f"unknown task {task!r}; {hint}")
    manager._factory = _MirrorFactory(data_root)
    return manager


def load_tasks(tasks: Sequence[str], data_root: Path | None) -> dict[str, Any]:
    """lm-eval's task objects with their data sets, by name; groups are replaced by their members.

    Raises:
        ValueError: an unknown task, or a data set that is not in the mirror.
    """
    with offline(data_root is not None), quiet():
        loaded: dict[str, Any] = dict(task_manager(tasks, None, data_root).load(list(tasks))["tasks"])
    return loaded


def _knows(manager: TaskManager, tasks: Sequence[str]) -> bool:
    """Whether all of ``tasks``, and those that groups among them name, are in the index."""
    for task in tasks:
        entry = manager.task_index.get(task)
        if entry is None:
            return False
        members = (entry.cfg or {}).get("task", []) if entry.kind == Kind.GROUP else []
        if not _knows(manager, [member for member in members if isinstance(member, str)]):
            return False
    return True


@lru_cache(maxsize=4)
def _indexed(folders: tuple[Path, ...], stock: bool) -> TaskManager:
    return TaskManager(include_path=list(folders), include_defaults=stock)


@contextlib.contextmanager
def offline(enabled: bool) -> Iterator[None]:
    """Keep ``datasets`` and ``huggingface_hub`` off the network, also where they are imported already."""
    if not enabled:
        yield
        return
    switches = ((datasets.config, "HF_DATASETS_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE"))
    with contextlib.ExitStack() as stack:
        for module, name in switches:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, True)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's notes about defaults that its own tasks take, and datasets' bars for local files."""
    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = logger.level
    if "LMEVAL_LOG_LEVEL" not in os.environ:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


# ---------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------


def write_results(results: Mapping[str, Any], output: Path) -> Path:
    """Write lm-eval's files into ``output``: ``results_<time>.json`` and ``samples_<task>_<time>.jsonl`` of each task.

    Each run has its own time in the names, so nothing is overwritten. A file appears under its name only when it is
    complete, the results last: where they are, everything is.

    Returns:
        The path of the results.
    """
    output.mkdir(parents=True, exist_ok=True)
    time = datetime.datetime.now().isoformat().replace(":", "-")
    hashes = {}
    for task, samples in results["samples"].items():
        hashes[task] = hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))
        _write(output / f"samples_{task}_{time}.jsonl", (json.dumps(_sample(s), **_JSON) + "\n" for s in samples))
    summary = {key: value for key, value in results.items() if key != "samples"} | {"task_hashes": hashes}
    path = output / f"results_{time}.json"
    _write(path, [json.dumps(summary, indent=2, **_JSON) + "\n"])
    return path


_JSON: dict[str, Any] = {"default": handle_non_serializable, "ensure_ascii": False}


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A logged sample in the columns that lm-eval writes, which the datasets library can read back."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(request)}
        for i, request in enumerate(sample["arguments"])
    }
    return {
        **sample,
        "arguments": arguments,
        "resps": sanitize_list(sample["resps"]),
        "filtered_resps": sanitize_list(sample["filtered_resps"]),
        "target": str(sample["target"]),
    }


def _write(path: Path, chunks: Iterator[str] | Sequence[str]) -> None:
    with replacing(path) as file:
        file.writelines(chunk.encode() for chunk in chunks)


def summary_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each task, filter and metric: its value, standard error, 95% interval and number of documents.

    ``stderr`` and ``interval`` are ``None`` where lm-eval knows no standard error (F1 of CB).
    """
    rows = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_name}")
            documents = int(metrics["sample_len"])
            known = isinstance(stderr, float | int) and not math.isnan(stderr)
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filter_name,
                    "n_shot": results["n-shot"].get(task),
                    "value": float(value),
                    "stderr": float(stderr) if known else None,
                    "interval": interval(float(value), float(stderr), documents) if known else None,
                    "documents": documents,
                }
            )
    return rows


def interval(value: float, stderr: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a mean of ``count`` scores.

    Of a proportion it is Wilson's (1927), which stays inside [0, 1] and has a width even where all or none are right; a
    mean is one where its standard error is that of ones and zeros. Otherwise value ± z · stderr.
    """
    of_proportion = math.sqrt(value * (1 - value) / max(count - 1, 1)) if 0 <= value <= 1 else math.inf
    if not math.isclose(stderr, of_proportion, rel_tol=1e-6, abs_tol=1e-12):
        return value - z * stderr, value + z * stderr
    center = (value + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count))
    return max(0.0, center - half), min(1.0, center + half)


def results_table(results: Mapping[str, Any]) -> Table:
    """``summary_rows`` for the terminal."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for header in ("task", "metric", "shots", "n", "value", "stderr", "95% interval"):
        # On a narrow terminal names are folded and numbers stay whole.
        is_name = header in ("task", "metric")
        table.add_column(header, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for row in summary_rows(results):
        low_high = row["interval"]
        table.add_row(
            row["task"],
            row["metric"],
            str(row["n_shot"] or 0),
            f"{row['documents']:,}",
            f"{row['value']:.4f}",
            "–" if row["stderr"] is None else f"{row['stderr']:.4f}",
            "–" if low_high is None else f"{low_high[0]:.4f} – {low_high[1]:.4f}",
        )
    return table
