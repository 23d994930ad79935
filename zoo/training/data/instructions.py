"""Conversations and prompts with their completions out of JSONL files, of which only the answers are learned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.chat import ANSWERING, ChatTemplate, Encoded, encode_pair
from zoo.training.data.sources import JSONL_SUFFIXES, check_text, jsonl_rows

FIELDS = "'messages', or 'prompt' and 'completion'"


@dataclass(frozen=True)
class Instructions:
    """A JSONL file with a document in every line.

    ``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}`` is written by
    the tokenizer's chat template; ``{"prompt": "...", "completion": "..."}`` is text as it stands. Other fields of a
    line are not read.

    Args:
        location: the file.
        held_out: whether some of its documents may be held out for validation.
    """

    location: str
    held_out: bool = True

    @property
    def name(self) -> str:
        """Name without the directories of this machine."""
        return Path(self.location).name

    @property
    def total_bytes(self) -> int:
        """Size of the file.

        Raises:
            FileNotFoundError: there is none.
        """
        path = Path(self.location)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return path.stat().st_size

    def documents(self, template: ChatTemplate) -> Iterator[tuple[str, Encoded, int]]:
        """(what stands in a line, in one spelling; its tokens; bytes of the line), in order.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, an empty one, or a line without an answer to learn, naming the line.
        """
        path = Path(self.location)
        if path.suffix.lower() not in JSONL_SUFFIXES:
            raise ValueError(f"{path}: instructions are read from {' and '.join(JSONL_SUFFIXES)} files; convert it")
        found = False
        for where, row, size in jsonl_rows(path, FIELDS):
            try:
                text, encoded = _encode(row, template)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            found = True
            yield text, encoded, size
        if not found:
            raise ValueError(f"{path}: holds no conversations; remove it from the sources")


def _encode(row: Mapping[str, Any], template: ChatTemplate) -> tuple[str, Encoded]:
    if ("messages" in row) == ("prompt" in row or "completion" in row):
        raise ValueError(f"expected {FIELDS}, got {', '.join(map(repr, row)) or 'no fields'}")
    if "messages" in row:
        messages = _messages(row["messages"])
        text, encoded = json.dumps(messages), template.encode(messages)
    else:
        prompt, completion = (_text(row.get(field), repr(field)) for field in ("prompt", "completion"))
        if not completion.strip():
            raise ValueError("'completion' is blank, so that there is nothing to learn; remove the line")
        text, encoded = json.dumps([prompt, completion]), encode_pair(prompt, completion, template.tokenizer)
    if not any(encoded.answers):
        raise ValueError(f"the chat template writes no answer, so that there is nothing to learn: {template.where}")
    return text, encoded


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"'messages' = {str(value)[:40]}: expected a list of objects with 'role' and 'content'")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            got = ", ".join(map(repr, message)) if isinstance(message, dict) else str(message)[:40]
            raise ValueError(f"message {number}: expected 'role' and 'content' and nothing else, got {got}")
        messages.append({key: _text(message[key], f"{key!r} of message {number}") for key in ("role", "content")})
    if not any(message["role"] == ANSWERING and message["content"].strip() for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"nothing to learn: no message with text in it has the role {ANSWERING!r}; roles are {roles}")
    return messages


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {'missing' if value is None else type(value).__name__}; expected text")
    return check_text(value, what.strip("'"), "text")
