"""A LoRA adapter of the zoo as a directory that ``peft`` loads onto transformers' model of the base.

Stacked experts are parameters there as here, and PEFT's for them are two matrices a layer: rows of A go expert by
expert, columns of B rank by rank (peft 0.21, ``tuners/lora/layer.py``, ``ParamWrapper``).

Shapes: E experts, r rank, o rows and i columns of a matrix.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.families import exporting_family
from zoo.finetune.adapter import ADAPTER_WEIGHTS, AdapterSpec, read_adapter_spec
from zoo.finetune.config import LoRAConfig
from zoo.weights.ops import Op, Rename, Split
from zoo.weights.target import new_directory

EXPERT_MATRICES = {"gate_up_adapter": ("gate_up", "base_layer."), "down_adapter": ("down", "")}
"""Our adapter → (our matrix, where PEFT puts it: it wraps the experts once a parameter, the last one outermost)."""

DENSE_FFN = ("gate_proj", "up_proj", "down_proj")
"""Modules that peft takes for parts of the experts in sparse models; named as parameters they are what they are."""


@dataclass(frozen=True)
class PeftExport:
    """What was written."""

    directory: Path
    targets: tuple[str, ...]
    """Published names of the modules and parameters that are adapted."""
    parameters: int

    def as_json(self) -> str:
        """One JSON object for scripts."""
        fields = {"directory": str(self.directory), "targets": self.targets, "parameters": self.parameters}
        return json.dumps(fields)

    def as_text(self) -> str:
        """One line."""
        return f"LoRA of {len(self.targets)} matrices ({self.parameters:,} parameters): written to {self.directory}"


def export_peft(source: str | Path, out: str | Path) -> PeftExport:
    """Write the adapter directory ``source`` as ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ValueError: ``source`` is no adapter, or one that PEFT cannot represent, saying what; or ``out`` exists.
        OSError: ``out`` cannot be written.
    """
    spec = read_adapter_spec(source)
    lora = spec.finetune.lora
    if lora is None:
        raise ValueError(f"{source}: PEFT cannot represent this adapter; only LoRA can be exported")
    if spec.finetune.train:
        raise ValueError(
            f"{source}: {', '.join(spec.finetune.train)} were trained in full, which an adapter directory has no place "
            "for; export the merged model in final"
        )
    published = _Published(spec, source)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(Path(source) / ADAPTER_WEIGHTS).items():
        place, adapter, kind = name.rsplit(".", 2)
        key, value = published.tensor(place, adapter, kind, tensor)
        tensors[f"base_model.model.{key}"] = value.contiguous()
    config = _config(spec, lora, published)
    with new_directory(Path(out)) as aside:
        save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        (aside / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    targets = (*sorted(published.modules), *sorted(published.parameters))
    return PeftExport(Path(out), targets, sum(tensor.numel() for tensor in tensors.values()))


class _Published:
    """The names of adapted matrices in transformers' model, collected as their tensors go by."""

    def __init__(self, spec: AdapterSpec, source: str | Path) -> None:
        ops = exporting_family(spec.base).weight_map(spec.base.model, "fused")
        self._by_target: dict[str, Op] = {target: op for op in ops for target in op.targets}
        self._source = source
        self._sparse = spec.base.model.moe is not None
        self.modules: set[str] = set()
        self.parameters: set[str] = set()

    def tensor(self, place: str, adapter: str, kind: str, tensor: Tensor) -> tuple[str, Tensor]:
        """PEFT's name and form of our tensor ``kind`` of the adapter at ``place``."""
        if adapter in EXPERT_MATRICES:
            return self._of_experts(place, adapter, kind, tensor)
        parameter = self._name(f"{place}.weight")
        module = parameter.removesuffix(".weight")
        if not (self._sparse and module.rsplit(".", 1)[-1] in DENSE_FFN):
            self.modules.add(module)
        elif kind == "magnitude":
            raise ValueError(f"{self._source}: peft has no DoRA of {module}; export the merged model in final")
        else:
            self.parameters.add(parameter)
        suffix = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}[kind]
        return f"{module}.{suffix}", tensor

    def _of_experts(self, place: str, adapter: str, kind: str, tensor: Tensor) -> tuple[str, Tensor]:
        if kind == "magnitude":
            raise ValueError(f"{self._source}: peft has no DoRA of stacked experts; export the merged model in final")
        matrix, wrapper = EXPERT_MATRICES[adapter]
        parameter = self._name(f"{place}.{matrix}")
        self.parameters.add(parameter)
        key = f"{parameter.rsplit('.', 1)[0]}.{wrapper}"
        if kind == "a":
            return f"{key}lora_A.weight", tensor.flatten(0, 1)
        return f"{key}lora_B.weight", tensor.permute(1, 2, 0).flatten(1)

    def _name(self, parameter: str) -> str:
        """The published tensor that our ``parameter`` is, unchanged but for a split of gate and up.

        Raises:
            ValueError: it is another arrangement of the numbers.
        """
        op = self._by_target[parameter]
        if not (isinstance(op, Rename) or (isinstance(op, Split) and (op.dim, op.parts) == (1, 2))):
            raise ValueError(
                f"{self._source}: {parameter} is arranged in another way in the published layout, so that its adapter "
                "is none there; export the merged model in final"
            )
        return op.sources[0]


def _config(spec: AdapterSpec, lora: LoRAConfig, published: _Published) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.base.source,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": sorted(published.modules),
        "target_parameters": sorted(published.parameters) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
