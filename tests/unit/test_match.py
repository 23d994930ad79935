"""Dense twins, over random sparse architectures and over those of the zoo."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_configs import model_configs

from zoo.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from zoo.families import FAMILIES
from zoo.harness.match import DESCRIPTIONS, MULTIPLE, TOLERANCE, Quantity, dense_config, match, measure
from zoo.registry import find_spec, model_names

QUANTITIES = st.sampled_from(list(DESCRIPTIONS))
SPARSE_NAMES = [name for name in model_names() if find_spec(name).model.moe]


@settings(max_examples=200, deadline=None)
@given(model_configs(sparse=True), QUANTITIES, st.integers(1, 64))
def test_a_twin_differs_only_in_its_ffn_and_is_within_the_tolerance(
    config: ModelConfig, by: Quantity, length: int
) -> None:
    target = measure(config, by, length)
    try:
        twin = dense_config(config, by, length)
    except ValueError as error:
        # Then it must be true that no width near the solution will do.
        nearest = int(str(error).rsplit("intermediate_size = ")[1].split(",")[0])
        for width in range(max(1, nearest - 2), nearest + 3):
            other = replace(config, moe=None, intermediate_size=width)
            assert abs(measure(other, by, length) / target - 1) > TOLERANCE
    else:
        assert twin == replace(config, moe=None, intermediate_size=twin.intermediate_size)
        assert measure(twin, by, length) == pytest.approx(target, rel=TOLERANCE)


WITHOUT_DENSE_RELATIVES = {"olmoe"}
"""Families whose attention no published dense family has."""


@pytest.mark.parametrize("by", DESCRIPTIONS)
@pytest.mark.parametrize("name", [n for n in SPARSE_NAMES if find_spec(n).family not in WITHOUT_DENSE_RELATIVES])
def test_every_sparse_model_of_the_zoo_has_a_twin_that_can_be_exported(name: str, by: Quantity) -> None:
    spec = find_spec(name)
    twin = match(spec, by)
    assert measure(twin.model, by, 4096) == pytest.approx(measure(spec.model, by, 4096), rel=TOLERANCE)
    assert twin.model.intermediate_size % MULTIPLE == 0
    assert FAMILIES[twin.family].to_hf(twin.model)["num_hidden_layers"] == spec.model.num_layers


@pytest.mark.parametrize("name", [n for n in SPARSE_NAMES if find_spec(n).family in WITHOUT_DENSE_RELATIVES])
def test_a_twin_that_no_family_can_express_has_none(name: str) -> None:
    assert match(find_spec(name), "active").family is None


def test_mixtrals_active_twin_has_two_experts_width() -> None:
    """Two of eight experts of 14336 are active; the routers (8 × 4096 a layer) add less than one row."""
    assert match(find_spec("mixtral-8x7b"), "active").model.intermediate_size == 2 * 14336


def test_a_dense_model_has_no_twin() -> None:
    with pytest.raises(ValueError, match=r"llama-tiny: every layer is dense already"):
        match(find_spec("llama-tiny"), "active")


def test_a_twin_that_rounding_puts_out_of_reach_is_refused_with_the_nearest_width() -> None:
    """One wide matrix, hardly anything else: widths 1 and 2 differ by a quarter of the model."""
    config = ModelConfig(
        vocab_size=2,
        hidden_size=32,
        num_layers=1,
        intermediate_size=1,
        max_position_embeddings=8,
        norm_eps=1e-6,
        rope=RopeConfig(theta=10000.0),
        attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2),
        moe=MoEConfig(num_experts=2, top_k=1, moe_intermediate_size=1, score_func="softmax", norm_topk_prob=False),
    )
    with pytest.raises(ValueError, match=r"nearest, intermediate_size = 2, differs by [+-]\d"):
        dense_config(config, "active", 8)


def test_an_unknown_quantity_is_refused() -> None:
    with pytest.raises(ValueError, match=r"by = 'params': use one of active, total, flops"):
        match(find_spec("mixtral-tiny"), "params")  # type: ignore[arg-type]
