"""Every family against transformers: models saved by it, read from disk by our importer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_cases import CASES, CONTEXT, relative_difference, saved_model, tokens
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import zoo
from zoo.config import ModelSpec
from zoo.families import expressible, family_of
from zoo.model import Decoder, build
from zoo.registry import find_spec, read_json
from zoo.weights import export_checkpoint, import_checkpoint, save_model

LOGITS = 1e-5
GRADIENTS = 1e-4


@dataclass(frozen=True)
class Pair:
    """The same weights in transformers and here."""

    directory: Path
    theirs: PreTrainedModel
    ours: Decoder


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp(request.param)
    theirs = saved_model(request.param, directory)
    yield Pair(directory, theirs, zoo.load(directory))


@torch.no_grad()
def test_logits_past_the_original_context(pair: Pair) -> None:
    ids = tokens(2, 3 * CONTEXT)
    ours = pair.ours(ids)
    assert relative_difference(ours.logits, pair.theirs(ids).logits) < LOGITS
    for routing in ours.router_outputs:  # the case would prove little if tokens did not differ in their experts
        assert len(routing.experts.unique()) > routing.scores.shape[1] // 2


def test_every_gradient(pair: Pair) -> None:
    ids = tokens(2, CONTEXT + 16)
    logits = pair.theirs(ids).logits, pair.ours(ids).logits
    for model, out in zip((pair.theirs, pair.ours), logits, strict=True):
        model.zero_grad()
        F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = _in_our_layout(pair.directory, {n: p.grad for n, p in pair.theirs.named_parameters()})
    ours = dict(pair.ours.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.grad is not None, name
        difference = (parameter.grad - theirs[name]).abs().max() / theirs[name].abs().max()
        assert difference < GRADIENTS, name


def _in_our_layout(directory: Path, named: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Gradients of a transformers model under our names, through the same operations as the weights."""
    spec = find_spec(directory)
    ops = family_of(read_json(directory / "config.json")).weight_map(spec.model, "fused")

    def read(name: str) -> Tensor:
        gradient = named.pop(name)
        assert gradient is not None, name
        return gradient

    trainable = [op for op in ops if not op.targets[0].endswith("router.bias")]
    mapped = dict(item for op in trainable for item in op.to_zoo(read))
    assert not named
    return mapped


