"""What is measured of a trained model: scores of every item, validation loss, expert load."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zoo.config_reading import from_dict
from zoo.files import write_text
from zoo.harness.measurement import EVALUATION_BATCH, Measurement, Point
from zoo.harness.runner import evaluate, load_tasks
from zoo.model import Decoder
from zoo.moe.stats import expert_counts, expert_load
from zoo.tokenizer import Tokenizer
from zoo.training.data import TokenDataModule
from zoo.training.data.packing import PADDING_DOCUMENT
from zoo.training.loss import label_count
from zoo.weights import load

LOAD_ITEMS = 64
"""Items of each task whose requests show which experts fire for it."""


def main(argv: Sequence[str]) -> int:
    """Measure what ``argv[0]``, a ``Measurement`` as JSON, says; a study calls it in a process of its own."""
    try:
        measurement = from_dict(Measurement, json.loads(argv[0]), "measurement")
        for point in measurement.points:
            measure(measurement, point)
    except (ValueError, OSError) as error:
        print(f"zoo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def measure(of: Measurement, point: Point) -> None:
    """Write scores of every item, validation perplexity and expert load of a checkpoint into ``point.file``."""
    model, tokenizer = load(point.weights), Tokenizer.load(of.tokenizer)
    results = evaluate(
        model,
        tokenizer,
        list(of.tasks),
        data_root=Path(of.data_root) if of.data_root else None,
        limit=of.limit,
        batch_size=EVALUATION_BATCH,
        output=Path(point.samples),
        seed=of.seed,
        name=of.name,
    )
    measured = {
        "scores": {task: item_scores(results, task) for task in of.tasks},
        "guess": {task: guess_rate(results, task) for task in of.tasks},
        **validate(model, Path(of.data), of.sequence_length, of.batch_size),
    }
    if point.last and model.config.moe is not None:
        measured["task_load"] = {task: task_load(results, task, model, tokenizer) for task in of.tasks}
    file = Path(point.file)
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(measured, indent=1) + "\n")


def check_item_scores(tasks: Sequence[str], data_root: Path | None) -> None:
    """Answer the first item of every task anyhow, so that one without item scores is found before a training.

    Args:
        tasks: names; none is a group.
        data_root: mirror of the data sets; by default they come from the hub.

    Raises:
        ValueError: naming a task whose data set cannot be read or is empty, or whose first metric has no item scores.
    """
    for name, task in load_tasks(tasks, data_root).items():
        document = next(iter(task.eval_docs), None)
        if document is None:
            raise ValueError(f"task {name!r}: its data set has no items; name another task")
        requests = task.construct_requests(document, "", metadata=(name, 0, 1))
        requests = requests if isinstance(requests, list) else [requests]
        scores = task.process_results(document, [_ANSWERS[request.request_type] for request in requests])
        _item_score(name, scores, _first_metric(task.config.metric_list))


_ANSWERS: dict[str, Any] = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0, "generate_until": "answer"}
"""Kind of request → a response as a model would give it."""


def item_scores(results: Mapping[str, Any], task: str) -> dict[str, float]:
    """The task's first metric of every item, by number and hash of the document.

    Raises:
        ValueError: ``task`` is a group, or that metric is no number for an item.
    """
    if task not in results["samples"]:
        raise ValueError(f"task {task!r}: it has no items of its own; name the tasks of the group instead")
    metric = _first_metric(results["configs"][task]["metric_list"])
    samples = results["samples"][task]
    return {f"{sample['doc_id']}/{sample['doc_hash']}": _item_score(task, sample, metric) for sample in samples}


def _first_metric(metrics: Sequence[Mapping[str, Any]] | None) -> str | None:
    return str(metrics[0]["metric"]) if metrics else None


def _item_score(task: str, scores: Mapping[str, Any], metric: str | None) -> float:
    score = scores.get(metric) if metric else None
    if not isinstance(score, int | float):
        raise ValueError(
            f"task {task!r}: its first metric, {metric!r}, has no score for each item; "
            "name a task that begins with one that has, such as acc"
        )
    return float(score)


def guess_rate(results: Mapping[str, Any], task: str) -> float:
    """Score without understanding: of random choices, or of the one answer that is right most often if that is more."""
    samples = results["samples"][task]
    constant = Counter(str(sample["target"]) for sample in samples).most_common(1)[0][1] / len(samples)
    if results["configs"][task]["output_type"] != "multiple_choice":
        return constant
    return max(constant, sum(1 / len(sample["filtered_resps"]) for sample in samples) / len(samples))


def task_load(results: Mapping[str, Any], task: str, model: Decoder, tokenizer: Tokenizer) -> list[list[float]]:
    """[MoE layers][E], each layer's share of assignments by expert on the first requests of ``task``."""
    counts = []
    with torch.inference_mode():
        for sample in results["samples"][task][:LOAD_ITEMS]:
            text = "".join(part for part in sample["arguments"][0] if isinstance(part, str))
            tokens = tokenizer.encode(text, bos=tokenizer.add_bos)[: model.config.max_position_embeddings]
            counts.append([expert_counts(r) for r in model(torch.tensor([tokens])).router_outputs])
    return [expert_load(torch.stack(layer).sum(dim=0)).tolist() for layer in zip(*counts, strict=True)]


def validate(model: Decoder, data: Path, sequence_length: int, batch_size: int) -> dict[str, Any]:
    """Mean loss (nats a token) over the validation split, and each MoE layer's share of assignments by expert.

    Args:
        data: token data as ``zoo data build`` makes it.
        sequence_length: tokens.
        batch_size: sequences in one forward.
    """
    module = TokenDataModule(data, sequence_length, batch_size)
    total, labels, counts = 0.0, 0, []
    with torch.inference_mode():
        loader: Any = module.val_dataloader()
        for batch in loader:
            output = model(batch["input_ids"], document_ids=batch["document_ids"], logits_to_keep=None)
            total += float(model.nll(output.hidden, batch["labels"]))
            labels += int(label_count(batch["labels"]))
            tokens = batch["document_ids"] != PADDING_DOCUMENT
            counts.append([expert_counts(r, tokens) for r in output.router_outputs])
    layers = [torch.stack(layer).sum(dim=0) for layer in zip(*counts, strict=True)]
    return {"validation_loss": total / labels, "expert_load": [expert_load(layer).tolist() for layer in layers]}
