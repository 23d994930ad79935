"""Conversations as token ids, and which of these are answers.

A chat template is a program in Jinja that a checkpoint brings along. It is run in a sandbox, which lets it read the
messages and build a string: no attribute with an underscore, no call of anything else, nothing changed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from zoo.tokenizer import Tokenizer

Message = Mapping[str, str]
"""``role`` (system, user, assistant, ...) and ``content``."""

ANSWERING = "assistant"
"""The role whose messages are answers."""

DEFAULT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if not loop.first %}{{ "\\n" }}{% endif %}
    {{- message.role.capitalize() + ": " + message.content }}
    {%- if message.role == "assistant" %}{{ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "\\nAssistant:" if messages else "Assistant:" }}{% endif %}
"""
"""For tokenizers without a template: lines that begin with the role, and EOS after every answer."""

BOS, EOS, OPEN, CLOSE = MARKS = "\ufdd0\ufdd1\ufdd2\ufdd3"
"""What stands for the two tokens and for the borders of an answer in a rendered text: characters that Unicode keeps out
of every text, so that no content is taken for one of them."""


@dataclass(frozen=True)
class Encoded:
    """One document."""

    ids: list[int]
    answers: list[bool]
    """For every id, whether it is an answer's, that is, whether it is learned."""


class ChatTemplate:
    """A template with the tokenizer that it writes for.

    The template gets ``messages``, ``add_generation_prompt``, ``bos_token``, ``eos_token`` (empty where the tokenizer
    has none) and ``raise_exception``, as in transformers, but not the time of day: equal input gives equal tokens.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, where: str = "chat template") -> None:
        """
        Args:
            source: the template in Jinja.
            tokenizer: of the text that it makes.
            where: names it in errors.

        Raises:
            ValueError: it is not Jinja.
        """
        self.where = where
        self.tokenizer = tokenizer
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ValueError(f"{where}: not a chat template in Jinja: {error}") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, with BOS and EOS spelled out; as transformers' ``apply_chat_template``.

        Raises:
            ValueError: the template refuses the messages, fails, or attempts what the sandbox forbids.
        """
        text = self._render(messages, add_generation_prompt)
        for mark, token_id in ((BOS, self.tokenizer.bos_id), (EOS, self.tokenizer.eos_id), (OPEN, None), (CLOSE, None)):
            text = text.replace(mark, "" if token_id is None else self.tokenizer.id_to_token(token_id))
        return text

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Token ids of a conversation, and which are answers.

        An answer is what ``{% generation %}`` blocks of the template hold. In a template without them it is what an
        assistant's message adds to the conversation before it and the prompt for the answer: its text, and the mark
        that ends it.

        Raises:
            ValueError: as ``render``; or answers cannot be told apart, as earlier turns are written in another way
                once later ones follow.
        """
        text = self._render(messages, False)
        if OPEN not in text:
            for start, stop in reversed(self._spans(messages, text)):
                text = text[:start] + OPEN + text[start:stop] + CLOSE + text[stop:]
        return encode_marked(text, self.tokenizer)

    def _spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where answers begin and end in ``text``."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == ANSWERING:
                before, after = self._render(messages[:i], True), self._render(messages[: i + 1], False)
                if not (text.startswith(after) and after.startswith(before)):
                    raise ValueError(
                        f"{self.where}: writes what stands before message {i + 1} in another way once it is there, so "
                        "that answers cannot be told apart; put {% generation %} and {% endgeneration %} around them"
                    )
                spans.append((len(before), len(after)))
        return spans

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        for message in messages:
            _check_unmarked(message["content"])
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token="" if self.tokenizer.bos_id is None else BOS,
                eos_token="" if self.tokenizer.eos_id is None else EOS,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(f"{self.where}: {type(error).__name__}: {' '.join(str(error).split())}") from None


def encode_pair(prompt: str, completion: str, tokenizer: Tokenizer) -> Encoded:
    """[BOS] prompt completion [EOS], of which completion and EOS are the answer; BOS and EOS as in any document.

    Raises:
        ValueError: a character that Unicode keeps out of texts.
    """
    _check_unmarked(prompt, completion)
    head = BOS if tokenizer.add_bos else ""
    tail = EOS if tokenizer.eos_id is not None else ""
    return encode_marked(head + prompt + OPEN + completion + tail + CLOSE, tokenizer)


def encode_marked(text: str, tokenizer: Tokenizer) -> Encoded:
    """Token ids of a text with ``MARKS``. A token that holds a character of an answer is an answer's."""
    ids: list[int] = []
    answers: list[bool] = []
    learned: list[bool] = []
    plain, inside = "", False
    for part in re.split(f"([{MARKS}])", text):
        if part in (OPEN, CLOSE):
            inside = part == OPEN
        elif part in (BOS, EOS):
            _encode_plain(plain, learned, tokenizer, ids, answers)
            plain, learned = "", []
            special = tokenizer.bos_id if part == BOS else tokenizer.eos_id
            if special is not None:
                ids.append(special)
                answers.append(inside)
        else:
            plain += part
            learned += [inside] * len(part)
    _encode_plain(plain, learned, tokenizer, ids, answers)
    return Encoded(ids, answers)


def _encode_plain(text: str, learned: list[bool], tokenizer: Tokenizer, ids: list[int], answers: list[bool]) -> None:
    """Append the tokens of ``text``, of whose characters those ``learned`` are an answer's."""
    if not text:
        return
    for token_id, (start, stop) in zip(*tokenizer.encode_with_offsets(text), strict=True):
        ids.append(token_id)
        # The first bytes of a character that is spelled in bytes are at its place and have no length.
        answers.append(any(learned[start : max(stop, start + 1)]))


def _check_unmarked(*texts: str) -> None:
    for text in texts:
        for mark in MARKS:
            if mark in text:
                raise ValueError(f"character U+{ord(mark):04X}: not a character of any text; remove it")


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.globals = {"range": environment.globals["range"], "namespace": _Namespace, "raise_exception": _refuse}
    environment.filters["tojson"] = _to_json
    return environment


class _Sandbox(ImmutableSandboxedEnvironment):
    """One that says when something is attempted. jinja2's own gives an empty text where nothing is made of it."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__!r} is out of bounds for a chat template")


class _Namespace(Namespace):
    """The one object that a template may change, though not what Python itself reads of it."""

    def __init__(*args: Any, **values: Any) -> None:  # a value may be called self
        self, *mappings = args
        Namespace.__init__(self)
        for name, value in dict(*mappings, **values).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"attribute {name!r} of a namespace is out of bounds for a chat template")
        super().__setitem__(name, value)


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``: what is between is the assistant's (transformers' own tag)."""

    tags = {"generation"}  # noqa: RUF012 jinja2 declares it as an attribute of the object

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opening, closing = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (OPEN, CLOSE))
        return [opening, *body, closing]


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Not jinja2's own, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
