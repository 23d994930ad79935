"""Dense twins, over random sparse architectures and over those of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_configs import model_configs

from zoo.accounting import count_parameters
from zoo.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from zoo.families import FAMILIES
from zoo.harness.match import (
    DESCRIPTIONS,
    MULTIPLE,
    TOLERANCE,
    Quantity,
    Sparsity,
    dense_config,
    match,
    measure,
    sparse_config,
    sparsify,
)
from zoo.harness.match_time import Timing, match_time, summarise, time_steps
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


WITHOUT_DENSE_RELATIVES = {"olmoe", "gpt_oss", "dbrx", "llama4", "grok1", "jamba"}
"""Families whose attention no published dense family has."""


@pytest.mark.parametrize("by", DESCRIPTIONS)
@pytest.mark.parametrize("name", [n for n in SPARSE_NAMES if find_spec(n).family not in WITHOUT_DENSE_RELATIVES])
def test_every_sparse_model_of_the_zoo_has_a_twin(name: str, by: Quantity) -> None:
    spec = find_spec(name)
    twin = match(spec, by)
    assert measure(twin.model, by, 4096) == pytest.approx(measure(spec.model, by, 4096), rel=TOLERANCE)
    assert twin.model.intermediate_size % MULTIPLE == 0
    if twin.family is None:
        assert twin.model.attention and twin.model.attention.qk_norm == "projection", "a dense layout fits"
    else:
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


@st.composite
def sparsities(draw: st.DrawFn) -> Sparsity:
    active, granularity = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    return Sparsity(
        experts=draw(st.integers(active + 1, 4 * active)),
        active=active,
        granularity=granularity,
        shared=draw(st.integers(0, active * granularity - 1)),
    )


@settings(max_examples=200, deadline=None)
@given(model_configs(sparse=False), sparsities())
def test_a_variant_differs_only_in_its_ffn_and_keeps_the_active_parameters(config: ModelConfig, s: Sparsity) -> None:
    target = count_parameters(config).active
    try:
        variant = sparse_config(config, s)
    except ValueError as error:
        assert "no expert width gives" in str(error) or "routed experts are" in str(error)
        return
    moe = variant.moe
    assert moe is not None
    assert replace(variant, moe=None, intermediate_size=config.intermediate_size) == config
    assert abs(count_parameters(variant).active / target - 1) <= TOLERANCE
    # Fine experts split the coarse ones: as many in all, and as many computed, shared ones included.
    assert moe.num_experts + moe.num_shared_experts == s.granularity * s.experts
    assert moe.top_k + moe.num_shared_experts == s.granularity * s.active


def test_deepseek_moes_layer_from_its_own_numbers() -> None:
    """DeepSeekMoE 16B (arXiv 2401.06066): 64 + 2 fine experts, a quarter of a coarse one each; 6 + 2 for a token."""
    moe = sparse_config(find_spec("llama-3-8b").model, Sparsity(experts=16, active=2, granularity=4, shared=2)).moe
    assert moe is not None
    assert (moe.num_experts, moe.num_shared_experts, moe.top_k) == (62, 2, 6)
    assert moe.norm_topk_prob


def test_a_coarse_variant_of_llama_is_a_mixtral() -> None:
    variant = sparsify(find_spec("llama-3-8b"), Sparsity(experts=8))
    assert variant.family == "mixtral"
    assert FAMILIES["mixtral"].to_hf(variant.model)["num_local_experts"] == 8


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"experts": 2}, r"experts = 2: with active = 2 every expert is computed"),
        ({"experts": 8, "granularity": 2, "shared": 4}, r"shared = 4: of granularity \* active = 4 experts"),
        ({"experts": 8, "granularity": 0}, r"granularity >= 1"),
    ],
)
def test_dials_that_leave_no_routing_are_refused(dials: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sparsity(**dials)


def test_a_sparse_model_has_no_variants() -> None:
    with pytest.raises(ValueError, match=r"mixtral-tiny: it has experts already"):
        sparsify(find_spec("mixtral-tiny"), Sparsity(experts=8))


class TestTime:
    """The search, with clocks whose noise is known; the real clock only where noise cannot decide."""

    @staticmethod
    def clock(fixed: float, per_width: float, noise: float = 0.0) -> Callable[[ModelConfig, ModelConfig], Timing]:
        """A machine on which a dense step takes ``fixed + per_width · width`` and a sparse one 1 second."""

        def timer(sparse: ModelConfig, dense: ModelConfig) -> Timing:
            seconds = fixed + per_width * dense.intermediate_size
            return Timing(1.0, seconds, seconds, seconds * (1 - noise), seconds * (1 + noise), rounds=9)

        return timer

    @settings(max_examples=100, deadline=None)
    @given(fixed=st.floats(0, 0.9), width=st.integers(64, 8192))
    def test_the_twin_takes_as_long(self, fixed: float, width: int) -> None:
        """Whatever share of a step does not depend on the width."""
        timer = self.clock(fixed, (1 - fixed) / width)
        found = match_time(find_spec("mixtral-tiny"), 128, 2, timer=timer)
        assert abs(found.dense_seconds - 1) <= TOLERANCE
        assert found.dense_seconds == fixed + (1 - fixed) / width * found.spec.model.intermediate_size
        assert found.spec.model.moe is None

    def test_noise_that_hides_the_difference_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"may be 0.964 to 1.023, which does not tell 1%; end other programs"):
            match_time(find_spec("mixtral-tiny"), 128, 2, timer=self.clock(0.5, 0.5 / 600, noise=0.03))

    def test_a_sparse_step_that_is_faster_than_any_dense_one_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"no dense FFN width takes as long within 1%; .*intermediate_size = 1,"):
            match_time(find_spec("mixtral-tiny"), 128, 2, timer=self.clock(1.5, 0.001))

    def test_the_interval_of_the_median_covers_it(self) -> None:
        """Conover's order statistics: at least 95%, and not much more, whatever the distribution."""
        generator = np.random.default_rng(0)
        covered = 0
        for _ in range(1000):
            ratios = generator.lognormal(0.0, 0.3, size=25)
            timing = summarise(np.ones(25).tolist(), ratios.tolist())
            covered += timing.low <= 1.0 <= timing.high
        assert 940 <= covered <= 985

    def test_real_steps_of_a_model_twice_as_wide_take_longer(self) -> None:
        narrow, wide = (dense_config(find_spec("mixtral-tiny").model, "active", 1) for _ in range(2))
        timing = time_steps(narrow, replace(wide, intermediate_size=16 * wide.intermediate_size), 64, 2)
        assert timing.rounds >= 9
        assert timing.low <= timing.ratio <= timing.high
        assert timing.ratio > 1.5
