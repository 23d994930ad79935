"""Reading safetensors directories one tensor at a time, and refusing whatever is not exactly what is expected."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, safe_open

from zoo.registry import read_json
from zoo.weights.ops import Op, Region, Shape

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = frozenset((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"))
COMPARED_ROWS = 4096
DTYPES = frozenset(("F32", "F16", "BF16"))
HELD_BYTES = 8 * 2**20
"""Of whole tensors from an open file: its pages count as ours, and to open it again takes a third of a millisecond."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a source: the file it stands in, its shape and its safetensors dtype."""

    path: Path
    shape: Shape
    dtype: str


class TensorSource:
    """The tensors of a directory with ``model.safetensors``, or with shards and their index.

    One file is mapped at a time. Close it, or use it as a context manager.

    Args:
        directory: that holds them.
        prefix: of names in the files, which are known without it; others are as they are.

    Raises:
        ValueError: there are no safetensors, a file is damaged, or the index and the files disagree.
    """

    mapped = True
    """Whether a tensor that is read is a view of its file, and takes no memory of its own."""

    def __init__(self, directory: Path, prefix: str = "") -> None:
        self.directory = directory
        self._open_path: Path | None = None
        self._held = 0
        self._starts: dict[Path, dict[str, int]] = {}
        self._stack = ExitStack()
        self.entries: dict[str, Entry] = {}
        for path in weight_files(directory):
            self._add_file(path)
        self._check_index()
        self._stored = without_prefix({name: name for name in self.entries}, prefix, directory)
        self.entries = {name: self.entries[stored] for name, stored in self._stored.items()}

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def dtype(self, name: str) -> str:
        """Name that torch gives to the dtype of a tensor, such as ``bfloat16``."""
        return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[self.entries[name].dtype]

    def close(self) -> None:
        """Close the open file, if there is one."""
        self._stack.close()
        self._open_path = None
        self._held = 0

    def let_go(self) -> None:
        """Close the open file once tensors of ``HELD_BYTES`` were read: else its pages add up to all of it."""
        if self._held >= HELD_BYTES:
            self.close()

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, on the CPU in the dtype that it is stored in."""
        tensor: Tensor = self._file(self.entries[name].path).get_tensor(self._stored[name])
        self._held += tensor.nbytes
        return tensor

    def read_stacked(self, names: Sequence[str]) -> Tensor:
        """Tensors of one shape and dtype, [len(names), *shape], read to where they go by as many threads as torch has.

        A mapping takes longer: the kernel has to enter every page of the file, and to forget it.

        Raises:
            ValueError: a file ends before they do.
        """
        import torch

        dtype = getattr(torch, self.dtype(names[0]))
        stacked = torch.empty(len(names), *self.entries[names[0]].shape, dtype=dtype)
        rows = stacked.view(len(names), -1).view(torch.uint8).numpy()

        def read(i: int) -> None:
            path, view = self.entries[names[i]].path, memoryview(rows[i])
            with path.open("rb", buffering=0) as file:
                file.seek(self._start(names[i]))
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise ValueError(f"{path}: ends within tensor {names[i]!r}; copy or download it again")
                    view = view[count:]

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(read, range(len(names))))
        return stacked

    def read_region(self, name: str, region: Region) -> Tensor:
        """A box of the tensor ``name``; nothing else of it is read."""
        tensor: Tensor = self._file(self.entries[name].path).get_slice(self._stored[name])[region]
        return tensor

    def _file(self, path: Path) -> Any:
        if path != self._open_path:
            self.close()
            self._handle = self._stack.enter_context(_safe_open(path))
            self._open_path = path
        return self._handle

    def _start(self, name: str) -> int:
        """First byte of the tensor ``name`` in its file."""
        path = self.entries[name].path
        if path not in self._starts:
            self._starts[path] = _starts(path)
        return self._starts[path][self._stored[name]]

    def _add_file(self, path: Path) -> None:
        with _safe_open(path) as handle:
            for name in handle.keys():  # noqa: SIM118 the handle is no mapping
                if name in self.entries:
                    raise ValueError(f"{path}: tensor {name!r} is in {self.entries[name].path.name} too; remove one")
                view = handle.get_slice(name)
                self.entries[name] = Entry(path, tuple(view.get_shape()), view.get_dtype())

    def _check_index(self) -> None:
        index = self.directory / INDEX_FILE
        if not index.is_file():
            return
        listed = read_json(index)["weight_map"]
        found = {name: entry.path.name for name, entry in self.entries.items()}
        wrong = sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"{index}: lists {name!r} in {listed.get(name)}, but it is in {found.get(name)}; "
                f"download the checkpoint again{_more(wrong)}"
            )


def _starts(path: Path) -> dict[str, int]:
    """Name → first byte of each tensor of a file that the library took."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def without_prefix(named: Mapping[str, T], prefix: str, where: Path) -> dict[str, T]:
    """``named`` with ``prefix`` taken off the names that begin with it.

    Raises:
        ValueError: two would have one name.
    """
    short = {name.removeprefix(prefix): value for name, value in named.items()}
    if len(short) < len(named):
        name = next(name for name in named if prefix + name in named)
        raise ValueError(f"{where}: tensor {name!r} is there with {prefix!r} before it and without; remove one")
    return short


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, those of its index where it has one.

    Raises:
        ValueError: there are none, only pickles, or the index names a file outside the directory.
    """
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if index.is_file() and single.is_file():
        raise ValueError(f"{directory}: holds both {INDEX_FILE} and {SINGLE_FILE}; remove the one that is not wanted")
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise ValueError(f"{directory / pickles[0]}: {_PICKLE}")
        raise ValueError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is in it; give a checkpoint directory")
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, Mapping) or not listed:
        raise ValueError(f"{index}: 'weight_map' is missing or empty; download the checkpoint again")
    return [shard_path(directory, index, name) for name in sorted(set(map(str, listed.values())))]


_PICKLE = (
    "pickled weights can run code when they are read and are not supported; save them as safetensors first "
    "(model.save_pretrained in transformers)"
)


def refuse_pickle(path: Path) -> None:
    """Refuse a file that is offered as weights but is a pickle, by its suffix."""
    if path.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{path}: {_PICKLE}")


def shard_path(directory: Path, index: Path, name: str) -> Path:
    """The file ``name`` of an index, which must lie in the directory itself.

    Raises:
        ValueError: it is not there, lies elsewhere, links included, or is a pickle.
    """
    path = directory / name
    refuse_pickle(path)
    roots = [directory.resolve()]
    if directory.parent.name == "snapshots":  # the hub's cache: snapshots/REVISION/FILE links to ../../blobs/HASH
        roots.append(directory.resolve().parents[1] / "blobs")
    if path.name != name or not any(path.resolve().parent == root for root in roots):
        raise ValueError(f"{index}: {name!r} lies outside the checkpoint directory; shards must be files in it")
    if not path.is_file():
        raise ValueError(f"{index}: {name!r} is not in the directory; download the checkpoint again")
    return path


def tensor_names(directory: Path) -> set[str]:
    """Names of the tensors in ``directory``, by its index if there is one; none where they cannot be read.

    For what must be known before the files are checked, which is not done here.
    """
    try:
        if (directory / INDEX_FILE).is_file():
            return set(read_json(directory / INDEX_FILE).get("weight_map") or ())
        if (directory / SINGLE_FILE).is_file():  # and no pipe, which would be waited for
            with _safe_open(directory / SINGLE_FILE) as handle:
                return set(handle.keys())
    except (OSError, ValueError, TypeError):
        pass
    return set()


def _safe_open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None


def check_tensors(
    source: TensorSource, expected: Mapping[str, Shape], ops: Iterable[Op], ignored: Iterable[str] = ()
) -> list[str]:
    """Check that ``source`` holds exactly the ``expected`` tensors and shapes, before any is read.

    Args:
        source: the checkpoint.
        expected: name → shape.
        ops: the map that will read them; what one operation joins must be of one dtype.
        ignored: regular expressions of tensors that may be there besides.

    Returns:
        Names of the tensors that are left out, sorted.

    Raises:
        ValueError: naming a tensor that is missing, extra, of another shape, or of an unsupported dtype.
    """
    where, found = source.directory, source.entries
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    left_out = [name for name in extra if any(re.fullmatch(pattern, name) for pattern in ignored)]
    extra = sorted(set(extra) - set(left_out))
    if missing:
        hint = f"; {extra[0]!r} is there instead" if extra else ""
        raise ValueError(f"{where}: tensor {missing[0]!r} is missing{_more(missing)}{hint}; check that the config fits")
    if extra:
        raise ValueError(f"{where}: tensor {extra[0]!r} has no place in the model{_more(extra)}; check the config")
    for path, problem in misfits(found, expected, ops):
        raise ValueError(f"{path}: {problem}")
    return left_out


def misfits(found: Mapping[str, Entry], expected: Mapping[str, Shape], ops: Iterable[Op]) -> Iterator[tuple[Path, str]]:
    """(file, problem) of each tensor of ``found`` whose shape or dtype is not as ``expected``, or as its group's."""
    for name, shape in expected.items():
        entry = found.get(name)
        if entry is None:
            continue
        if entry.shape != tuple(shape):
            yield (
                entry.path,
                f"tensor {name!r} has shape {list(entry.shape)}, but the config needs {list(shape)}",
            )
        if entry.dtype not in DTYPES:
            fix = "fp8 and integer weights are not supported; use the bf16, fp16 or fp32 weights"
            yield entry.path, f"tensor {name!r} has dtype {entry.dtype}; {fix}"
    for op in ops:
        group = [found[name] for name in op.sources if name in found]
        dtypes = sorted({entry.dtype for entry in group})
        if len(dtypes) > 1:
            yield group[0].path, f"{op.sources[0]!r} and its group mix dtypes {dtypes}; save them in one"


def check_copy(source: TensorSource, copy: str, original: str, why: str) -> None:
    """Check that the tensor ``copy`` is the ``original`` again, a few rows at a time; ``why`` says what else to do.

    Raises:
        ValueError: they differ, so that leaving one out would lose weights.
    """
    first, second = source.entries[copy], source.entries[original]
    same = (first.shape, first.dtype) == (second.shape, second.dtype)
    for start in range(0, first.shape[0], COMPARED_ROWS) if same else ():
        rows = (slice(start, min(start + COMPARED_ROWS, first.shape[0])), *(slice(0, n) for n in first.shape[1:]))
        same = same and source.read_region(copy, rows).equal(source.read_region(original, rows))
    if not same:
        raise ValueError(f"{first.path}: tensor {copy!r} differs from {original!r}, but {why}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
