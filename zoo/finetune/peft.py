"""A LoRA adapter or a prefix of the zoo as a directory that ``peft`` loads onto transformers' model of the base.

Stacked experts are parameters there as here, and PEFT's for them are two matrices a layer: rows of A go expert by
expert, columns of B rank by rank (peft 0.21, ``tuners/lora/layer.py``, ``ParamWrapper``).

Shapes: E experts, r rank, o rows and i columns of a matrix; L layers, P prefix length, G key/value heads, d head size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.families import exporting_family
from zoo.finetune.adapter import ADAPTER_WEIGHTS, AdapterSpec, read_adapter_spec
from zoo.finetune.config import LoRAConfig, MoLoRAConfig, PrefixConfig
from zoo.layers.rope import Rotary, rotate
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
    """Published names of the modules and parameters that are adapted; of a prefix, none."""
    parameters: int

    def as_json(self) -> str:
        """One JSON object for scripts."""
        fields = {"directory": str(self.directory), "targets": self.targets, "parameters": self.parameters}
        return json.dumps(fields)

    def as_text(self) -> str:
        """One line."""
        kind = f"LoRA of {len(self.targets)} matrices" if self.targets else "prefix"
        return f"{kind} ({self.parameters:,} parameters): written to {self.directory}"


def export_peft(source: str | Path, out: str | Path) -> PeftExport:
    """Write the adapter directory ``source`` as ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ValueError: ``source`` is no adapter, or one that PEFT cannot represent, saying what; or ``out`` exists.
        OSError: ``out`` cannot be written.
    """
    spec = read_adapter_spec(source)
    adapter = spec.finetune.adapter
    if isinstance(adapter, MoLoRAConfig) or adapter is None:
        raise ValueError(f"{source}: PEFT cannot represent this adapter; only LoRA and prefixes can be exported")
    if spec.finetune.train:
        raise ValueError(
            f"{source}: {', '.join(spec.finetune.train)} were trained in full, which an adapter directory has no place "
            "for; export the merged model in final"
        )
    state = load_file(Path(source) / ADAPTER_WEIGHTS)
    if any(name.startswith("mtp.") for name in state):
        raise ValueError(f"{source}: transformers' model has no MTP modules, which this adapts too; export final")
    targets: tuple[str, ...] = ()
    if isinstance(adapter, PrefixConfig):
        tensors, config = _prefix(spec, adapter, state, source)
    else:
        published = _Published(spec, source)
        tensors = {}
        for name, tensor in state.items():
            place, module, kind = name.rsplit(".", 2)
            key, value = published.tensor(place, module, kind, tensor)
            tensors[f"base_model.model.{key}"] = value
        config = _lora_config(adapter, published)
        targets = (*sorted(published.modules), *sorted(published.parameters))
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": spec.base.source, "inference_mode": True}
    with new_directory(Path(out)) as aside:
        save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        (aside / "adapter_config.json").write_text(json.dumps(config | common, indent=2) + "\n", encoding="utf-8")
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


def _lora_config(lora: LoRAConfig, published: _Published) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": sorted(published.modules),
        "target_parameters": sorted(published.parameters) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _prefix(
    spec: AdapterSpec, prefix: PrefixConfig, state: dict[str, Tensor], source: str | Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(PEFT's tensor, its config): keys and values of each layer in turn, [P, L · 2 · G · d].

    There the prefix has positions 0 to P - 1 of the cache, and the text begins at P. Rotating the prefix's keys by
    P as well leaves every product of a query and a key as it is.
    """
    model = spec.base.model
    attention, length = model.attention, prefix.length
    assert attention is not None
    if any(attention.window(layer) is not None for layer in range(model.num_layers)):
        raise ValueError(f"{source}: in peft a sliding window hides the prefix from later tokens; here it does not")
    layers = []
    for layer in range(model.num_layers):
        keys, values = (state[f"layers.{layer}.mixer.{part}"] for part in ("keys", "values"))
        if model.rope is not None:
            rotary = Rotary(model.rope, attention.head_dim)
            cos, sin = rotary(torch.tensor([[length]]), length + 1, keys.dtype)
            keys = rotate(keys[None], cos, sin, model.rope.layout)[0] / rotary.scale
        layers += [keys, values]
    width = attention.num_kv_heads * attention.head_dim
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": length,
        "num_layers": model.num_layers,
        "num_attention_heads": attention.num_kv_heads,
        "token_dim": width,
        "encoder_hidden_size": width,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
    return {"prompt_embeddings": torch.stack(layers, dim=1).flatten(1)}, config
