"""Tokenizers: sentencepiece models and HF ``tokenizer.json`` files behind one small class.

Only data is read: a sentencepiece protobuf or JSON, never a pickle and never code that a checkpoint brings along.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

SENTENCEPIECE_FILE = "tokenizer.model"
HF_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"


_KEEP_SPACES = b"\x1a\x02\x20\x00"
"""``normalizer_spec { remove_extra_whitespaces: false }``: appended to a serialised message, a field replaces the one
before it. transformers never squeezes spaces, whatever the model says, and scores must not depend on who tokenises."""


class _Backend(Protocol):
    """What the two libraries have in common, without beginning-of-sequence or end-of-sequence tokens."""

    file_name: str
    vocab_size: int

    def encode(self, texts: Sequence[str], threads: int) -> list[list[int]]: ...
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str: ...


class _SentencePiece:
    """A sentencepiece model (arXiv 1808.06226)."""

    file_name = SENTENCEPIECE_FILE

    def __init__(self, data: bytes, where: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_proto=data + _KEEP_SPACES)
            self.vocab_size = int(self._model.vocab_size())
        except RuntimeError:
            self.vocab_size = 0
        if self.vocab_size < 1:
            raise ValueError(
                f"{where}: not a sentencepiece model and not a {HF_FILE}; give one of the two (a tiktoken file has "
                f"to be converted to {HF_FILE} first)"
            )

    def encode(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int, num_threads=threads)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._model.encode(text, return_type="offset_mapping")
        return encoding["ids"], encoding["offsets"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))

    def token_to_id(self, token: str) -> int | None:
        token_id = int(self._model.piece_to_id(token))
        return token_id if self._model.id_to_piece(token_id) == token else None

    def id_to_token(self, token_id: int) -> str:
        return str(self._model.id_to_piece(token_id))

    def control_id(self, name: str) -> int | None:
        """Id that the model itself gives to ``bos`` or ``eos``."""
        token_id = int(getattr(self._model, f"{name}_id")())
        return token_id if token_id >= 0 else None


class _HFTokenizer:
    """A ``tokenizer.json`` of the ``tokenizers`` library."""

    file_name = HF_FILE

    def __init__(self, data: bytes, where: Path) -> None:
        from tokenizers import Tokenizer as HFTokenizer

        try:
            self._model = HFTokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for whatever it cannot parse
            raise ValueError(f"{where}: not a {HF_FILE} that the tokenizers library reads: {error}") from None
        self._model.no_truncation()
        self._model.no_padding()
        # Added tokens may leave gaps, so the highest id counts and not the number of entries.
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        # The library has threads of its own, as many as its environment variables say.
        return [e.ids for e in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._model.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        return self._model.id_to_token(token_id) or ""

    def template(self) -> list[int]:
        """Ids that the file's post-processor puts around an empty text."""
        return self._model.encode("", add_special_tokens=True).ids


@dataclass(frozen=True)
class _Special:
    """Special ids, and which of them transformers adds by default for the same directory."""

    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool


