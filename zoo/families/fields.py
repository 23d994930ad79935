"""Reading a published ``config.json`` without ever ignoring a field that changes the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T", bool, int, float)

HARMLESS = (
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "return_dict",
    "router_aux_loss_coef",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Fields, common to all families, that do not enter the forward pass."""


class Fields:
    """The fields of one ``config.json``. ``finish`` refuses those that were never asked for.

    Args:
        data: the parsed file.
        where: how messages name it.
    """

    def __init__(self, data: Mapping[str, Any], where: str = "config.json") -> None:
        self._data = data
        self._used = set(HARMLESS)
        self.where = where

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as parsed; ``default`` where it is absent or null."""
        self._used.add(key)
        value = self._data.get(key)
        return default if value is None else value

    def optional(self, kind: type[T], key: str) -> T | None:
        """The value of ``key``, or ``None`` where it is absent or null."""
        value = self.raw(key)
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not kind:
            raise ValueError(f"{self.where}: {key} = {value!r}: expected {kind.__name__}")
        return value

    def take(self, kind: type[T], key: str, default: T | None = None) -> T:
        """The value of ``key``; ``default``, if there is one, where it is absent or null."""
        value = self.optional(kind, key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{self.where}: {key!r} is missing; give the model's own {kind.__name__}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Like ``take(int, ...)``, for a number that is at least 1."""
        value = self.take(int, key, default)
        if value < 1:
            raise ValueError(f"{self.where}: {key} = {value}: expected a positive integer")
        return value

    def section(self, key: str) -> Fields:
        """The object ``key``, empty where it is absent or null."""
        value = self.raw(key, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.where}: {key} = {value!r}: expected an object")
        return Fields(value, f"{self.where}: {key}")

    def sequence(self, key: str) -> list[Any]:
        """The list ``key``, empty where it is absent or null."""
        value = self.raw(key, [])
        if not isinstance(value, list):
            raise ValueError(f"{self.where}: {key} = {value!r}: expected a list")
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse a value of ``key`` other than ``allowed``: it asks for maths that the zoo's blocks do not have."""
        value = self.raw(key)
        if value is not None and value not in allowed:
            options = " or ".join(map(repr, allowed))
            raise ValueError(f"{self.where}: {key} = {value!r} is not supported; only {options} is")

    def skip(self, *keys: str) -> None:
        """Fields that do not enter the forward pass: training losses, hints for other programs."""
        self._used.update(keys)

    def finish(self) -> None:
        """Refuse fields that nobody asked for, since they could change the model. Null and false ones cannot."""
        for key, value in self._data.items():
            if key not in self._used and value is not None and value is not False:
                raise ValueError(
                    f"{self.where}: {key} = {value!r} is not a field that this family knows; "
                    "remove it if it does not change the model's output"
                )
