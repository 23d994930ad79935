"""Generation: the cache changes nothing, transformers agrees, and sampling draws from the distribution it should."""

from __future__ import annotations

from pathlib import Path

import hf_cases
import pytest
import torch
from scipy.stats import chisquare

import zoo
from zoo.config import AttentionConfig, ModelConfig, RopeConfig
from zoo.generation import TextStream, next_token_probabilities, stream
from zoo.model import Decoder
from zoo.registry import find_spec
from zoo.tokenizer import Tokenizer

PROMPTS = [[5, 17, 3, 9, 11, 2, 40, 8], [7], [4, 4, 19], [30, 2, 6, 1, 0]]
EOS = 3
TINY = ["mixtral-tiny", "mistral-tiny", "deepseek-v3-tiny", "qwen2-moe-tiny"]


def spread(name: str) -> Decoder:
    """A tiny model of the zoo with weights large enough for continuations that wander."""
    model = zoo.build(find_spec(name).model, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def recomputed(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation with a whole forward for every token: no cache, no batch, no padding."""
    tokens = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        if token == EOS:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_greedy_equals_recomputation_for_unequal_prompts(name: str) -> None:
    model = spread(name)
    expected = [recomputed(model, prompt, 24) for prompt in PROMPTS]
    assert zoo.generate(model, PROMPTS, max_new_tokens=24, eos_id=EOS) == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


def test_rows_that_finish_at_different_steps_leave_the_others_as_they_were() -> None:
    model = spread("mixtral-tiny")
    alone = [zoo.generate(model, [prompt], max_new_tokens=20)[0] for prompt in PROMPTS]
    lengths = [3, 20, 7, 1]
    together = zoo.generate(model, PROMPTS, max_new_tokens=20, stop=lambda row, new: len(new) == lengths[row])
    assert together == [new[:length] for new, length in zip(alone, lengths, strict=True)]


def test_eos_ends_a_row_and_is_left_out() -> None:
    model = spread("mixtral-tiny")
    free = zoo.generate(model, PROMPTS, max_new_tokens=12)
    eos = free[0][4]
    expected = [new[: new.index(eos)] if eos in new else new for new in free]
    assert zoo.generate(model, PROMPTS, max_new_tokens=12, eos_id=eos) == expected
    assert zoo.generate(model, PROMPTS, max_new_tokens=12, eos_id=[eos, -1]) == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_tensor_is_not_read(side: str) -> None:
    model = spread("mixtral-tiny")
    width = max(map(len, PROMPTS))
    ids = torch.full((len(PROMPTS), width), 13)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        place = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    assert zoo.generate(model, ids, attention_mask=mask, max_new_tokens=8) == zoo.generate(
        model, PROMPTS, max_new_tokens=8
    )


@pytest.mark.parametrize("case", ["llama", "mixtral", "deepseek-v3", "qwen2-moe"])
def test_left_padded_batch_equals_transformers(case: str, tmp_path: Path) -> None:
    theirs = hf_cases.saved_model(case, tmp_path)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = zoo.generate(zoo.load(tmp_path), ids, attention_mask=mask, max_new_tokens=32)
    assert ours == expected[:, width:].tolist()


def test_a_trained_model_writes_the_same_story_as_transformers(shared_data: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = shared_data / "models" / "stories260K_hf"
    text = "Once upon a time, there was a"
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    their_ids = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt").input_ids
    expected = theirs.generate(their_ids, max_new_tokens=200, do_sample=False)[0, their_ids.shape[1] :].tolist()
    tokenizer = Tokenizer.load(directory)
    prompt = tokenizer.encode(text, bos=tokenizer.add_bos)
    assert zoo.generate(zoo.load(directory), [prompt], max_new_tokens=200, eos_id=tokenizer.eos_id)[0] == expected


# Sampling ------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([0.4, 0.1, 0.3, 0.15, 0.05]).log()[None]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.4, 0.1, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0, 0]),
        ({"top_k": 9}, [0.4, 0.1, 0.3, 0.15, 0.05]),
        ({"top_p": 0.65}, [4 / 7, 0, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"top_p": 1.0}, [0.4, 0.1, 0.3, 0.15, 0.05]),
        # After top_k = 3 the probabilities are 0.4, 0.3, 0.15 over 0.85: the first two hold 0.82 of it.
        ({"top_k": 3, "top_p": 0.8}, [4 / 7, 0, 3 / 7, 0, 0]),
        ({"temperature": 0.5, "top_k": 2}, [16 / 25, 0, 9 / 25, 0, 0]),
    ],
)
def test_filtered_distribution(settings: dict[str, float], expected: list[float]) -> None:
    arguments = {"temperature": 1.0, **settings}
    assert next_token_probabilities(LOGITS, **arguments)[0].tolist() == pytest.approx(expected, abs=1e-6)


def six_tokens() -> Decoder:
    config = ModelConfig(
        vocab_size=6,
        hidden_size=16,
        num_layers=2,
        intermediate_size=32,
        max_position_embeddings=64,
        norm_eps=1e-6,
        rope=RopeConfig(theta=10000.0),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        initializer_range=0.2,
    )
    return zoo.build(config, seed=4).eval()


@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"top_p": 0.9}])
@torch.no_grad()
def test_draws_follow_the_distribution(settings: dict[str, float]) -> None:
    model, draws = six_tokens(), 6000
    expected = next_token_probabilities(model(torch.tensor([[1, 2]])).logits[:, -1], 0.8, **settings)[0].double()
    drawn = zoo.generate(model, [[1, 2]] * draws, max_new_tokens=1, temperature=0.8, seed=11, **settings)
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=6).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert possible.sum() >= 3
    frequencies = expected[possible] / expected[possible].sum() * draws
    assert chisquare(counts[possible].numpy(), frequencies.numpy()).pvalue > 0.001


def test_equal_seeds_draw_equal_tokens() -> None:
    model = six_tokens()

    def draw(seed: int) -> list[list[int]]:
        return zoo.generate(model, [[1, 2], [3]], max_new_tokens=40, temperature=1.0, seed=seed)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


# Streams and errors --------------------------------------------------------------------------------------------


def test_stream_yields_what_generate_collects() -> None:
    model = spread("mixtral-tiny")
    collected: list[list[int]] = [[] for _ in PROMPTS]
    for row, token in stream(model, PROMPTS, max_new_tokens=6):
        collected[row].append(token)
    assert collected == zoo.generate(model, PROMPTS, max_new_tokens=6)


def test_streamed_pieces_join_to_the_text(shared_data: Path) -> None:
    tokenizer = Tokenizer.load(shared_data / "models" / "stories260K_hf")
    text = "Lily said: “naïve 日本 🙂 ?”\n\nThe  end, …"
    prompt, whole = tokenizer.encode("Once upon", bos=True), tokenizer.encode("Once upon a time " + text, bos=True)
    assert whole[: len(prompt)] == prompt
    shown = TextStream(tokenizer, prompt)
    pieces = [shown.push(token) for token in whole[len(prompt) :]]
    assert "".join(pieces) + shown.flush() == " a time " + text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert pieces[0] == " a"
    assert shown.push(tokenizer.vocab_size) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": []}, "no prompt"),
        ({"input_ids": [[1], []]}, "prompt 1 is empty"),
        ({"input_ids": [[1, 6]]}, "token id 6: the model's ids are 0 to 5"),
        ({"input_ids": [[-1]]}, "token id -1"),
        ({"input_ids": [[1] * 60], "max_new_tokens": 5}, "60 tokens and max_new_tokens = 5 exceed the model's 64"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, r"shape \(3,\)"),
        ({"attention_mask": torch.ones(1, 2)}, "attention_mask is given with lists"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k = 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 0.9}, "top_p = 0.9 with temperature = 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.generate(six_tokens(), **{"input_ids": [[1, 2]], "max_new_tokens": 4, **arguments})
