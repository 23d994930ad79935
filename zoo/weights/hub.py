"""Published checkpoints on the hub, downloaded into its cache."""

from __future__ import annotations

import re
from pathlib import Path

from zoo.weights.target import TOKENIZER_FILES

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]


def is_hub_id(source: str) -> bool:
    """Whether ``source`` looks like ``organisation/model`` and is not a path that exists."""
    return HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def download(hub_id: str) -> Path:
    """Directory of the hub's cache that holds ``hub_id``, downloaded if it is not there yet. Never runs its code.

    Raises:
        ValueError: it cannot be had: no such model, no access, no network.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError(f"{hub_id}: downloading needs the hub extra; run pip install 'moe-zoo[hub]'") from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{hub_id}: cannot be downloaded ({reason}); check the name, the network and, for gated models, HF_TOKEN, "
            "or give a local directory"
        ) from None
