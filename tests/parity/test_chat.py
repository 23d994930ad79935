"""Chat templates against transformers: the same text, the same tokens, the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from zoo.chat import DEFAULT_TEMPLATE, ChatTemplate
from zoo.tokenizer import Tokenizer

TEMPLATES = {
    "the zoo's own": DEFAULT_TEMPLATE,
    "system prompt inside the first turn": """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate') }}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{ bos_token + '[INST] ' + (system if loop.index0 == 0 and system is defined else '') }}
        {{- message['content'] | trim + ' [/INST]' }}
    {%- else -%}
        {{ ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}""",
    "marked answers": """\
{% for message in messages %}
{% if message.role == 'assistant' %}
<|{{ message.role }}|>{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}

{% else %}
<|{{ message.role }}|>{{ message | tojson }}
{% endif %}
{% endfor %}""",
}

MESSAGES = [
    {"role": "system", "content": "Be brief, <kind> & sincere."},
    {"role": "user", "content": "  Où est-ce?\n\nTell me "},
    {"role": "assistant", "content": "Là-bas: 3 × 4 ☃"},
    {"role": "user", "content": "Really"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def theirs(shared_data: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(shared_data / "tokenizers" / "deepseek")


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> Tokenizer:
    return Tokenizer.load(shared_data / "tokenizers" / "deepseek")


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_tokens_are_the_same(theirs: PreTrainedTokenizerFast, tokenizer: Tokenizer, name: str) -> None:
    ours = ChatTemplate(TEMPLATES[name], tokenizer)
    for count in (2, 3, 5):
        prompt = count == 2
        text = theirs.apply_chat_template(
            MESSAGES[:count], chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
        )
        assert ours.render(MESSAGES[:count], add_generation_prompt=prompt) == text
        if not prompt:
            assert ours.encode(MESSAGES[:count]).ids == theirs.encode(text, add_special_tokens=False)


def test_marked_answers_are_the_same(theirs: PreTrainedTokenizerFast, tokenizer: Tokenizer) -> None:
    expected = theirs.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES["marked answers"], return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = ChatTemplate(TEMPLATES["marked answers"], tokenizer).encode(MESSAGES)
    assert encoded.ids == expected["input_ids"]
    assert encoded.answers == [bool(answer) for answer in expected["assistant_masks"]]
