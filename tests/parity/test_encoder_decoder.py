"""T5, T5 v1.1 and Switch Transformers against transformers: models saved by it, read from disk by our importer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoder_decoder_cases import CASES, VOCAB, saved_model
from hf_cases import relative_difference
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from zoo.encoder_decoder import IGNORED, EncoderDecoder
from zoo.encoder_decoder_generation import generate_targets
from zoo.families import family_of
from zoo.registry import find_any_spec, read_json
from zoo.weights import export_checkpoint, import_checkpoint, load_encoder_decoder
from zoo.weights.verify import verify

LOGITS = 1e-5
GRADIENTS = 1e-4


@dataclass(frozen=True)
class Pair:
    """The same weights in transformers and here."""

    directory: Path
    theirs: PreTrainedModel
    ours: EncoderDecoder


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp(request.param)
    theirs = saved_model(request.param, directory)
    yield Pair(directory, theirs, load_encoder_decoder(directory))


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random ids [batch, length] without padding and end."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_past_the_last_bucket(pair: Pair) -> None:
    sources, targets = tokens(2, 90), tokens(2, 70, seed=2)
    ours = pair.ours(sources, targets)
    theirs = pair.theirs(input_ids=sources, decoder_input_ids=targets).logits
    assert relative_difference(ours.logits, theirs) < LOGITS
    for routing in (*ours.encoder_router_outputs, *ours.router_outputs):
        assert len(routing.experts.unique()) > routing.scores.shape[1] // 2
        counts = F.one_hot(routing.experts.view(2, -1), 6).sum(1)
        assert (counts > 5).any()  # some experts are full


def test_every_gradient(pair: Pair) -> None:
    """Of the seq2seq loss, with padded sources and targets."""
    sources, labels = tokens(3, 60), tokens(3, 50, seed=2)
    mask = torch.ones_like(sources)
    mask[1, 25:], labels[1, 10:], labels[2, 44:] = 0, IGNORED, IGNORED
    for model in (pair.theirs, pair.ours):
        model.zero_grad()
    theirs = pair.theirs(input_ids=sources, attention_mask=mask, labels=labels).loss
    ours = pair.ours.loss(sources, labels, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    theirs.backward()
    ours.backward()
    # An expert without tokens has no gradient there.
    named = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in pair.theirs.named_parameters()}
    expected = _in_our_layout(pair.directory, named)
    gradients = {name: parameter.grad for name, parameter in pair.ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert (gradient - expected[name]).abs().max() / expected[name].abs().max() < GRADIENTS, name


def _in_our_layout(directory: Path, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a transformers model under our names, through the same operations as the weights."""
    spec = find_any_spec(directory)
    ops = family_of(read_json(directory / "config.json")).weight_map(spec.model)
    mapped = dict(item for op in ops for item in op.to_zoo(named.pop))
    assert not named
    return mapped


