"""The sizes that papers print of models that nobody has published, against the cards of their configs.

Sources: GLaM, arXiv 2112.06905, table 4; GShard, arXiv 2006.16668, table 1; Switch, arXiv 2101.03961, table 9; ST-MoE,
arXiv 2202.08906, abstract and table 10; DeepSeekMoE, arXiv 2401.06066, tables 1 and 2. GShard, Switch and ST-MoE are
encoder-decoders, and read as decoders here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.accounting import count_parameters, training_flops
from zoo.cli.text import short
from zoo.families import get_family
from zoo.registry import find_spec, paper_names

NAMES = [name for name in paper_names() if not name.endswith("-tiny")]

TOLERANCES = {
    "deepseek-moe": 0.0,
    "glam": 0.015,
    "gshard": 0.07,  # weights are printed as 12.5B, 50B, 150B, 200B, 600B: rounded to something
    "switch": 0.04,
    "st-moe": 0.03,
}
"""Paper → relative error of its numbers, beside what is rounded off them."""

CONTRADICTIONS = {
    "glam-0.1b": (1.06, 1.06),  # 7M less than 12 layers of this width have, also of the sparse one
    "glam-0.1b-64e": (1.00, 1.05),
    "glam-1.7b-32e": (0.70, 1.00),  # 20B, between 27B of twice and 53B of four times as many experts
}
"""Model → our total and active parameters over the table's, where these do not follow from its sizes."""


def printed(size: str) -> float:
    """Parameters, from a number such as 96.6B."""
    return float(size[:-1]) * {"M": 1e6, "B": 1e9, "T": 1e12}[size[-1]]


def decimals(size: str) -> int:
    return len(size.partition(".")[2][:-1])


def to_its_digits(count: int, size: str) -> str:
    """``count`` as ``size`` is printed."""
    return f"{count / printed('1' + size[-1]):.{decimals(size)}f}{size[-1]}"


@pytest.mark.parametrize("name", NAMES)
def test_totals_are_those_of_the_paper(name: str) -> None:
    spec = find_spec(name)
    assert spec.published is not None
    [tolerance] = [error for paper, error in TOLERANCES.items() if name.startswith(paper)]
    counts, ratios = count_parameters(spec.model), CONTRADICTIONS.get(name, (1.0, 1.0))
    assert (spec.published.active is not None) == name.startswith(("glam", "deepseek-moe"))
    sizes = [(counts.total, spec.published.total), (counts.active, spec.published.active)]
    for (count, size), ratio in zip(sizes, ratios, strict=True):
        if size:
            half_a_digit = 0.5 / 10 ** decimals(size) * printed("1" + size[-1])
            expected = ratio * printed(size)
            assert abs(count - expected) <= tolerance * expected + half_a_digit


@pytest.mark.parametrize("name", ["glam-1.7b-64e", "glam-1.7b-128e", "glam-8b", "glam-8b-64e", "glam-64b-64e"])
def test_total_and_active_parameters_of_glam_are_those_of_its_table_to_the_digit(name: str) -> None:
    spec = find_spec(name)
    counts, published = count_parameters(spec.model), spec.published
    assert published is not None and published.active is not None
    assert to_its_digits(counts.total, published.total) == published.total
    assert to_its_digits(counts.active, published.active) == published.active


def test_experts_and_flops_of_deepseek_moe_are_those_of_its_tables_to_the_digit() -> None:
    """Of what the paper leaves open, tables 1 and 2 know: the width of an expert, and that the head is not left out."""
    config = find_spec("deepseek-moe-2b").model
    assert config.moe is not None
    width, one = config.hidden_size, 3 * config.hidden_size * config.moe.moe_intermediate_size
    used = config.moe.top_k + config.moe.num_shared_experts
    held = config.moe.num_experts + config.moe.num_shared_experts
    assert to_its_digits(config.num_layers * held * one, "1.89B") == "1.89B"
    assert to_its_digits(config.num_layers * used * one, "0.24B") == "0.24B"
    # Forward and backward over 2,048 tokens; the paper counts the scores of all pairs, we those of a causal sequence.
    unseen = 3 * config.num_layers * 4 * width * (2048 - 1) / 2
    assert to_its_digits(round(2048 * (training_flops(config, 2048) + unseen)), "4.3T") == "4.3T"


def test_deepseek_moe_is_held_by_the_family_of_its_16b() -> None:
    spec = find_spec("deepseek-moe-2b")
    family = get_family(spec.family)
    assert family.from_hf(family.to_hf(spec.model)) == spec.model


def test_the_dense_glam_of_137b_has_as_many_parameters_as_its_published_code_says() -> None:
    """tensorflow/lingvo, lingvo/tasks/lm/params/synthetic_packed_input.py, above DenseLm128B8x8."""
    assert count_parameters(find_spec("glam-137b").model).total == 137_702_416_384


READ_AS_DECODERS = ["switch-decoder-base", "switch-decoder-xxl", "switch-decoder-c", "st-moe-decoder-l"]


@pytest.mark.parametrize("name", [*READ_AS_DECODERS, "st-moe-decoder-32b"])
def test_what_is_missing_is_the_attention_to_the_encoder(name: str) -> None:
    """With it in half of the layers, the total is that of the paper to its last digit."""
    spec = find_spec(name)
    config, heads = spec.model, spec.model.attention
    assert heads is not None and spec.published is not None
    cross_attention = config.num_layers // 2 * (4 * config.hidden_size * heads.num_heads * heads.head_dim)
    assert to_its_digits(count_parameters(config).total + cross_attention, spec.published.total) == spec.published.total


def test_the_documentation_has_every_size(repository: Path) -> None:
    rows = (repository / "docs" / "routing.md").read_text().splitlines()
    for name in NAMES:
        spec = find_spec(name)
        counts, published = count_parameters(spec.model), spec.published
        assert published is not None
        sizes = [short(counts.total), published.total, short(counts.active), published.active or "–"]
        assert f"| `{name}` | {' | '.join(sizes)} |" in rows
