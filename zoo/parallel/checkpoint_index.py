"""The index of a sharded checkpoint, read without running what it says: torch keeps it as a pickle."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


class Reader(FileSystemReader):
    """torch's, except that its index, which is a pickle, can hold nothing but descriptions of tensors."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            ValueError: it names a file outside the checkpoint, or holds anything that an index does not.
        """
        metadata = _IndexUnpickler((Path(self.path) / ".metadata").read_bytes()).load()
        for info in metadata.storage_data.values():
            if not re.fullmatch(r"__\d+_\d+\.distcp", info.relative_path):
                raise ValueError(f"{self.path}: names {info.relative_path!r} as a file of its own; it is not one")
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """What the checkpoint holds, by name."""
        entries = self.read_metadata().state_dict_metadata
        return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


class _IndexUnpickler(pickle.Unpickler):
    _CLASSES = frozenset(
        {
            *(
                f"torch.distributed.checkpoint.metadata.{name}"
                for name in (
                    *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
                    *("TensorProperties", "_MEM_FORMAT_ENCODING"),
                )
            ),
            "torch.distributed.checkpoint.filesystem._StorageInfo",
            "torch.serialization._get_layout",
            "torch.Size",
            "pathlib.PosixPath",
        }
    )

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        """Look up one of the few names that an index needs."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if f"{module}.{name}" not in self._CLASSES and not is_dtype:
            raise ValueError(f"the checkpoint's index holds {module}.{name}; it was not written by zoo fit")
        return super().find_class(module, name)
