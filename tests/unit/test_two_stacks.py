"""The encoder-decoder and its blocks: buckets, capacity, caches, loss, fresh weights.

Shapes: B batch, S sequence, D model, E experts.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.t5.modeling_t5 import T5Attention

from zoo.config import RelativePositionConfig
from zoo.config_reading import from_dict
from zoo.encoder_decoder import IGNORED, EncoderDecoder, build_encoder_decoder
from zoo.encoder_decoder_accounting import cache_elements, count_stack_parameters, stack_flops
from zoo.encoder_decoder_config import (
    CappedMoEConfig,
    EncoderDecoderConfig,
    EncoderDecoderSpec,
    decoder_spec,
)
from zoo.encoder_decoder_generation import generate_targets
from zoo.layers.relative_position import RelativePositionBias, distance_buckets
from zoo.moe.capped import CappedMoE
from zoo.moe.selection import within_capacity
from zoo.registry import encoder_decoder_names, find_any_spec, find_spec

CONFIG = EncoderDecoderConfig(
    vocab_size=50,
    hidden_size=24,
    num_encoder_layers=2,
    num_decoder_layers=2,
    intermediate_size=40,
    num_heads=3,
    head_dim=6,
    relative_positions=RelativePositionConfig(num_buckets=8, max_distance=20),
    ffn="relu",
    norm_eps=1e-6,
    decoder_start_id=0,
    moe=CappedMoEConfig(num_experts=4, expert_capacity=5, layer_interval=2),
    tie_word_embeddings=True,
)
GATED = dataclasses.replace(CONFIG, moe=None, ffn="geglu", tie_word_embeddings=False)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


class TestRelativePositions:
    def test_buckets_by_hand(self) -> None:
        """With 8 buckets: one each for distances 0 and 1, then 2 to 6, then the rest; as many for later keys."""
        distance = torch.tensor([0, -1, -2, -6, -7, -1000, 1, 2, 6, 7, 1000])
        assert distance_buckets(distance, 8, 20, True).tolist() == [0, 1, 2, 2, 3, 3, 5, 6, 6, 7, 7]
        # √(4 · 20) is 8.9, and every bucket up to 20 is 20/4 to the fourth root wide: borders at 4, 5.98, 8.94, 13.4.
        distance = torch.tensor([3, 0, -1, -3, -4, -5, -6, -8, -9, -13, -14, -1000])
        assert distance_buckets(distance, 8, 20, False).tolist() == [0, 0, 1, 3, 4, 4, 5, 5, 6, 6, 7, 7]

    @pytest.mark.parametrize("bidirectional", [True, False])
    @pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 40), (8, 5)])
    def test_buckets_are_those_of_the_published_code(self, buckets: int, distance: int, bidirectional: bool) -> None:
        """Far past the last border, and on every border: published weights were trained with its rounding."""
        away = torch.arange(-600, 601)
        theirs = T5Attention._relative_position_bucket(away, bidirectional, buckets, distance)
        assert distance_buckets(away, buckets, distance, bidirectional).tolist() == theirs.tolist()

    def test_cached_tokens_go_on_counting(self) -> None:
        bias = RelativePositionBias(8, 20, 2, bidirectional=False)
        torch.nn.init.normal_(bias.weight)
        whole = bias(0, 30)
        assert whole.shape == (1, 2, 30, 30)
        assert torch.equal(bias(21, 9), whole[:, :, 21:])


class TestCapacity:
    def test_places_by_hand(self) -> None:
        experts = torch.tensor([[0, 1, 0, 0, 1, 0], [2, 2, 2, 2, 0, 0]])
        assert within_capacity(experts, 3, 2, None).int().tolist() == [[1, 1, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1]]
        valid = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 0]]).bool()
        assert within_capacity(experts, 3, 2, valid).int().tolist() == [[0, 1, 1, 1, 1, 0], [1, 0, 1, 0, 1, 0]]

    @pytest.mark.parametrize("capacity", [1, 3, 100])
    def test_equals_tokens_one_by_one_in_value_and_gradient(self, capacity: int) -> None:
        layer = drawn(CappedMoE(24, 40, 5, capacity))
        x = torch.randn(3, 12, 24, generator=torch.Generator().manual_seed(1))
        weight = torch.randn(3, 12, 24, generator=torch.Generator().manual_seed(2))
        results = []
        for compute in (lambda: layer(x)[0], lambda: one_by_one(layer, x, capacity)):
            layer.zero_grad()
            out = compute()
            (out * weight).sum().backward()
            results.append((out.detach(), {n: p.grad.clone() for n, p in layer.named_parameters()}))
        (ours, gradients), (expected, expected_gradients) = results
        torch.testing.assert_close(ours, expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], msg=name)
        assert capacity == 100 or (ours == 0).all(-1).any()  # some are dropped

    def test_a_dropped_token_and_padding_are_not_computed(self) -> None:
        """Rows that no expert owns are never read: they are NaN here."""
        layer = drawn(CappedMoE(24, 40, 2, 2))
        layer.router.weight.data = torch.stack((torch.ones(24), -torch.ones(24)))
        x = torch.ones(1, 5, 24)
        valid = torch.tensor([[False, True, True, True, True]])
        out = layer(x, valid)[0]
        assert (out[0, [0, 3, 4]] == 0).all() and (out[0, 1:3] != 0).any()
        x[0, 0] = float("nan")
        torch.testing.assert_close(layer(x, valid)[0], out)

    def test_a_batch_that_is_all_padding_stays_zero(self) -> None:
        layer = drawn(CappedMoE(24, 40, 2, 2))
        assert (layer(torch.ones(2, 3, 24), torch.zeros(2, 3, dtype=torch.bool))[0] == 0).all()


def drawn(layer: CappedMoE) -> CappedMoE:
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return layer


def one_by_one(layer: CappedMoE, x: Tensor, capacity: int) -> Tensor:
    """Equation 2 of arXiv 2101.03961, and the first tokens first."""
    rows = []
    for sequence in x:
        taken = [0] * len(layer.router.weight)
        for token in sequence:
            probabilities = (layer.router.weight @ token).softmax(0)
            best = int(probabilities.argmax())
            taken[best] += 1
            hidden = (layer.experts.up[best] @ token).clamp(min=0)
            out = probabilities[best] * (layer.experts.down[best] @ hidden)
            rows.append(out if taken[best] <= capacity else torch.zeros_like(token))
    return torch.stack(rows).view_as(x)


@pytest.fixture(scope="module", params=[CONFIG, GATED], ids=["experts, tied", "gated, own head"])
def model(request: pytest.FixtureRequest) -> EncoderDecoder:
    return build_encoder_decoder(request.param).eval()


class TestModel:
    @torch.no_grad()
    def test_cached_steps_equal_recomputation(self, model: EncoderDecoder) -> None:
        """At every step; capacity is of a call, so that it must not bind here."""
        model = roomy(model)
        sources, targets = tokens(2, 17), tokens(2, 14, seed=1)
        memory, cache = model.memory(model.encode(sources)), model.new_cache(2, 14)
        steps = [model.decode(targets[:, :5], memory, cache).logits]
        steps += [model.decode(targets[:, i : i + 1], memory, cache).logits for i in range(5, 14)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(sources, targets).logits, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_no_later_target_changes_an_earlier_output(self, model: EncoderDecoder) -> None:
        """Not through the experts' places either: those are given in order.

        How many rows an expert has may change how their products are rounded, which is why all is in fp64.
        """
        model = copy.deepcopy(model).double()
        sources, targets = tokens(1, 17), tokens(1, 20, seed=1)
        other = targets.clone()
        other[:, 11:] = tokens(1, 9, seed=2)
        first, second = model(sources, targets).logits, model(sources, other).logits
        torch.testing.assert_close(first[:, :11], second[:, :11], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(first[:, 11:], second[:, 11:])

    @torch.no_grad()
    def test_every_source_token_reaches_every_target(self, model: EncoderDecoder) -> None:
        model, sources, targets = roomy(model), tokens(1, 9), tokens(1, 3, seed=1)
        expected = model(sources, targets).logits
        for place in range(9):
            other = sources.clone()
            other[0, place] = 1 + int(other[0, place]) % (CONFIG.vocab_size - 1)
            assert ((model(other, targets).logits - expected).abs().amax(-1) > 0).all()

    def test_loss_is_that_of_the_counted_targets(self, model: EncoderDecoder) -> None:
        sources, labels = tokens(2, 9), tokens(2, 6, seed=1)
        labels[1, 4:] = IGNORED
        shifted = torch.tensor([[0, *labels[0, :-1]], [0, *labels[1, :4], 0]])
        assert torch.equal(model.shifted(labels), shifted)
        log_probabilities = model(sources, shifted).logits.log_softmax(-1)
        counted = labels != IGNORED
        expected = -log_probabilities[counted].gather(-1, labels[counted][:, None]).mean()
        torch.testing.assert_close(model.loss(sources, labels), expected)

    def test_a_few_steps_lower_the_loss_and_move_every_parameter(self, model: EncoderDecoder) -> None:
        model = build_encoder_decoder(model.config)
        sources, labels = tokens(8, 15), tokens(8, 10, seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses, used = [], set()
        for _ in range(8):
            optimizer.zero_grad()
            loss = model.loss(sources, labels)
            loss.backward()
            used |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
            optimizer.step()
            losses.append(float(loss))
        assert losses[-1] < losses[0] - 0.3
        assert used == {name for name, _ in model.named_parameters()}

    def test_fresh_weights(self, model: EncoderDecoder) -> None:
        """A function of seed and name; scores and logits begin neither flat nor saturated."""
        config = dataclasses.replace(model.config, hidden_size=96, head_dim=32, vocab_size=500)
        first, again, other = (build_encoder_decoder(config, seed=seed) for seed in (0, 0, 1))
        for name, parameter in first.named_parameters():
            assert torch.equal(parameter, again.get_parameter(name))
            assert name.endswith("norm.weight") or not torch.equal(parameter, other.get_parameter(name))
        ids = torch.randint(500, (4, 20), generator=torch.Generator().manual_seed(0))
        assert abs(float(first.loss(ids, ids.flip(0))) - math.log(500)) < 1.0
        block = first.encoder.layers[0]
        x = torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
        scores = block.mixer.q_proj(x)[:, :32] @ block.mixer.k_proj(x)[:, :32].T
        assert 0.7 < float(scores.std()) < 1.4

    def test_each_expert_is_drawn_as_a_matrix_of_its_own(self) -> None:
        few, many = (
            build_encoder_decoder(
                dataclasses.replace(CONFIG, moe=CappedMoEConfig(num_experts=count, expert_capacity=5, layer_interval=2))
            )
            for count in (4, 16)
        )
        for part in ("up", "down"):
            name = f"encoder.layers.1.ffn.experts.{part}"
            weight = many.get_parameter(name)
            assert torch.equal(weight[:4], few.get_parameter(name))
            assert float(weight.std()) == pytest.approx(weight.shape[-1] ** -0.5, rel=0.05)

    def test_shapes_that_do_not_fit_are_refused(self, model: EncoderDecoder) -> None:
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 8\): give that of input_ids, \(2, 9\)"):
            model(tokens(2, 9), tokens(2, 4), torch.ones(2, 8))
        with pytest.raises(ValueError, match="decoder_input_ids has 3 rows and input_ids 2"):
            model(tokens(2, 9), tokens(3, 4))
        memory, cache = model.memory(model.encode(tokens(2, 9))), model.new_cache(2, 3)
        with pytest.raises(ValueError, match="make it with max_length >= 4"):
            model.decode(tokens(2, 4), memory, cache)


def roomy(model: EncoderDecoder) -> EncoderDecoder:
    """The same weights where no expert is ever full."""
    if model.config.moe is None:
        return model
    other = EncoderDecoder(
        dataclasses.replace(model.config, moe=dataclasses.replace(model.config.moe, expert_capacity=1000))
    )
    other.load_state_dict(model.state_dict())
    return other.eval()


class TestGeneration:
    def test_rows_end_one_by_one_and_the_others_go_on_unchanged(self, model: EncoderDecoder) -> None:
        sources = tokens(5, 12)
        mask = (torch.arange(12) < torch.tensor([12, 7, 3, 9, 1])[:, None]).long()
        free = generate_targets(model, sources, max_new_tokens=16, attention_mask=mask)
        assert all(len(target) == 16 for target in free)
        end = free[0][4]
        ended = generate_targets(model, sources, max_new_tokens=16, attention_mask=mask, eos_id=end)
        assert ended == [target[: target.index(end)] if end in target else target for target in free]
        for row in range(5):
            alone = generate_targets(model, sources[row : row + 1, : int(mask[row].sum())], max_new_tokens=16)
            assert alone == [free[row]]

    def test_bad_sources_are_refused(self, model: EncoderDecoder) -> None:
        for ids, mask, message in (
            (torch.tensor([[3, 50]]), None, "holds token id 50: the model's ids are 0 to 49"),
            (torch.tensor([[3, -1]]), None, "holds token id -1"),
            (torch.tensor([3, 4]), None, r"shape \(2,\): give \[sources, tokens\]"),
            (torch.zeros(2, 0, dtype=torch.int64), None, r"shape \(2, 0\)"),
            (tokens(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), "source 1 is all padding"),
        ):
            with pytest.raises(ValueError, match=message):
                generate_targets(model, ids, max_new_tokens=3, attention_mask=mask)
        with pytest.raises(ValueError, match="max_new_tokens = 0"):
            generate_targets(model, tokens(1, 3), max_new_tokens=0)


class TestAccounting:
    @pytest.mark.parametrize(
        "name", [name for name in encoder_decoder_names() if name.endswith(("-tiny", "-8", "-xl"))]
    )
    def test_counts_equal_those_of_the_model(self, name: str) -> None:
        config = find_any_spec(name).model
        assert isinstance(config, EncoderDecoderConfig)
        with torch.device("meta"):
            model = EncoderDecoder(config)
        assert count_stack_parameters(config).total == sum(p.numel() for p in model.parameters())

    @torch.no_grad()
    def test_flops_and_cache_equal_those_that_torch_counts(self, model: EncoderDecoder) -> None:
        """FlopCounterMode sees every matrix product, and attention unmasked."""
        model, config = roomy(model), model.config
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(tokens(1, 11), tokens(1, 7))
        future = 4 * config.num_heads * config.head_dim * config.num_decoder_layers * (7 * 6 / 2)
        assert counter.get_total_flops() == stack_flops(config, 11, 7) + future
        assert model.new_cache(3, 5).bytes == 3 * 5 * 4 * cache_elements(config)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 0}, r"hidden_size = 0: give a positive integer"),
    ({"norm_eps": 0}, r"norm_eps = 0"),
    ({"decoder_start_id": 50}, r"decoder_start_id = 50: give an id below 50"),
    ({"ffn": "geglu"}, r"ffn = geglu: experts have no gate"),
    ({"ffn": "gelu"}, r"ffn = 'gelu': use one of 'relu', 'geglu'"),
    ({"relative_positions": {"num_buckets": 7, "max_distance": 20}}, r"num_buckets = 7: give an even number"),
    ({"relative_positions": {"num_buckets": 8, "max_distance": 4}}, r"max_distance = 4: it must exceed half of"),
    (
        {"moe": {"num_experts": 4, "expert_capacity": 0, "layer_interval": 2}},
        r"moe.expert_capacity = 0: give a positive integer",
    ),
    (
        {"moe": {"num_experts": 4, "expert_capacity": 1, "layer_interval": 3}},
        r"moe.layer_interval = 3: at least one of the 2 layers",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_bad_values_are_named(change: dict[str, Any], message: str) -> None:
    fields = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)}
    plain = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in fields.items()}
    spec = {"name": "little", "family": "t5", "encoder_decoder": plain | change}
    with pytest.raises(ValueError, match=message) as error:
        from_dict(EncoderDecoderSpec, spec, "spec")
    assert "\n" not in str(error.value)


def test_where_decoders_are_asked_for_an_encoder_decoder_is_refused() -> None:
    for name in ("t5-small", "switch-tiny"):
        with pytest.raises(ValueError, match=f"{name}: this is an encoder-decoder, .* corrupted spans"):
            find_spec(name)
        with pytest.raises(ValueError, match="this is an encoder-decoder"):
            decoder_spec(find_any_spec(name))
