"""A checker of the part of JSON Schema (2020-12) that the report's schema uses; other keywords are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
KNOWN = {"$ref", "anyOf", "type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems"}
KNOWN |= {"minimum", "maximum", "description", "title", "$schema", "$defs"}


def violations(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], at: str = "report") -> Iterator[str]:
    """What of ``value`` is not as ``schema`` says; references are looked up in ``root``."""
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    if "$ref" in schema:
        yield from violations(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, at)
    if "anyOf" in schema:
        found = [list(violations(value, option, root, at)) for option in schema["anyOf"]]
        yield from [] if [] in found else found[0]
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        yield f"{at}: {value!r} is no {kind}"
        return
    if kind in ("number", "integer") and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{at}: {value} is out of range"
    if kind == "array":
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{at}: {len(value)} items"
        for i, item in enumerate(value):
            yield from violations(item, schema["items"], root, f"{at}[{i}]")
    if kind == "object":
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        yield from (f"{at}: {key} is missing" for key in schema.get("required", []) if key not in value)
        for key, item in value.items():
            if key in properties or others is not False:
                yield from violations(item, properties.get(key, others), root, f"{at}.{key}")
            else:
                yield f"{at}: {key} is unknown"
