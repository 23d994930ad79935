"""Data for training: building, packing and serving tokenised documents.

``TokenDataModule`` is imported on first use, so that building data does not wait for Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.training.data.module import TokenDataModule

__all__ = ["TokenDataModule"]


def __getattr__(name: str) -> Any:
    if name == "TokenDataModule":
        from zoo.training.data.module import TokenDataModule

        return TokenDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