@torch.no_grad()
def test_greedy_generation(pair: Pair) -> None:
    prompt = tokens(2, CONTEXT - 8)
    theirs = pair.theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, eos_token_id=None
    )
    assert zoo.generate(pair.ours, prompt, max_new_tokens=64) == theirs[:, prompt.shape[1] :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(pair: Pair, side: str) -> None:
    length, lengths = CONTEXT + 10, (CONTEXT + 10, 23, 5)
    ids, mask = tokens(3, length), torch.zeros(3, length, dtype=torch.int64)
    for row, n in enumerate(lengths):
        mask[row, length - n :] = 1 if side == "left" else 0
        if side == "right":
            mask[row, :n] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = pair.theirs(ids, attention_mask=mask, position_ids=positions).logits
    ours = pair.ours(ids, attention_mask=mask).logits
    assert relative_difference(ours[mask.bool()], theirs[mask.bool()]) < LOGITS


@torch.no_grad()
def test_packed_documents(pair: Pair) -> None:
    lengths = (7, CONTEXT + 20, 1, 30)
    ids = tokens(1, sum(lengths))
    document_ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    ours = pair.ours(ids, document_ids=document_ids).logits
    theirs = torch.cat([pair.theirs(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    assert relative_difference(ours, theirs) < LOGITS


@torch.no_grad()
def test_bf16_is_at_least_as_close_to_fp32_as_transformers_is_to_itself(pair: Pair) -> None:
    ids = tokens(64, 2 * CONTEXT)
    exact = pair.theirs(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(pair.directory, dtype=torch.bfloat16)(ids).logits.float()
    ours = zoo.load(pair.directory, dtype=torch.bfloat16)(ids).logits.float()
    our_errors, their_errors = ((logits - exact).abs().flatten(1) for logits in (ours, theirs))
    assert_not_larger(our_errors.mean(1), their_errors.mean(1))
    # Rounding sends tokens on the border between two experts either way in both: the median is of all the others.
    assert_not_larger(our_errors.median(1).values, their_errors.median(1).values)


def assert_not_larger(ours: Tensor, theirs: Tensor) -> None:
    """Errors [N] of the same N sequences: where nearly all logits are equal, which sum is the larger is chance.

    In the mean ours are no more than three standard errors of the difference above theirs.
    """
    difference = ours - theirs
    assert difference.mean() <= 3 * difference.std() / len(difference) ** 0.5


@torch.no_grad()
def test_export_is_loaded_by_transformers_and_reimport_is_bit_equal(pair: Pair, tmp_path: Path) -> None:
    import_checkpoint(pair.directory, tmp_path / "zoo")
    export_checkpoint(tmp_path / "zoo", tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "again")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.float32
    # Not their logits: MKL rounds by where in memory a matrix begins, on some processors.
    expected = pair.theirs.state_dict()
    assert theirs.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())
    assert find_spec(tmp_path / "again").model == find_spec(tmp_path / "zoo").model == pair.ours.config
    first, again = (tmp_path / name / "model.safetensors" for name in ("zoo", "again"))
    assert first.read_bytes() == again.read_bytes()


@torch.no_grad()
def test_bf16_checkpoint_keeps_its_bits(pair: Pair, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(pair.directory, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    import_checkpoint(tmp_path / "bf16", tmp_path / "zoo")
    export_checkpoint(tmp_path / "zoo", tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert exported.dtype == torch.bfloat16
    expected, found = (
        load_file(tmp_path / "bf16" / "model.safetensors"),
        load_file(tmp_path / "hf" / "model.safetensors"),
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@torch.no_grad()
def test_sharded_and_fused_layouts_give_the_same_weights(pair: Pair, tmp_path: Path) -> None:
    pair.theirs.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    pair.theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    expected = pair.ours.state_dict()
    for layout in ("sharded", "fused"):
        found = zoo.load(tmp_path / layout).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["mixtral-tiny", "deepseek-v2-tiny", "deepseek-v3-tiny", "qwen2-moe-tiny", "qwen3-moe-tiny"]
)
def test_dense_twin_is_loaded_by_transformers(name: str, tmp_path: Path) -> None:
    config = dataclasses.replace(find_spec(name).model, moe=None)
    spec = ModelSpec(name="twin", family=expressible(config), model=config)
    model = build(config)
    save_model(model, spec, tmp_path / "zoo")
    export_checkpoint(tmp_path / "zoo", tmp_path / "hf")
    ids = tokens(2, 40)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert relative_difference(model(ids).logits, theirs(ids).logits) < LOGITS


@pytest.mark.parametrize("name", ["jamba-v0.1", "jamba-1.5-mini"])
def test_row_19_which_layers_of_jamba_have_what(name: str) -> None:
    config = find_spec(name).model
    layers = range(config.num_layers)
    assert [i for i in layers if not config.is_mamba_layer(i)] == [i for i in layers if i % 8 == 4]
    assert [i for i in layers if config.is_moe_layer(i)] == [i for i in layers if i % 2 == 1]
    assert config.rope is None and config.moe is not None and not config.moe.norm_topk_prob
    with torch.device("meta"):
        mixer = dict(Decoder(config).layers[0].mixer.named_parameters())
    sizes = {name: tuple(mixer[f"{name}_norm.weight"].shape) for name in ("dt", "b", "c")}
    assert sizes == {"dt": (256,), "b": (16,), "c": (16,)}


MISTAKES: list[tuple[str, str, dict[str, Any]]] = [
    ("mistral", "attention", {"sliding_window": None}),
    ("llama-3.1", "rope", {"llama3": None}),
    ("llama-linear", "rope", {"linear": None}),
    ("llama-yarn", "rope", {"yarn": None}),
    ("mixtral", "moe", {"norm_topk_prob": False}),
    ("qwen2-moe", "moe", {"norm_topk_prob": True}),
    ("qwen3-moe", "moe", {"norm_topk_prob": False}),
    ("gemma2", "attention", {"logit_softcap": None}),
    ("gemma2", "attention", {"full_attention_interval": None}),
    ("gemma2", "attention", {"query_scale_dim": None}),
    ("gpt-oss", "attention", {"full_attention_interval": None}),
    ("gpt-oss", "moe", {"norm_topk_prob": False}),
    ("gpt-oss", "moe", {"swiglu_limit": 7.0}),
    ("gpt-oss", "rope.yarn", {"truncate": True}),
    ("dbrx", "attention", {"clip_qkv": None}),
    ("dbrx", "moe", {"norm_topk_prob": False}),
    ("llama4", "moe", {"scaled_input": False}),
    ("llama4", "attention.interleaved_rope", {"chunk_size": 1000}),
    ("llama4", "attention.interleaved_rope", {"qk_norm": False}),
    ("llama4", "attention.interleaved_rope", {"temperature_scale": 0.0}),
    ("llama4", "attention.interleaved_rope", {"full_attention_interval": 2}),
    ("llama4", "rope", {"layout": "split"}),
    ("olmoe", "moe", {"norm_topk_prob": True}),
    ("jamba", "moe", {"norm_topk_prob": True}),
    ("deepseek-v2", "moe", {"group_score": "top2_sum"}),
    ("deepseek-v2", "moe", {"num_groups": 1, "top_k_groups": 1}),
    ("deepseek-v2", "moe", {"routed_scaling_factor": 1.0}),
    ("deepseek-v2", "rope", {"layout": "split"}),
    ("deepseek-v2", "rope.yarn", {"mscale_all_dim": None}),
    ("deepseek-v2", "rope.yarn", {"attention_factor": 1.14}),
    ("deepseek-v3", "moe", {"group_score": "max"}),
    ("deepseek-v3", "moe", {"score_func": "softmax"}),
    ("deepseek-v3", "moe", {"norm_topk_prob": False}),
    ("deepseek-v3", "rope.yarn", {"attention_factor": 1.2}),
    ("deepseek-v3-split", "rope", {"layout": "interleaved"}),
]
"""Case, block and change: what implementations of these models have got wrong."""


def changed(config: Any, path: list[str], change: dict[str, Any]) -> Any:
    """``config`` with ``change`` in the block that ``path`` leads to."""
    if path:
        change = {path[0]: changed(getattr(config, path[0]), path[1:], change)}
    return dataclasses.replace(config, **change)


@torch.no_grad()
@pytest.mark.parametrize(("case", "block", "change"), MISTAKES)
def test_a_mistake_would_be_seen(case: str, block: str, change: dict[str, Any], tmp_path: Path) -> None:
    """The same weights under one wrong setting are far outside the tolerance of the tests above."""
    theirs = saved_model(case, tmp_path)
    right = zoo.load(tmp_path)
    wrong = Decoder(changed(right.config, block.split("."), change))
    wrong.load_state_dict(right.state_dict())
    ids = tokens(2, 2 * CONTEXT)
    assert relative_difference(wrong(ids).logits, theirs(ids).logits) > 100 * LOGITS
