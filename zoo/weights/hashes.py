"""Recorded SHA-256 hashes of weight files: our own ``SHA256SUMS``, and what the hub's client leaves behind."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from zoo.files import write_text

SUMS_FILE = "SHA256SUMS"
"""In the format of coreutils, so that ``sha256sum -c SHA256SUMS`` checks it too."""

MAX_SUMS_BYTES = 16 * 2**20
CHUNK = 2**20
SHA256 = re.compile(r"[0-9a-f]{64}")
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def sha256(path: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """Hex digest of a file, read a MiB at a time; ``advance`` is told the bytes of each."""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with path.open("rb") as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            advance(count)
    return digest.hexdigest()


def recorded(directory: Path, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """File name → (hex digest, where it is recorded), for those of ``names`` that have one.

    A name of ``SHA256SUMS`` comes back whether it is one of ``names`` or not: what was recorded must be there.

    Raises:
        ValueError: ``SHA256SUMS`` has a line that is none.
    """
    found = {}
    for name in names:
        for digest, place in (_blob(directory / name), _download(directory, name)):
            if SHA256.fullmatch(digest):  # small files have a shorter hash of git there
                found[name] = (digest, place)
    return found | _sums(directory / SUMS_FILE)


def record(directory: Path, names: Iterable[str], advance: Callable[[int], object] = lambda count: None) -> None:
    """Write the hashes of the files ``names``, as they are now, to ``SHA256SUMS``."""
    lines = [f"{sha256(directory / name, advance)}  {name}\n" for name in names]
    write_text(directory / SUMS_FILE, "".join(lines))


def _blob(path: Path) -> tuple[str, str]:
    """In the hub's cache files are links to blobs, which are named after their hash."""
    cached = path.parent.parent.name == "snapshots" and path.is_symlink()
    return (path.readlink().name if cached else ""), "the hub's cache"


def _download(directory: Path, name: str) -> tuple[str, str]:
    """``hf download --local-dir`` leaves revision, hash and time of each file in a directory of its own."""
    path = directory / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    lines = path.read_text(encoding="utf-8", errors="replace")[:4096].splitlines() if path.is_file() else []
    return (lines[1].strip() if len(lines) > 1 else ""), "the hub's download record"


def _sums(path: Path) -> dict[str, tuple[str, str]]:
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_SUMS_BYTES:
        raise ValueError(f"{path}: longer than {MAX_SUMS_BYTES:,} bytes; give one line a file")
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{path}: line {number} is not a hash and a file name; write it again with zoo verify --record"
            )
        found[match[2]] = (match[1], SUMS_FILE)
    return found
