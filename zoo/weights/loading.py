"""Decoders from checkpoints, and checkpoints from decoders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from zoo.config import CONFIG_FILE, not_a_decoder, save_spec
from zoo.encoder_decoder import EncoderDecoder
from zoo.encoder_decoder_config import AnySpec, load_any_spec
from zoo.model import Decoder
from zoo.registry import all_names, checkpoints, encoder_decoder_names, find_any_spec, unknown
from zoo.tokenizer import Tokenizer, check_vocab
from zoo.weights.convert import open_published, open_zoo, published_directory, shapes_of, skeleton
from zoo.weights.hub import download, is_hub_id
from zoo.weights.precision import floating_dtype
from zoo.weights.stream import tracked
from zoo.weights.target import ADAPTER_FILE, MAX_SHARD_BYTES, copy_tokenizer, new_directory, write_tensors


def load(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Decoder:
    """A trained decoder, in eval mode.

    Args:
        source: a zoo checkpoint directory, a directory in a published layout, a hub id, or a name of `zoo list`, which
            means ``checkpoints/NAME`` where that exists and else the hub id of its config.
        dtype: of the parameters; buffers such as the router's selection bias stay fp32.
        device: where they go, tensor by tensor.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: nothing to load under that name, a checkpoint that is not exactly what its config says, or an
            encoder-decoder.
    """
    _expect_decoder(source)
    directory = checkpoint_directory(source)
    with _opened(directory, dtype, progress) as (model, tensors):
        if not isinstance(model, Decoder):
            raise not_a_decoder(source)
        _fill(model, tensors, dtype, device)
    if (directory / ADAPTER_FILE).is_file():
        from zoo.finetune.adapter import attach

        attach(model, directory)
    return model


def load_encoder_decoder(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> EncoderDecoder:
    """A trained encoder-decoder, in eval mode; arguments and errors as ``load``."""
    with _opened(source, dtype, progress) as (model, tensors):
        if not isinstance(model, EncoderDecoder):
            raise ValueError(f"{source}: this is a decoder; use load")
        _fill(model, tensors, dtype, device)
    return model


def load_with_tokenizer(
    source: str | Path, *, dtype: str = "float32", device: str | None = None, progress: bool = False
) -> tuple[Decoder, Tokenizer]:
    """A trained decoder and the tokenizer that lies beside it, by settings as a command line spells them.

    Args:
        source: as for ``load``.
        dtype: name of a torch dtype, or "auto": bfloat16 where the device multiplies it natively, else float32.
        device: name of a torch device; by default the GPU if there is one.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: as ``load``; an unknown dtype or device; a tokenizer that is missing or larger than the embedding.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"device = {device!r}: give a torch device, such as cpu or cuda:0") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {device!r}: there is no CUDA device here; use cpu")
    torch_dtype = floating_dtype(dtype, place)
    _expect_decoder(source)
    directory = checkpoint_directory(source)
    tokenizer = Tokenizer.load(directory)
    model = load(directory, dtype=torch_dtype, device=place, progress=progress)
    check_vocab(tokenizer, model.config.vocab_size, str(source))
    return model, tokenizer


def checkpoint_directory(source: str | Path) -> Path:
    """The local directory that ``load`` reads for ``source``; its tokenizer files are there too.

    Raises:
        ValueError: no such directory or name, or a name without published weights.
    """
    path = Path(source)
    if path.exists():
        return path
    named = checkpoints().get(str(source))
    if named is not None:
        return named
    if str(source) in all_names():
        hub_id = find_any_spec(source).source
        if hub_id is None:
            raise ValueError(f"{source}: this model has no published weights; train it, or give a checkpoint directory")
        return download(hub_id)
    if is_hub_id(str(source)):
        return download(str(source))
    if path.name == str(source):
        raise unknown(source)
    return published_directory(path)


def save_model(
    model: Decoder | EncoderDecoder,
    spec: AnySpec,
    directory: str | Path,
    tokenizer_dir: str | Path | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``model`` as a zoo checkpoint directory. One that is there is replaced only once the new one is whole.

    Args:
        model: on any device, in any floating dtype; written as it is.
        spec: its name, family and config.
        directory: to make or replace.
        tokenizer_dir: where to copy tokenizer files from.
        max_shard_bytes: size of the files written.

    Raises:
        ValueError: the spec is of another architecture, ``directory`` is something else than a zoo checkpoint, or the
            tokenizer is larger than the embedding.
        OSError: it cannot be written, for example on a full disk; what was there is as it was.
    """
    if spec.model != model.config:
        raise ValueError(f"spec {spec.name!r} describes another architecture than the model's; give the model's config")
    tensors = ((name, tensor.detach().cpu()) for name, tensor in model.state_dict().items())
    write_zoo(tensors, spec, directory, tokenizer_dir, max_shard_bytes=max_shard_bytes)


def write_zoo(
    tensors: Iterable[tuple[str, Tensor]],
    spec: AnySpec,
    directory: str | Path,
    tokenizer_dir: str | Path | None,
    *,
    max_shard_bytes: int,
) -> None:
    """Write ``tensors``, the state of a model in its order, as ``save_model`` does; arguments and errors as there."""
    directory = Path(directory)
    is_checkpoint = (directory / CONFIG_FILE).is_file()
    if directory.exists() and not is_checkpoint and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: exists and is not a zoo checkpoint; choose another place")
    with new_directory(directory, replace=True) as aside:
        if tokenizer_dir is not None:
            copy_tokenizer(Path(tokenizer_dir), aside, spec.model.vocab_size)
        write_tensors(aside, tensors, max_shard_bytes)
        save_spec(spec, aside / CONFIG_FILE)


def _expect_decoder(source: str | Path) -> None:
    """Refuse the name of an encoder-decoder before anything is downloaded."""
    if str(source) in encoder_decoder_names() and not Path(source).exists():
        raise not_a_decoder(source)


@contextmanager
def _opened(
    source: str | Path, dtype: torch.dtype, progress: bool
) -> Iterator[tuple[Decoder | EncoderDecoder, Iterable[tuple[str, Tensor]]]]:
    """The model that ``source`` names, without memory, and its tensors under our names, checked but not read yet."""
    directory = checkpoint_directory(source)
    if (directory / CONFIG_FILE).is_file():
        model = skeleton(load_any_spec(directory / CONFIG_FILE).model)
        with open_zoo(directory, shapes_of(model)) as tensors:
            yield model, ((name, tensors.read(name)) for name in tensors.entries)
    else:
        with open_published(published_directory(directory), dtype) as (spec, stream):
            yield skeleton(spec.model), tracked(stream, "loading", progress)


def _fill(
    model: Decoder | EncoderDecoder,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: str | torch.device,
) -> None:
    """Give ``model`` the ``tensors``, which are all of its state, and put it into eval mode."""
    buffers = dict(model.named_buffers())
    state = {
        name: tensor.to(device=device, dtype=buffers[name].dtype if name in buffers else dtype)
        for name, tensor in tensors
    }
    model.load_state_dict(state, assign=True)
    model.eval()
