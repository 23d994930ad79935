"""Training a sentencepiece tokenizer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from zoo.tokenizer import CONFIG_FILE, SENTENCEPIECE_FILE, Tokenizer
from zoo.training.data.progress import byte_progress, total_bytes
from zoo.training.data.sources import Source
from zoo.training.data.staging import commit, staging

MIN_VOCAB_SIZE = 3 + 256 + 1
"""Special tokens, the 256 bytes, and one piece more."""
_MAX_LINE_CHARACTERS = 1 << 14
_RECIPE: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 0.9999,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "input_sentence_size": 2_000_000,
    "shuffle_input_sentence": True,
    "max_sentence_length": 4 * _MAX_LINE_CHARACTERS,  # bytes
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "num_threads": 1,
    "minloglevel": 2,
}


def train_tokenizer(sources: Sequence[Source], vocab_size: int, out: str | Path) -> Tokenizer:
    """Train byte-pair encoding with byte fallback (Llama's recipe) and write ``tokenizer.model`` to ``out``.

    No text is unknown (bytes stand in for rare characters), nothing is normalised and no space is put in front, so
    ``decode(encode(text)) == text``, but for U+2581, by which sentencepiece writes a space. Digits are single tokens.
    Equal arguments give an equal model. At most two million lines, drawn with a fixed seed, are used.

    Args:
        sources: text to learn from.
        vocab_size: number of pieces, of which 259 are special tokens and bytes.
        out: directory to make.

    Raises:
        ValueError: ``out`` exists, a source cannot be read, or the text is too small for ``vocab_size``.
    """
    import sentencepiece

    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: exists and is not empty; choose another --out")
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size = {vocab_size}: give at least {MIN_VOCAB_SIZE} (special tokens and bytes are 259)"
        )
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    with byte_progress() as progress:
        lines = _Lines(sources, progress)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, **_RECIPE
            )
        except RuntimeError as error:
            if lines.error is None:
                # "INTERNAL: src/file.cc(744) [condition] What is wrong. What to do."
                reason = str(error).rpartition("] ")[2].splitlines()[0]
                raise ValueError(f"vocab_size = {vocab_size}: sentencepiece refuses: {reason}") from None
    if lines.error is not None:
        raise lines.error
    _save(model.getvalue(), out)
    return Tokenizer.load(out)


class _Lines:
    """The lines of all sources, as an iterator for sentencepiece, which would hide the type of an error."""

    def __init__(self, sources: Sequence[Source], progress: Progress) -> None:
        self._sources = sources
        self._progress = progress
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        reading = self._progress.add_task("reading", total=total_bytes(self._sources))
        try:
            for source in self._sources:
                for text, size in source.documents():
                    for line in text.splitlines():
                        # sentencepiece drops longer lines in silence
                        for start in range(0, len(line), _MAX_LINE_CHARACTERS):
                            yield line[start : start + _MAX_LINE_CHARACTERS]
                    self._progress.advance(reading, size)
        except Exception as error:
            self.error = error
        else:
            self._progress.add_task("learning merges", total=None)


def _save(model: bytes, out: Path) -> None:
    """Write the tokenizer's directory aside, make it durable and give it its name."""
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    files = {SENTENCEPIECE_FILE: model, CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode()}
    with staging(out) as directory:
        for name, data in files.items():
            (directory / name).write_bytes(data)
        commit(directory, out)
