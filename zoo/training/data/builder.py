"""Building a data directory: tokenise documents once, split them, write them so that a killed build leaves nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from rich.progress import Progress, TaskID

from zoo.chat import DEFAULT_TEMPLATE, ChatTemplate
from zoo.tokenizer import Tokenizer
from zoo.training.data.instructions import Instructions
from zoo.training.data.progress import byte_progress, total_bytes
from zoo.training.data.sources import Source
from zoo.training.data.staging import commit, staging
from zoo.training.data.store import (
    FORMAT,
    MANIFEST_FILE,
    MASK_DTYPE,
    OFFSET_DTYPE,
    SPLITS,
    TOKENIZER_DIR,
    VERSION,
    Manifest,
    SourceInfo,
    SplitInfo,
    SplitName,
    file_sha256,
    token_dtype,
)

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20

AnySource = Source | Instructions
Tokenised = Iterator[tuple[str, Sequence[int], Sequence[bool] | None]]
"""Text, token ids, and which of them are answers, of one document after the other."""


def build(
    sources: Sequence[AnySource],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    validation_fraction: float = 0.01,
    validation_sources: Sequence[AnySource] = (),
    overwrite: bool = False,
) -> Manifest:
    """Tokenise ``sources`` into the data directory ``out``.

    A document is written as [BOS] tokens [EOS]: BOS where the tokenizer adds one by default, EOS where it has one. A
    conversation is written as the tokenizer's chat template says, or ``DEFAULT_TEMPLATE`` if it has none; which tokens
    are answers is stored beside them. Equal arguments write equal bytes.

    Args:
        sources: where the documents come from, in order: all text, or all instructions.
        tokenizer: copied into the directory, with the chat template that was used.
        out: new directory; its parent is made if missing.
        validation_fraction: part of the documents held out for validation. A document is chosen by the hash of its
            text, so equal documents fall on the same side and adding a source moves no other document.
        validation_sources: held-out documents of their own; then ``validation_fraction`` is not used.
        overwrite: replace ``out`` if it is a data directory.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a source cannot be read, a split would be empty, or ``out`` exists.
    """
    if not sources:
        raise ValueError("no sources: name at least one file, directory or hub id")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction = {validation_fraction}: give a number from 0 to below 1")
    if validation_sources:
        validation_fraction = 0.0
    kinds = {type(source) for source in (*sources, *validation_sources)}
    if len(kinds) > 1:
        raise ValueError("text and instructions in one data directory: build one of each kind")
    if kinds == {Instructions} and tokenizer.chat_template is None:
        tokenizer = tokenizer.with_chat_template(DEFAULT_TEMPLATE)
    out = Path(out)
    _check_replaceable(out, overwrite)
    with staging(out) as directory:
        manifest = _write(directory, sources, validation_sources, tokenizer, validation_fraction)
        (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        commit(directory, out)
    return manifest


def _write(
    directory: Path,
    sources: Sequence[AnySource],
    validation_sources: Sequence[AnySource],
    tokenizer: Tokenizer,
    validation_fraction: float,
) -> Manifest:
    given: list[tuple[SplitName, AnySource]] = [("train", s) for s in sources]
    given += [("validation", s) for s in validation_sources]
    masked = isinstance(sources[0], Instructions)
    infos = []
    with ExitStack() as stack:
        writers: dict[str, _SplitWriter] = {
            name: _SplitWriter(
                stack.enter_context(open(directory / f"{name}.bin", "wb")),
                stack.enter_context(open(directory / f"{name}.offsets", "wb")),
                stack.enter_context(open(directory / f"{name}.mask", "wb")) if masked else None,
                tokenizer.vocab_size,
            )
            for name in SPLITS
        }
        progress = stack.enter_context(byte_progress())
        task = progress.add_task("tokenising", total=total_bytes([source for _, source in given]))
        for split, source in given:
            info = _SourceCounter(split, source)
            fraction = validation_fraction if source.held_out else 0.0
            for text, ids, answers in _tokenised(source, tokenizer, progress, task):
                info.add(text)
                held_out = fraction > 0 and _unit_hash(text) < fraction
                writers["validation" if held_out else split].add(ids, answers, source.name)
            infos.append(info.finish())
        splits = {name: writer.finish() for name, writer in writers.items()}
    _check_splits(splits, needs_validation=validation_fraction > 0 or bool(validation_sources))
    tokenizer.save(directory / TOKENIZER_DIR)
    return Manifest(
        format=FORMAT,
        version=VERSION,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size),
        bos=tokenizer.add_bos and not masked,
        eos=tokenizer.eos_id is not None and not masked,
        validation_fraction=validation_fraction,
        sources=tuple(infos),
        splits=splits,
    )


class _SplitWriter:
    """Appends documents to the token file, the offset file and, of instructions, the mask file of one split."""

    def __init__(self, tokens: BinaryIO, offsets: BinaryIO, mask: BinaryIO | None, vocab_size: int) -> None:
        self._tokens = tokens
        self._offsets = offsets
        self._mask = mask
        self._answers = 0
        self._dtype = np.dtype(token_dtype(vocab_size))
        self._vocab_size = vocab_size
        self._count = 0
        self._documents = 0

    def add(self, ids: Sequence[int], answers: Sequence[bool] | None, where: str) -> None:
        """Append one document."""
        array = as_tokens(ids, self._dtype, self._vocab_size, where)
        self._offsets.write(np.array(self._count, OFFSET_DTYPE).tobytes())
        self._tokens.write(array.tobytes())
        if self._mask is not None:
            mask = np.array(answers, MASK_DTYPE)
            assert len(mask) == len(array)
            self._mask.write(mask.tobytes())
            self._answers += int(mask.sum())
        self._count += len(array)
        self._documents += 1

    def finish(self) -> SplitInfo:
        """Write the last offset and close the files."""
        self._offsets.write(np.array(self._count, OFFSET_DTYPE).tobytes())
        self._tokens.close()
        self._offsets.close()
        if self._mask is not None:
            self._mask.close()
        return SplitInfo(
            tokens=self._count,
            documents=self._documents,
            sha256=file_sha256(Path(self._tokens.name)),
            offsets_sha256=file_sha256(Path(self._offsets.name)),
            answers=None if self._mask is None else self._answers,
            mask_sha256=None if self._mask is None else file_sha256(Path(self._mask.name)),
        )


def as_tokens(ids: Sequence[int], dtype: np.dtype[Any], vocab_size: int, where: str) -> npt.NDArray[Any]:
    """Token ids as an array of the stored type.

    Raises:
        ValueError: an id outside the vocabulary, which the stored type could wrap around in silence.
    """
    array = np.asarray(ids, dtype=np.int64)
    bad = array[(array < 0) | (array >= min(vocab_size, np.iinfo(dtype).max + 1))]
    if bad.size:
        raise ValueError(
            f"{where}: the tokenizer gave id {bad[0]}, outside its vocabulary of {vocab_size} ids stored as "
            f"{dtype.name}; the tokenizer's file is damaged"
        )
    return array.astype(dtype)


class _SourceCounter:
    """What the manifest says about a source, collected while it is read."""

    def __init__(self, split: SplitName, source: AnySource) -> None:
        self._split = split
        self._source = source
        self._documents = 0
        self._bytes = 0
        self._digest = hashlib.sha256()

    def add(self, text: str) -> None:
        data = text.encode()
        self._documents += 1
        self._bytes += len(data)
        self._digest.update(data)

    def finish(self) -> SourceInfo:
        size = self._source.total_bytes
        return SourceInfo(
            name=self._source.name,
            split=self._split,
            documents=self._documents,
            bytes=self._bytes if size is None else size,
            sha256=self._digest.hexdigest() if size is None else file_sha256(Path(self._source.location)),
        )


def _tokenised(source: AnySource, tokenizer: Tokenizer, progress: Progress, task: TaskID) -> Tokenised:
    if isinstance(source, Instructions):
        assert tokenizer.chat_template is not None
        for text, document, size in source.documents(ChatTemplate(tokenizer.chat_template, tokenizer)):
            yield text, document.ids, document.answers
            progress.advance(task, size)
        return
    for texts in _batches(source, progress, task):
        encoded = tokenizer.encode_batch(texts, bos=tokenizer.add_bos, eos=tokenizer.eos_id is not None)
        for text, ids in zip(texts, encoded, strict=True):
            yield text, ids, None


def _batches(source: Source, progress: Progress, task: TaskID) -> Iterator[list[str]]:
    """Documents in groups that keep the tokenizer busy and the memory small; moves the bar when a group is done."""
    texts: list[str] = []
    characters = size = 0
    for text, text_size in source.documents():
        texts.append(text)
        characters += len(text)
        size += text_size
        if len(texts) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield texts
            progress.advance(task, size)
            texts, characters, size = [], 0, 0
    if texts:
        yield texts
        progress.advance(task, size)


def _unit_hash(text: str) -> float:
    """Number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _check_splits(splits: dict[str, SplitInfo], needs_validation: bool) -> None:
    found = f"{splits['train'].documents} train and {splits['validation'].documents} validation documents"
    fix = (
        "give more documents (--separator cuts a text file into several), another --validation-fraction, or "
        "--validation with a source of its own"
    )
    if not splits["train"].documents:
        raise ValueError(f"{found}: nothing is left to train on; {fix}")
    if needs_validation and not splits["validation"].documents:
        raise ValueError(f"{found}: the validation split is empty; {fix}")


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        data = json.loads((out / MANIFEST_FILE).read_bytes())
        ours = isinstance(data, dict) and data.get("format") == FORMAT
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ValueError(f"{out}: exists and is not a data directory of zoo; choose another --out")
    if not overwrite:
        raise ValueError(f"{out}: holds data already; use it, choose another --out, or replace it with --overwrite")
