"""The header of a safetensors file, read and judged without mapping or trusting the file.

The library refuses a bad header as a whole. Here every fault of it is named, and nothing but the header is read.
Format: eight bytes of length (little endian), so many bytes of JSON (name → dtype, shape, data_offsets), the data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeGuard

from zoo.weights.source import Entry

MAX_HEADER_BYTES = 100_000_000
"""Of the safetensors library: a longer one is no header."""

MAX_DIMENSIONS = 64
"""Of a tensor of torch."""

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""safetensors dtype → bits of one element."""

AGAIN = "copy or download it again"


def read_header(path: Path) -> tuple[dict[str, Entry], list[str]]:
    """(the tensors that ``path`` says it holds, what is wrong with the file).

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            return {}, [f"is cut short: {size:,} bytes do not hold its header; {AGAIN}"]
        if length > MAX_HEADER_BYTES:
            return {}, [f"has a header of {length:,} bytes, more than the {MAX_HEADER_BYTES:,} of safetensors; {AGAIN}"]
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return {}, [f"has a header that is no JSON ({error}); {AGAIN}"]
    if not isinstance(header, dict):
        return {}, [f"has a header that is no JSON object; {AGAIN}"]
    header.pop("__metadata__", None)
    return _judge(path, header, size - 8 - length)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is in it twice")
        found[key] = value
    return found


def _judge(path: Path, header: dict[str, Any], data_bytes: int) -> tuple[dict[str, Entry], list[str]]:
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    problems: list[str] = []
    for name, info in header.items():
        problem = _entry_problem(info)
        if problem:
            problems.append(f"tensor {name!r} {problem}; {AGAIN}")
            continue
        entries[name] = Entry(path, tuple(info["shape"]), info["dtype"])
        spans.append((*info["data_offsets"], name))
    if not problems:  # what a faulty entry covers is not known
        problems = _span_problems(sorted(spans), data_bytes)
    return entries, problems


def _entry_problem(info: Any) -> str | None:
    """What is wrong with one entry of a header by itself."""
    if not isinstance(info, dict):
        return f"is described by {type(info).__name__}, not by an object"
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"has the unknown dtype {str(dtype)[:40]!r}"
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        return f"has no valid shape: {str(shape)[:40]}"
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has no valid data_offsets: {str(offsets)[:40]}"
    bits = BITS[dtype]
    for size in shape:
        bits *= size
    held = offsets[1] - offsets[0]
    return None if bits == 8 * held else f"takes {held:,} bytes, but {dtype} {shape} is {-(-bits // 8):,}"


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether ``value`` is a list of what a 64-bit size can be."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _span_problems(spans: list[tuple[int, int, str]], data_bytes: int) -> list[str]:
    """Byte ranges (start, stop, name) in order must follow each other and end where the file does."""
    problems, end, before = [], 0, ""
    for start, stop, name in spans:
        if start < end:
            problems.append(f"tensors {before!r} and {name!r} overlap: byte {start:,} of the data is in both")
        elif start > end:
            problems.append(f"{start - end:,} bytes before tensor {name!r} belong to no tensor")
        if stop > end:
            end, before = stop, name
    if end > data_bytes:
        problems.append(f"is cut short: {data_bytes:,} bytes of data, and its header describes {end:,}; {AGAIN}")
    if end < data_bytes:
        problems.append(f"has {data_bytes - end:,} bytes after its last tensor; {AGAIN}")
    return problems