@torch.no_grad()
def test_greedy_generation(pair: Pair) -> None:
    """Of padded sources, with the caches of both."""
    sources, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.int64)
    mask[1, 17:], mask[2, 1:] = 0, 0
    theirs = pair.theirs.generate(
        sources, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generate_targets(pair.ours, sources, max_new_tokens=64, attention_mask=mask) == theirs[:, 1:].tolist()


@torch.no_grad()
def test_padded_sources(pair: Pair) -> None:
    """On the right, as transformers fills experts; the zoo's padding takes no place in them on either side."""
    sources, targets, lengths = tokens(3, 60), tokens(3, 20, seed=2), (60, 31, 4)
    mask = torch.stack([(torch.arange(60) < n).long() for n in lengths])
    theirs = pair.theirs(input_ids=sources, attention_mask=mask, decoder_input_ids=targets).logits
    right = pair.ours(sources, targets, mask).logits
    assert relative_difference(right, theirs) < LOGITS
    left = torch.stack([row.roll(60 - n) for row, n in zip(sources, lengths, strict=True)])
    assert relative_difference(pair.ours(left, targets, mask.flip(1)).logits, right) < LOGITS
    for row, n in enumerate(lengths):
        alone = pair.ours(sources[row : row + 1, :n], targets[row : row + 1]).logits[0]
        assert relative_difference(right[row], alone) < LOGITS


@torch.no_grad()
def test_bf16_is_at_least_as_close_to_fp32_as_transformers_is_to_itself(pair: Pair) -> None:
    sources, targets = tokens(16, 60), tokens(16, 40, seed=2)
    exact = pair.theirs(input_ids=sources, decoder_input_ids=targets).logits
    half = AutoModelForSeq2SeqLM.from_pretrained(pair.directory, dtype=torch.bfloat16)
    theirs = half(input_ids=sources, decoder_input_ids=targets).logits.float()
    ours = load_encoder_decoder(pair.directory, dtype=torch.bfloat16)(sources, targets).logits.float()
    # A token that rounding sends to another expert may take the last place there, and changes what others get: which of
    # two roundings does more of that is chance.
    allowed = 1.0 if pair.ours.config.moe is None else 1.5
    assert (ours - exact).abs().mean() <= allowed * (theirs - exact).abs().mean()


@torch.no_grad()
def test_export_is_loaded_by_transformers_and_reimport_is_bit_equal(pair: Pair, tmp_path: Path) -> None:
    import_checkpoint(pair.directory, tmp_path / "zoo")
    export_checkpoint(tmp_path / "zoo", tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "again")
    assert not verify(tmp_path / "zoo").findings
    assert not verify(tmp_path / "hf").findings
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.float32
    # Not their logits: MKL rounds by where in memory a matrix begins, on some processors.
    expected = pair.theirs.state_dict()
    assert theirs.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())
    assert find_any_spec(tmp_path / "again").model == find_any_spec(tmp_path / "zoo").model == pair.ours.config
    first, again = (tmp_path / name / "model.safetensors" for name in ("zoo", "again"))
    assert first.read_bytes() == again.read_bytes()


@torch.no_grad()
def test_sharded_layout_and_stored_copies_give_the_same_weights(pair: Pair, tmp_path: Path) -> None:
    """Old checkpoints hold the embedding again for each stack, and positions that nothing reads."""
    pair.theirs.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    stored = load_file(pair.directory / "model.safetensors")
    copies = {f"{stack}.embed_tokens.weight": stored["shared.weight"].clone() for stack in ("encoder", "decoder")}
    if pair.ours.config.moe is None:
        copies["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(16, 4)
    write(tmp_path / "copies", pair.directory, stored | copies)
    expected = pair.ours.state_dict()
    for layout in ("sharded", "copies"):
        found = load_encoder_decoder(tmp_path / layout).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    copies["encoder.embed_tokens.weight"][7] += 1
    write(tmp_path / "copies", pair.directory, stored | copies)
    with pytest.raises(ValueError, match=r"'encoder.embed_tokens.weight' differs from 'shared.weight'"):
        load_encoder_decoder(tmp_path / "copies")


def write(directory: Path, like: Path, tensors: dict[str, Tensor]) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes((like / "config.json").read_bytes())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("t5", {"relative_positions": {"max_distance": 128}}),
    ("t5", {"decoder_start_id": 5}),
    ("t5", {"norm_eps": 0.1}),
    ("switch", {"moe": {"expert_capacity": 64}}),
    ("switch", {"moe": {"expert_capacity": 4}}),
]
"""Case and change: one wrong setting with the same weights."""


@torch.no_grad()
@pytest.mark.parametrize(("case", "change"), MISTAKES)
def test_a_mistake_would_be_seen(case: str, change: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved_model(case, tmp_path)
    right = load_encoder_decoder(tmp_path)
    inner = {k: dataclasses.replace(getattr(right.config, k), **v) for k, v in change.items() if isinstance(v, dict)}
    wrong = EncoderDecoder(dataclasses.replace(right.config, **(change | inner)))
    wrong.load_state_dict(right.state_dict())
    sources, labels = tokens(2, 90), tokens(2, 60, seed=2)
    expected = theirs(input_ids=sources, labels=labels).logits
    assert relative_difference(wrong(sources, wrong.shifted(labels)).logits, expected) > 100 * LOGITS