class Tokenizer:
    """Text to token ids and back, equal to what transformers does for the same directory.

    Attributes:
        vocab_size: number of ids, that is the highest id + 1.
        bos_id, eos_id: ids that begin and end a sequence, ``None`` where the tokenizer has none.
        add_bos, add_eos: whether a sequence is meant to begin with ``bos_id`` and end with ``eos_id`` (transformers'
            ``add_bos_token`` and ``add_eos_token``). ``encode`` does not act on them: the caller says what it wants.

    Two differences to transformers 5 are wanted. A sentencepiece model is run by sentencepiece, so a special token that
    is spelled out in a text (``</s>``) stays text, and a space that a text begins with is a token as the model has it.
    """

    def __init__(self, backend: _Backend, special: _Special, files: dict[str, bytes]) -> None:
        """Use ``Tokenizer.load``. ``files`` are the contents that ``save`` writes, by name."""
        self._backend = backend
        self._special = special
        self._files = files
        self.vocab_size = backend.vocab_size
        self.bos_id = special.bos_id
        self.eos_id = special.eos_id
        self.add_bos = special.add_bos
        self.add_eos = special.add_eos
        self.chat_template = _chat_template(files)

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """Read a tokenizer file, or a directory that holds ``tokenizer.json`` or ``tokenizer.model``.

        Of the two, ``tokenizer.json`` goes first, as in transformers. The ``tokenizer_config.json`` beside the file
        names the special tokens, and a ``chat_template.jinja`` goes before the chat template in it.

        Raises:
            FileNotFoundError: no such file or directory.
            ValueError: no tokenizer in the directory, or one that cannot be read without changing its meaning.
        """
        path = _tokenizer_file(Path(source))
        data = path.read_bytes()
        if not data:
            raise ValueError(f"{path}: the file is empty; copy the tokenizer again")
        config_path = path.parent / CONFIG_FILE
        # A file under another name (tokenizer.model.v3) is not the one that a neighbouring configuration describes.
        configured = path.name in (HF_FILE, SENTENCEPIECE_FILE) and config_path.is_file()
        config = _read_config(config_path) if configured else {}
        backend: _SentencePiece | _HFTokenizer
        if data.lstrip()[:1] == b"{":
            backend = _HFTokenizer(data, path)
            special = _special_of_hf(backend, config, config_path)
        else:
            backend = _SentencePiece(data, path)
            special = _special_of_sentencepiece(backend, config, config_path)
        files = {backend.file_name: data}
        files[CONFIG_FILE] = config_path.read_bytes() if configured else _default_config(backend, special)
        template_path = path.parent / TEMPLATE_FILE
        if path.name in (HF_FILE, SENTENCEPIECE_FILE) and template_path.is_file():
            files[TEMPLATE_FILE] = template_path.read_bytes()
        return cls(backend, special, files)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of ``text``, with ``bos_id`` before and ``eos_id`` after where asked for.

        Raises:
            ValueError: ``bos`` or ``eos`` is asked of a tokenizer that has no such token.
        """
        return self.encode_batch([text], bos=bos, eos=eos)[0]

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, eos: bool = False, threads: int = 1
    ) -> list[list[int]]:
        """Like ``encode`` for every text, several times faster for many.

        Args:
            threads: of sentencepiece; those of the tokenizers library are set by ``RAYON_NUM_THREADS``.
        """
        if bos and self.bos_id is None:
            raise ValueError("bos=True: this tokenizer has no beginning-of-sequence token; name one in its config")
        if eos and self.eos_id is None:
            raise ValueError("eos=True: this tokenizer has no end-of-sequence token; name one in its config")
        head = [self.bos_id] if bos and self.bos_id is not None else []
        tail = [self.eos_id] if eos and self.eos_id is not None else []
        encoded = self._backend.encode(texts, threads)
        return [head + ids + tail for ids in encoded] if head or tail else encoded

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of ``text`` as ``encode`` gives them, and the characters, from and to, that each stands for."""
        return self._backend.encode_with_offsets(text)

    def with_chat_template(self, template: str) -> Tokenizer:
        """The same with another chat template."""
        return Tokenizer(self._backend, self._special, {**self._files, TEMPLATE_FILE: template.encode()})

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens are left out.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"token id {token_id}: outside this tokenizer's vocabulary of {self.vocab_size}")
        return self._backend.decode(ids)

    def id_to_token(self, token_id: int) -> str:
        """The piece of the vocabulary that ``token_id`` stands for, as the tokenizer's file spells it."""
        return self._backend.id_to_token(token_id)

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files into ``directory`` under their usual names; they are copied byte for byte."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            (directory / name).write_bytes(data)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the model file and the special ids: equal fingerprints mean equal token ids."""
        digest = hashlib.sha256(self._files[self._backend.file_name])
        digest.update(repr(self._special).encode())
        return digest.hexdigest()


