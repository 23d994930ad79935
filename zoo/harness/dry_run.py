"""What a study would train, read and cost, without doing any of it: ``zoo compare STUDY --dry-run``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id

from zoo.accounting import count_parameters, training_flops
from zoo.harness.entries import Model
from zoo.harness.study import Cluster, Study, pairs, resolve_models
from zoo.harness.tasks import data_set, with_leaf_tasks
from zoo.model import Decoder
from zoo.parallel.estimate import Estimate, Workload
from zoo.parallel.hardware import find_gpu
from zoo.parallel.planner import search
from zoo.tokenizer import Tokenizer
from zoo.training.data.sources import JSONL_SUFFIXES, PARQUET_SUFFIXES, TEXT_SUFFIXES

Notify = Callable[[str], None]


def dry_run(study: Study, data_root: Path | None, notify: Notify) -> dict[str, Any]:
    """Build every model on the meta device, look up every data set, estimate time and cost.

    Args:
        data_root: mirror of the evaluation data sets.
        notify: told what is looked at.

    Returns:
        Plain data: ``models`` (with ``gpu_hours`` and ``dollars`` of all seeds, where the study has a ``cluster``),
        ``compare`` (pairs), ``sources`` and ``tasks`` (where each is read from).

    Raises:
        ValueError: what running the study would refuse before it starts, a name of a data set that the hub would not
            take, or a model that does not fit the cluster.
        FileNotFoundError: a source is a file that is not there.
    """
    study = with_leaf_tasks(study)
    config = study.data
    models = resolve_models(study, config.vocab_size or Tokenizer.load(str(config.tokenizer)).vocab_size)
    rows = []
    for model in models:
        notify(f"{model.name}: building it on the meta device")
        rows.append(_model(study, model))
    return {
        "study": study.name,
        "seeds": list(study.seeds),
        "tokens": study.training.tokens,
        "models": rows,
        "compare": [[pair.first, pair.second, pair.matched_by] for pair in pairs(study, models)],
        "sources": [_source(location) for location in config.sources],
        "tasks": _tasks([*study.tasks.all, *config.tasks], data_root),
    }


# ---------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------


def _model(study: Study, model: Model) -> dict[str, Any]:
    config, training = model.spec.model, study.training
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in Decoder(config).parameters())
    parameters, flops = count_parameters(config), training_flops(config, training.sequence_length)
    assert built == parameters.total
    row: dict[str, Any] = {
        "name": model.name,
        "total_parameters": built,
        "active_parameters": parameters.active,
        "training_flops_per_token": flops,
        "training_flops": flops * training.tokens,
    }
    if study.cluster is not None:
        best = _fastest(study, model, study.cluster)
        hours = len(study.seeds) * training.steps * best.step_seconds * study.cluster.gpus / 3600
        row["layout"] = {"strategy": best.layout.plan, **_sizes(best)}
        row["layout"] |= {"recompute": best.setting.recompute, "reshard_after_forward": best.setting.reshard}
        row["micro_batches"], row["micro_batch"] = best.setting.micro_batches, best.setting.micro_batch
        row["memory_bytes"], row["step_seconds"] = best.total_memory, best.step_seconds
        row["gpu_hours"], row["dollars"] = hours, hours * study.cluster.dollars_per_gpu_hour
    return row


def _sizes(best: Estimate) -> dict[str, int]:
    sizes = best.layout.sizes
    return {"tensor": sizes.tensor, "expert": sizes.expert, "replicate": sizes.data_replicate}


def _fastest(study: Study, model: Model, cluster: Cluster) -> Estimate:
    """The layout that the study gives the model, or else the fastest of all that fit."""
    training, layout = study.training, model.layout
    precision = training.fit.get("trainer", {}).get("precision", "32-true")
    work = Workload(
        config=model.spec.model,
        gpu=find_gpu(cluster.gpu),
        gpus=cluster.gpus,
        sequence_length=training.sequence_length,
        global_batch=training.sequences,
        precision="32-true" if precision == "32-true" else "bf16-mixed",
    )
    sizes = {key: value for key, value in layout.items() if key in ("tensor", "expert", "replicate")}
    found = search(work, (layout["strategy"], sizes) if layout else None)
    if not found.fitting:
        nearest = min(found.rejected, key=lambda one: one.needed or 0)
        raise ValueError(f"model {model.name!r} on {cluster.gpus} {cluster.gpu}: {nearest.plan}: {nearest.reason}")
    return found.fitting[0]


# ---------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------


def _source(location: str) -> dict[str, str]:
    """Where training text is read from."""
    path = location.partition(":")[0]
    if Path(location).is_file():
        return {"name": location, "from": "file"}
    if Path(path).is_dir():
        return {"name": location, "from": "directory"}
    suffixes = TEXT_SUFFIXES + JSONL_SUFFIXES + PARQUET_SUFFIXES
    if location.startswith((".", "/", "~")) or Path(location).suffix.lower() in suffixes:
        raise FileNotFoundError(f"{location}: no such file; correct the study's data.sources")
    return {"name": location, "from": _on_hub(path, f"data.sources: {location!r}")}


def _tasks(names: list[str], data_root: Path | None) -> list[dict[str, str]]:
    """Where each task's items are read from."""
    rows = []
    for name in names:
        path, config = data_set(name)
        row = {"name": name, "data_set": f"{path}:{config}" if config else path}
        if not path:
            row["from"] = "generated"
        elif data_root is None:
            row["from"] = _on_hub(path, f"task {name!r}")
        elif (data_root / path).is_dir():
            row["from"] = "mirror"
        else:
            raise ValueError(f"task {name!r}: its data set is not in the mirror, looked for {data_root / path}")
        rows.append(row)
    return rows


def _on_hub(name: str, where: str) -> str:
    """Only the form of the name is checked: nothing is fetched."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{where}: no name of a data set ({' '.join(str(error).split())})") from None
    return "hub"
