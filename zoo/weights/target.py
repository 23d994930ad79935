"""Writing checkpoint directories: shard by shard, aside, and into place only when whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from zoo.files import sync
from zoo.weights.source import INDEX_FILE, SINGLE_FILE

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 2 * 1024**3
"""Default size of a shard."""

DATA_START = 128 * 1024
"""Of a shard: a page begins there. Where it is mapped, tensors of whole cache lines, as matrices are, begin on one;
where they begin between two, decoding takes longer (``scripts/alignment_table.py``)."""
HEADER_BYTES = DATA_START - 8
"""Room for the header of a shard, after the eight bytes of its length; tensors that find none go to the next shard."""
HEADER_MARGIN, ENTRY_MARGIN = 64, 256
"""Of it for what is not a tensor, and for a tensor beside its name."""

SAFETENSORS_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

ADAPTER_FILE = "adapter.yaml"
"""Beside the weights of a checkpoint: an adapter that no weights can express (``zoo/finetune/adapter.py``)."""

TOKENIZER_FILES = (
    "tokenizer.model",
    "spiece.model",
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

    A shard holds at most ``max_shard_bytes``, or one larger tensor. Each tensor is on its way to the disk before the
    next is asked for: no more than one is held.
    """
    shards: list[_Shard] = []
    try:
        for name, tensor in tensors:
            if not shards or not shards[-1].has_room(name, tensor, max_shard_bytes):
                if shards:
                    shards[-1].close()
                shards.append(_Shard(directory / f"part-{len(shards)}"))
            shards[-1].write(name, tensor)
            del tensor  # or it would still be held while the next one is made
    finally:
        if shards:
            shards[-1].close()
    if len(shards) == 1:
        shards[0].path.rename(directory / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        shard.path.rename(directory / file)
        weight_map |= dict.fromkeys(shard.header, file)
    total = sum(shard.size for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Shard:
    """One safetensors file that is written tensor by tensor.

    Its header goes before the data and is known after them: room is left for it, and filled up with blanks, as the
    format allows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, dict[str, Any]] = {}
        self.size = 0
        self._header_bytes = HEADER_MARGIN
        self._file = path.open("wb")
        self._file.seek(DATA_START)

    def has_room(self, name: str, tensor: Tensor, max_bytes: int) -> bool:
        """Whether ``tensor`` fits, its name into the header and its elements to where they are aligned."""
        fits = self.size + tensor.nbytes <= max_bytes and self.size % tensor.element_size() == 0
        return fits and self._header_bytes + _entry_bytes(name) <= HEADER_BYTES

    def write(self, name: str, tensor: Tensor) -> None:
        import torch

        end = self.size + tensor.nbytes
        kind = SAFETENSORS_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        self.header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [self.size, end]}
        self._header_bytes += _entry_bytes(name)
        if tensor.numel():
            self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.size = end

    def close(self) -> None:
        """Write the header and close the file; once more does nothing."""
        if self._file.closed:
            return
        with self._file:
            header = json.dumps({"__metadata__": {"format": "pt"}, **self.header}).encode()
            assert len(header) <= HEADER_BYTES
            self._file.seek(0)
            self._file.write(HEADER_BYTES.to_bytes(8, "little") + header.ljust(HEADER_BYTES))


def _entry_bytes(name: str) -> int:
    """At most so many of a header are for one tensor."""
    return len(json.dumps(name)) + ENTRY_MARGIN


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
