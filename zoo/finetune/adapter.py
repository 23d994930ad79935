"""Adapters on disk: ``adapter.yaml`` says of which base and what kind, ``adapter.safetensors`` holds what was trained.

A run with an adapter leaves one in ``adapter``, and in ``final`` a checkpoint like any other: with the adapter merged
where that can be, else with the base's weights and the adapter beside them, which ``zoo.load`` puts together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.config import CONFIG_FILE, ModelSpec, from_dict, load_yaml, save_spec, to_dict
from zoo.files import write_text
from zoo.finetune.apply import adapted_modules, apply, is_mergeable, merge
from zoo.finetune.config import FinetuneConfig
from zoo.model import Decoder
from zoo.weights.loading import save_model
from zoo.weights.target import ADAPTER_FILE, copy_tokenizer, new_directory, write_tensors

ADAPTER_WEIGHTS = "adapter.safetensors"


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What ``adapter.yaml`` holds.

    Attributes:
        base: the model that it was trained on.
        base_sha256: of that model's weights (``weights_hash``).
        finetune: how it was trained, its kind and sizes with it.
    """

    base: ModelSpec
    base_sha256: str
    finetune: FinetuneConfig


def weights_hash(model: Decoder) -> str:
    """SHA-256 of the names, dtypes, shapes and values of a model's state, however its files cut it up."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def trained_state(model: Decoder) -> dict[str, Tensor]:
    """Name → value of every parameter that is trained: the adapter's, and of the model what is trained beside it."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def base_state(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The state of ``model`` without its adapters, under the names that it has without them."""
    places = [f"{name}." for name, _ in adapted_modules(model)]
    for name, tensor in model.state_dict().items():
        place = next((place for place in places if name.startswith(place)), None)
        if place is None:
            yield name, tensor.detach().cpu()
        elif name.startswith(f"{place}base."):
            yield place + name.removeprefix(f"{place}base."), tensor.detach().cpu()


def read_adapter_spec(directory: str | Path) -> AdapterSpec:
    """What ``adapter.yaml`` of ``directory`` says.

    Raises:
        ValueError: it is missing, or not one.
    """
    path = Path(directory) / ADAPTER_FILE
    if not path.is_file():
        raise ValueError(f"{directory}: no {ADAPTER_FILE} in it; give the adapter directory of a run")
    return from_dict(AdapterSpec, load_yaml(path), str(path))


def load_adapter(model: Decoder, directory: str | Path) -> None:
    """Put the adapter in ``directory`` into ``model``; in place.

    Args:
        model: the base, with the weights that the adapter was trained on, in fp32.
        directory: with ``adapter.yaml``.

    Raises:
        ValueError: another base, or files that are not whole.
    """
    spec = read_adapter_spec(directory)
    if weights_hash(model) != spec.base_sha256:
        raise ValueError(
            f"{directory}: this adapter belongs to other weights, of {spec.base.name} in float32; give the model that "
            "it was trained on"
        )
    attach(model, directory)


def attach(model: Decoder, directory: str | Path) -> None:
    """``load_adapter`` without a look at the base: for an adapter that lies beside its base's weights.

    Raises:
        ValueError: an adapter for another architecture, or a damaged file.
    """
    spec, path = read_adapter_spec(directory), Path(directory) / ADAPTER_WEIGHTS
    if model.config != spec.base.model:
        raise ValueError(f"{directory}: this adapter is for {spec.base.name}, which is another architecture")
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy the adapter directory again") from None
    training = model.training
    apply(model, spec.finetune)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path}: {name!r} has shape {found.get(name)}, and {ADAPTER_FILE} needs {shapes.get(name)}; copy the "
            "adapter directory again"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    model.requires_grad_(True)
    model.train(training)


def save_adapter(model: Decoder, spec: AdapterSpec, directory: str | Path) -> None:
    """Write what was trained of ``model`` to ``directory``, which is replaced once the new one is whole.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    with new_directory(Path(directory), replace=True) as aside:
        _write(model, spec, aside)


def save_finetuned(
    model: Decoder, spec: ModelSpec, adapter: AdapterSpec, directory: Path, tokenizer_dir: Path | None
) -> None:
    """Write ``model`` as a zoo checkpoint: its adapters merged (also in ``model``), or beside it where they cannot be.

    Raises:
        ValueError: as ``zoo.weights.save_model``.
        OSError: it cannot be written.
    """
    if all(is_mergeable(module) for _, module in adapted_modules(model)):
        merge(model)
        save_model(model, spec, directory, tokenizer_dir)
        return
    with new_directory(directory, replace=True) as aside:
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, aside, spec.model.vocab_size)
        write_tensors(aside, base_state(model))
        save_spec(spec, aside / CONFIG_FILE)
        _write(model, adapter, aside)


def _write(model: Decoder, spec: AdapterSpec, directory: Path) -> None:
    save_file(trained_state(model), directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_text(directory / ADAPTER_FILE, OmegaConf.to_yaml(OmegaConf.create(to_dict(spec))))
