"""The model card of a released checkpoint: metadata as the Hugging Face hub reads it, and text for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from omegaconf import OmegaConf

from zoo.cli.text import short
from zoo.config import ModelConfig
from zoo.harness.facts import FactsConfig
from zoo.harness.headline import percent

LICENCE = "apache-2.0"
"""Of the weights, as of the code; their data has its own."""


def model_card(record: Mapping[str, Any], config: ModelConfig, load_file: str) -> str:
    """The card as Markdown under a YAML head.

    Args:
        record: content of ``release.json``.
        config: of the model.
        load_file: name of the picture of the expert load, shown where the model has experts.
    """
    parts = [
        f"---\n{_metadata(record).to_yaml()}\n---",
        f"# {record['name']}",
        _what(record, config),
        "## Run it",
        _commands(record),
        "## Scores",
        _scores(record),
    ]
    if record["expert_load"]:
        parts += ["## Expert load", _load(record, load_file)]
    parts += ["## Data", _data(record), "## Training", _training(record)]
    return "\n\n".join(parts) + "\n"


def _metadata(record: Mapping[str, Any]) -> ModelCardData:
    data = record["data"]
    return ModelCardData(
        language="en",
        license=LICENCE,
        library_name="moe-zoo",
        pipeline_tag="text-generation",
        tags=[record["family"], *(["mixture-of-experts"] if record["expert_load"] else [])],
        model_name=record["name"],
        eval_results=[
            EvalResult(
                task_type="question-answering",
                dataset_type=data["name"],
                dataset_name=task,
                dataset_config=task.removeprefix("facts_"),
                dataset_split="validation",
                metric_type=metric,
                metric_value=round(100 * record["scores"][task]["value"], 2),
                metric_name=f"{metric}, %",
            )
            for task, metric in record["metrics"].items()
        ],
    )


def _what(record: Mapping[str, Any], config: ModelConfig) -> str:
    parameters = record["parameters"]
    sizes = f"{short(parameters['total'])} parameters"
    experts = ""
    if config.moe is not None:
        moe = config.moe
        sizes += f", {short(parameters['active'])} of them active for a token"
        shared = f", and {moe.num_shared_experts} shared ones that it always goes through" * bool(
            moe.num_shared_experts
        )
        experts = (
            f" In its MoE layers a token goes through {moe.top_k} of {moe.num_experts} experts of width "
            f"{moe.moe_intermediate_size}{shared}."
        )
    return (
        f"A language model of the {record['family']} family with {sizes}, trained from nothing on {record['tokens']:,} "
        f"tokens.{experts} It knows the facts of its data and the form of its questions and nothing else: something to "
        "try commands, tests and analyses with."
    )


def _commands(record: Mapping[str, Any]) -> str:
    """``zoo generate`` with what it prints, and ``zoo eval`` on the items of the scores."""
    sample, name = record["sample"], record["name"]
    prompt = shlex.quote(sample["prompt"]).replace("\n", "\n> ")
    tasks = ",".join(record["metrics"])
    changed = {key: value for key, value in record["data"]["config"].items() if value != getattr(FactsConfig(), key)}
    lines = [f"$ zoo generate {name} --max-new-tokens {sample['tokens']} --prompt {prompt}", sample["text"]]
    where = ""
    if changed:  # the items that come with the tasks are of the default settings
        settings = " ".join(f"{key}={value}" for key, value in changed.items())
        lines.append(f"$ zoo data make facts --out facts --set {settings}")
        where = " --data-root facts/hub"
    if record["limit"] is not None:
        where += f" --limit {record['limit']}"
    block = "\n".join(["```console", *lines, f"$ zoo eval {name} --tasks {tasks}{where}", "```"])
    return f"{block}\n\nThe prompt is the first question of the evaluation, whether the answer is right or not."


def _scores(record: Mapping[str, Any]) -> str:
    header = [
        "| score | items | guessing | these weights | 95% interval | p | as trained |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    rows = []
    for skill, tasks in record["tasks"].items():
        for name in (skill, *tasks):
            score = record["scores"][name]
            shown = [
                f"**{name}**" if name == skill else name,
                f"{score['items']:,}",
                percent(score["guess"]),
                percent(score["value"]),
                f"{percent(score['low'])} to {percent(score['high'])}",
                "< 1e-6" if score["p_value"] < 1e-6 else f"{score['p_value']:.2g}",
                percent(record["study_scores"][name]),
            ]
            rows.append("| " + " | ".join(shown) + " |")
    reading = (
        f"These weights are stored in {record['dtype']} and evaluated in float32; *as trained* is what the study "
        "measured before. A skill is the mean of its tasks. Intervals are 95% bootstrap intervals over the items: they "
        "speak about other items of the same kind, not about other training runs. A score of 0% or 100% has an "
        "interval of no width; a true rate up to 3 ÷ items away is still compatible with it. p is the probability of "
        "so many right answers by guessing (exact one-sided binomial test). Perplexity of the validation documents: "
        f"{record['perplexity']:.3f}."
    )
    return "\n".join([*header, *rows]) + "\n\n" + reading


def _load(record: Mapping[str, Any], load_file: str) -> str:
    extremes = [(len(layer) * min(layer), len(layer) * max(layer)) for layer in record["expert_load"]]
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    return (
        f"![share of assignments by layer and expert]({load_file})\n\nOn the validation documents, experts get between "
        f"{low:.2f} and {high:.2f} of an equal share."
    )


def _data(record: Mapping[str, Any]) -> str:
    data = record["data"]
    return (
        f"`{data['name']}`, the data set that comes with moe-zoo: sentences, questions and passages that a program "
        f"makes of facts. Source of the facts: {data['source']}. Licence of the data: {data['licence']}. Nothing else "
        "was trained on. The questions of the knowledge score are about facts that the training text states and never "
        "asks for; the passages of the comprehension scores share no fact with those of training.\n\n"
        f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create(data['config'])).strip()}\n```"
    )


def _training(record: Mapping[str, Any]) -> str:
    release = f"zoo release STUDY_DIR {record['model']} --seed {record['seed']} --to checkpoints/{record['name']}"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"Model `{record['model']}` of the study `{record['study']}` with seed {record['seed']}, made by\n\n"
        f"```console\n$ {record['command']}\n$ {release} --dtype {record['dtype']}\n```\n\n"
        f"where STUDY_DIR is the directory of the first. Architecture: `zoo.yaml`. Code of the training: "
        f"{', '.join(record['commits'])}. Released {record['date']} with {versions}.\n\n"
        f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create(record['training'])).strip()}\n```"
    )
