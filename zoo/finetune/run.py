"""Fine-tuning as a part of a run of ``zoo fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.config import ModelSpec, from_dict
from zoo.finetune.adapter import AdapterSpec, save_adapter, save_finetuned, weights_hash
from zoo.finetune.apply import apply
from zoo.finetune.config import FinetuneConfig
from zoo.finetune.sets import as_text
from zoo.model import Decoder
from zoo.weights.target import ADAPTER_FILE


class Finetuning:
    """What the ``finetune:`` section asks for, from the loaded model to the saved one.

    Args:
        section: of the config.
        spec: of the model.
        checkpoint: where its weights come from; ``None`` where they are fresh.
        bias_updates: whether the run moves selection biases.

    Raises:
        ValueError: a mistake in the section, or an adapter where there is nothing to adapt.
    """

    def __init__(self, section: dict[str, Any], spec: ModelSpec, checkpoint: Path | None, bias_updates: bool) -> None:
        self.config = from_dict(FinetuneConfig, section, "finetune")
        self.spec = spec
        self._bias_updates = bias_updates
        self._base_sha256 = ""
        if self.config.adapter is None:
            return
        if checkpoint is None:
            raise ValueError(
                f"finetune: {spec.name} has no weights yet, and an adapter is trained beside some: give a checkpoint "
                "directory in model.name"
            )
        if bias_updates:
            raise ValueError(
                "model.bias_update_rate: an adapter does not hold selection biases, which this would move; set it to 0"
            )

    def begin(self, model: Decoder, seed: int) -> str:
        """Freeze and adapt ``model``; the table of what is trained.

        Raises:
            ValueError: see ``apply``; or selection biases would move beside a frozen router.
        """
        if self.config.adapter is not None:
            self._base_sha256 = weights_hash(model)
        rows = apply(model, self.config, seed)
        if self._bias_updates and not {part: trained for part, trained, _ in rows}.get("router"):
            raise ValueError(
                "model.bias_update_rate: the router is frozen, and its selection bias would move; set it to 0"
            )
        return as_text(rows)

    def save(self, model: Decoder, run: Path, final: Path, tokenizer_dir: Path) -> None:
        """Write ``final``, and before it, of a run with an adapter, ``adapter`` in the run directory.

        Raises:
            OSError: one of them cannot be written.
        """
        adapter = AdapterSpec(base=self.spec, base_sha256=self._base_sha256, finetune=self.config)
        if self.config.adapter is not None:
            save_adapter(model, adapter, run / "adapter")
        save_finetuned(model, self.spec, adapter, final, tokenizer_dir)


def refuse_adapted(checkpoint: Path) -> None:
    """Raise ``ValueError`` where a checkpoint to train on from has an adapter beside its weights."""
    if (checkpoint / ADAPTER_FILE).is_file():
        raise ValueError(
            f"model.name = {checkpoint}: it holds an adapter that cannot be merged, and training on from that is not "
            "supported; give the model that it was trained on"
        )
