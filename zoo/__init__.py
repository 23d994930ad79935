"""moe-zoo: mixture-of-experts language models and their dense twins.

``zoo.load``, ``zoo.build`` and ``zoo.generate`` are imported on first use, so that ``import zoo`` and
``zoo --help`` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.generation import generate
    from zoo.model import build
    from zoo.weights import load

__version__ = "0.1.0"

__all__ = ["__version__", "build", "generate", "load"]

_LAZY = {"build": "zoo.model", "generate": "zoo.generation", "load": "zoo.weights"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
