"""Writing checkpoint directories: shard by shard, aside, and into place only when whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file

from zoo.files import sync
from zoo.weights.source import INDEX_FILE, SINGLE_FILE

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 2 * 1024**3
"""Default size of a shard, and with it of what is held in memory besides the tensor at hand."""

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that travel with the weights, byte for byte."""


@contextmanager
def new_directory(out: Path, replace: bool = False) -> Iterator[Path]:
    """A directory to write into that becomes ``out`` at the end of the block, synced to disk, or vanishes on error.

    Args:
        out: final path. Its parents are made.
        replace: replace a directory that is there; it stays untouched until the new one is whole.

    Raises:
        ValueError: ``out`` exists and is not to be replaced.
        OSError: it cannot be written, for example on a full disk; ``out`` is as it was.
    """
    if out.exists() and not replace and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: already exists; choose another place or remove it")
    target = out.resolve()  # through a link, what it points to is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield aside
        mask = _umask()
        for path in aside.iterdir():
            path.chmod(0o666 & ~mask)  # safetensors and mkdtemp make what only the owner can read
            sync(path)
        aside.chmod(0o777 & ~mask)
        sync(aside)
        if replace:
            _swap(aside, target)
        else:
            aside.replace(target)
        sync(target.parent)
    except SafetensorError as error:
        raise OSError(f"{out}: cannot be written ({error}); free some space; nothing was changed there") from None
    except OSError as error:
        raise OSError(f"{out}: cannot be written ({error.strerror or error}); nothing was changed there") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_tensors(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write ``tensors`` as ``model.safetensors``, or as shards with an index where one file would be too large.

    A shard holds at most ``max_shard_bytes``, or one larger tensor.
    """
    shard: dict[str, Tensor] = {}
    size = total = 0
    parts: list[list[str]] = []

    def flush() -> None:
        save_file(shard, directory / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        # A view into an op's result would keep the whole of it alive, and safetensors refuses shared storage.
        is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
        shard[name] = tensor.clone() if is_view else tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        (directory / "part-0").rename(directory / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(parts):
        file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        (directory / f"part-{i}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, directory: Path, vocab_size: int) -> None:
    """Copy the tokenizer files of ``source`` byte for byte, if it has any.

    Raises:
        ValueError: the tokenizer has more ids than the embedding has rows, ``vocab_size``.
    """
    from zoo.tokenizer import Tokenizer, check_vocab

    if any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        check_vocab(Tokenizer.load(source), vocab_size, str(source))
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _swap(aside: Path, out: Path) -> None:
    """Put ``aside`` in the place of ``out``. What was there is renamed away first, and back if that fails."""
    if not out.exists():
        aside.replace(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    out.replace(old)
    try:
        aside.replace(out)
    except OSError:
        old.replace(out)
        raise
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
