"""Weights in and out: published checkpoints, zoo checkpoints and the reversible map between them.

The functions are imported on first use: ``zoo.families`` needs ``zoo.weights.ops`` without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.weights.convert import export_checkpoint, import_checkpoint
    from zoo.weights.loading import load, load_encoder_decoder, save_model

__all__ = ["export_checkpoint", "import_checkpoint", "load", "load_encoder_decoder", "save_model"]

_LAZY = {
    "export_checkpoint": "zoo.weights.convert",
    "import_checkpoint": "zoo.weights.convert",
    "load": "zoo.weights.loading",
    "load_encoder_decoder": "zoo.weights.loading",
    "save_model": "zoo.weights.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'zoo.weights' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