def check_vocab(tokenizer: Tokenizer, vocab_size: int, where: str = "the model") -> None:
    """Refuse a tokenizer with ids that a model's embedding [V, D] has no row for.

    A larger embedding is fine: published models pad it.

    Raises:
        ValueError: ``tokenizer.vocab_size > vocab_size``; ``where`` names the model in the message.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"vocab_size = {vocab_size}: {where} has fewer embedding rows than its tokenizer has ids "
            f"({tokenizer.vocab_size}); set vocab_size: {tokenizer.vocab_size} or more, or use the tokenizer that the "
            "model was made for"
        )


def _tokenizer_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such tokenizer file or directory")
    for name in (HF_FILE, SENTENCEPIECE_FILE):
        if (source / name).is_file():
            return source / name
    present = sorted(p.name for p in source.iterdir())
    close = difflib.get_close_matches(SENTENCEPIECE_FILE, present, n=1, cutoff=0.5)
    hint = f"; to use {close[0]!r}, give the path of that file" if close else ""
    raise ValueError(f"{source}: holds neither {HF_FILE} nor {SENTENCEPIECE_FILE}{hint}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not UTF-8 JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _default_config(backend: _Backend, special: _Special) -> bytes:
    """A ``tokenizer_config.json`` that says what was found out without one."""
    config: dict[str, Any] = {"add_bos_token": special.add_bos, "add_eos_token": special.add_eos}
    for key, token_id in (("bos_token", special.bos_id), ("eos_token", special.eos_id)):
        if token_id is not None:
            config[key] = backend.id_to_token(token_id)
    is_sentencepiece = backend.file_name == SENTENCEPIECE_FILE
    config["tokenizer_class"] = "LlamaTokenizer" if is_sentencepiece else "PreTrainedTokenizerFast"
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _special_of_sentencepiece(backend: _SentencePiece, config: dict[str, Any], where: Path) -> _Special:
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        if int(key) >= backend.vocab_size or backend.id_to_token(int(key)) != _content(entry):
            raise ValueError(
                f"{where}: added_tokens_decoder[{key}] = {_content(entry)!r} is not in {SENTENCEPIECE_FILE}, which has "
                f"{backend.vocab_size} pieces; convert the tokenizer to {HF_FILE}"
            )
    bos_id = _configured_id(backend, config, "bos_token", where, backend.control_id("bos"))
    eos_id = _configured_id(backend, config, "eos_token", where, backend.control_id("eos"))
    return _Special(
        bos_id,
        eos_id,
        add_bos=bool(config.get("add_bos_token", True)) and bos_id is not None,
        add_eos=bool(config.get("add_eos_token", False)) and eos_id is not None,
    )


def _special_of_hf(backend: _HFTokenizer, config: dict[str, Any], where: Path) -> _Special:
    template = backend.template()
    bos_id = _configured_id(backend, config, "bos_token", where, None)
    eos_id = _configured_id(backend, config, "eos_token", where, None)
    return _Special(
        bos_id,
        eos_id,
        add_bos=bool(config.get("add_bos_token", template[:1] == [bos_id])) and bos_id is not None,
        add_eos=bool(config.get("add_eos_token", template[-1:] == [eos_id])) and eos_id is not None,
    )


def _configured_id(backend: _Backend, config: dict[str, Any], key: str, where: Path, default: int | None) -> int | None:
    token = _content(config.get(key))
    if token is None:
        return default
    token_id = backend.token_to_id(token)
    if token_id is None:
        raise ValueError(
            f"{where}: {key} = {token!r} is not in the vocabulary of {backend.file_name}; correct the name"
        )
    return token_id


def _chat_template(files: dict[str, bytes]) -> str | None:
    """The template of a file of its own or of the configuration, which may hold several, one named ``default``."""
    if TEMPLATE_FILE in files:
        try:
            return files[TEMPLATE_FILE].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{TEMPLATE_FILE}: not UTF-8: {error}") from None
    template = json.loads(files[CONFIG_FILE]).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _content(token: Any) -> str | None:
    """The text of a special token, which a configuration spells as a string or as an object with ``content``."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
