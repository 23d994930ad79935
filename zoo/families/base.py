"""What a family of published models is: how its ``config.json`` and its tensors map to ours, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from zoo.config import ModelConfig
from zoo.encoder_decoder_config import EncoderDecoderConfig
from zoo.families.fields import Fields
from zoo.weights.ops import Op

Layout = Literal["per_expert", "fused"]
"""``per_expert``: a tensor an expert and matrix, as on the hub. ``fused``: one 3-D tensor a layer and matrix, as
transformers 5 holds them in memory."""


Quantization = Literal["fp8", "mxfp4"]

ROTARY_BUFFERS: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Frequencies that old checkpoints stored; they follow from the config."""


@dataclass(frozen=True, kw_only=True)
class Multimodal:
    """A published model of several modalities that has an architecture as its text part, which alone is read."""

    model_type: str
    architectures: tuple[str, ...]
    section: str
    """Key of its config.json that holds the text part's."""
    prefix: str
    """What the names of the text part's tensors begin with there."""
    ignored: tuple[str, ...]
    """Regular expressions of the other parts' tensors."""


C = TypeVar("C", ModelConfig, EncoderDecoderConfig)


@dataclass(frozen=True, kw_only=True)
class Architecture(Generic[C]):
    """One published architecture, of models that a config of type ``C`` describes.

    ``read`` and ``write`` are the bare mappings of a module of ``zoo/families``; callers use ``from_hf`` and ``to_hf``,
    which check that nothing was lost.
    """

    name: str
    model_type: str
    """``model_type`` of its config.json."""
    architectures: tuple[str, ...]
    """Class names in its config.json; the first is written on export."""
    read: Callable[[Fields], C]
    write: Callable[[C], dict[str, Any]]
    map_weights: Callable[[C, Layout], list[Op]]
    quantizations: tuple[Quantization, ...] = ()
    """Ways in which its weights are published besides bf16, fp16 and fp32; they are undone while reading."""
    ignored: Callable[[Mapping[str, Any]], tuple[str, ...]] = field(default=lambda hf: ROTARY_BUFFERS)
    """config.json → regular expressions of tensors that are left out on purpose, and nothing else is."""
    stored: Callable[[C, Collection[str]], C] = field(default=lambda config, names: config)
    """(config, names of the tensors that are there) → config without optional parts that were not stored."""
    embedding_copies: tuple[str, ...] = ()
    """Names under which some checkpoints store the input embedding again."""
    multimodal: Multimodal | None = None
    """The larger model that it is also published in."""

    def from_hf(self, hf: Mapping[str, Any], where: str = "config.json") -> C:
        """Architecture that a published config.json describes, in the spelling of transformers 4 or 5.

        Raises:
            ValueError: a field is missing, unknown, or asks for maths that the zoo's blocks do not have.
        """
        if quantization(hf, where) not in (None, *self.quantizations):
            raise ValueError(
                f"{where}: quantization_config = {hf['quantization_config']!r} is not supported; "
                "use the bf16, fp16 or fp32 weights"
            )
        fields = Fields(hf, where)
        larger = self.larger(hf)
        if larger is not None:
            fields = fields.section(larger.section)
            fields.expect("model_type", self.model_type)
        fields.skip("quantization_config")
        try:
            config = self.read(fields)
        except ValueError as error:
            # What ModelConfig itself refuses does not say which file the value came from.
            raise error if where in str(error) else ValueError(f"{where}: {error}") from None
        fields.finish()
        return config

    def larger(self, hf: Mapping[str, Any]) -> Multimodal | None:
        """The larger model whose config.json ``hf`` is; None where it is this architecture's own."""
        return self.multimodal if self.multimodal and hf.get("model_type") == self.multimodal.model_type else None

    def to_hf(self, config: C) -> dict[str, Any]:
        """config.json of ``config``, readable by transformers 4 and 5.

        Raises:
            ValueError: naming the first field that this family cannot express.
        """
        hf = {"architectures": [self.architectures[0]], "model_type": self.model_type, **self.write(config)}
        try:
            back = self.from_hf(hf, f"family {self.name}")
        except ValueError as error:
            raise ValueError(f"family {self.name} cannot express this model: {error}") from None
        if back != config:
            raise ValueError(f"family {self.name} cannot express {_first_difference(config, back)}")
        return hf

    def weight_map(self, config: C, layout: Layout = "per_expert") -> list[Op]:
        """Operations that use every published tensor once and fill every parameter once."""
        return self.map_weights(config, layout)


Family = Architecture[ModelConfig]
EncoderDecoderFamily = Architecture[EncoderDecoderConfig]


def quantization(hf: Mapping[str, Any], where: str = "config.json") -> str | None:
    """``quant_method`` of a published config.json, None where the weights are not quantised.

    Raises:
        ValueError: its ``quantization_config`` does not say.
    """
    section = hf.get("quantization_config")
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    if not isinstance(method, str):
        raise ValueError(f"{where}: quantization_config = {section!r} has no quant_method; give the published file")
    return method


def _first_difference(ours: Any, theirs: Any, where: str = "") -> str:
    for f in dataclasses.fields(ours):
        a, b = getattr(ours, f.name), getattr(theirs, f.name)
        if a == b:
            continue
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            return _first_difference(a, b, f"{where}{f.name}.")
        return f"{where}{f.name} = {a} (it would be read back as {b})"
    raise AssertionError("no difference")
