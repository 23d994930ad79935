"""Models with a routing block as a whole: what configs refuse, what they cost, how they are kept, trained and used."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

from zoo.accounting import count_parameters, forward_flops, training_flops, weight_bytes
from zoo.config import ModelConfig, ModelSpec
from zoo.config_reading import from_dict, to_dict
from zoo.config_routing import RoutingConfig
from zoo.generation import generate
from zoo.model import Decoder, build
from zoo.moe.exploration import Temperature, set_step
from zoo.parallel.apply import check_sizes, recompute_activations
from zoo.parallel.mesh import MeshSizes
from zoo.parallel.plan import load_plan, resolve
from zoo.parallel.stages import cut
from zoo.registry import find_spec, paper_names
from zoo.speculative import check_speculative
from zoo.training.fit import fit
from zoo.weights import load, save_model


def narrow(name: str) -> ModelConfig:
    """The tiny model ``name``, smaller."""
    config = find_spec(name).model
    moe = config.moe and dataclasses.replace(config.moe, moe_intermediate_size=16)
    return dataclasses.replace(config, vocab_size=300, hidden_size=32, intermediate_size=32, moe=moe)


def with_routing(name: str = "gshard-decoder-tiny", moe: dict[str, Any] | None = None, **routing: Any) -> ModelConfig:
    tree = to_dict(find_spec(name).model)
    tree["moe"] |= moe or {}
    tree["moe"]["routing"] = routing
    return from_dict(ModelConfig, tree)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"choice": "tokens"}, r"choice = 'tokens': use one of 'token', 'expert', 'sinkhorn', 'hash'"),
    ({}, {"capacity_factor": 0}, r"moe.routing.capacity_factor = 0.0: give a positive number, or null"),
    ({}, {"jitter": 1.0}, r"moe.routing.jitter = 1.0: give a number below 1"),
    ({"expert_dropout": 1}, {}, r"moe.expert_dropout = 1.0: give a probability below 1"),
    ({"top_k": 3}, {"second_expert_threshold": 0.2}, r"second_expert_threshold = 0.2: .* set top_k: 2"),
    ({"top_k": 8}, {"dense_training": True}, r"top_k = 8 are all experts anyway"),
    ({}, {"dense_training": True, "capacity_factor": 2}, r"choice = token: capacity_factor would have no effect"),
    ({}, {"choice": "expert", "eval_capacity_factor": 2}, r"eval_capacity_factor, norm_topk_prob would have no effect"),
    ({"norm_topk_prob": False}, {"choice": "hash", "noise": True}, r"choice = hash: noise would have no effect"),
    ({"num_groups": 2}, {"choice": "sinkhorn"}, r"choice = sinkhorn: num_groups would have no effect"),
    ({}, {"temperature": {"start": 2, "end": 0, "steps": 5}}, r"temperature.end = 0.0: give a positive number"),
    ({"router_logit_bias": True}, {"noise": True}, r"moe.routing = token: routers with scaled_input or router_logit"),
]


@pytest.mark.parametrize(("moe", "routing", "message"), REFUSED, ids=[str(r) + str(m) for m, r, _ in REFUSED])
def test_what_has_no_meaning_is_refused_with_the_fix(
    moe: dict[str, Any], routing: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        with_routing(moe=moe, **routing)
    assert "\n" not in str(error.value)


def test_the_documentation_has_every_model_and_says_who_is_causal(repository: Path) -> None:
    table = (repository / "docs" / "routing.md").read_text()
    for name in [name for name in paper_names() if name.endswith("-tiny")]:
        [row] = [line for line in table.splitlines() if f"| `{name}` |" in line]
        moe = find_spec(name).model.moe
        assert moe is not None
        routing = moe.routing or RoutingConfig()
        said = {(True, True): "yes", (True, False): "outside of training", (False, False): "no"}
        assert f"| `{name}` | {said[routing.causal, routing.causal_in_training]} |" in row
        assert row.endswith("| yes |" if routing.causal else "| refused |")


@pytest.mark.parametrize("name", paper_names())
def test_parameters_are_those_of_the_model(name: str) -> None:
    spec = find_spec(name)
    with torch.device("meta"):
        model = Decoder(spec.model)
    assert count_parameters(spec.model).with_mtp == sum(p.numel() for p in model.parameters())
    assert weight_bytes(spec.model, 4) == sum(t.nbytes for t in model.state_dict().values())


def test_flops_of_training_are_of_all_that_is_computed_then() -> None:
    plain = with_routing(moe={"norm_topk_prob": False}, choice="token")
    width, layers = plain.hidden_size, 2
    expert = 3 * width * 256
    assert forward_flops(with_routing(noise=True), 64) == forward_flops(plain, 64)
    assert training_flops(with_routing(noise=True), 64) - training_flops(plain, 64) == 6 * layers * 8 * width
    dense = with_routing(dense_training=True)
    assert training_flops(dense, 64) - training_flops(plain, 64) == 6 * layers * (8 - 2) * expert
    hashed = with_routing(moe={"norm_topk_prob": False}, choice="hash")
    assert forward_flops(plain, 64) - forward_flops(hashed, 64) == 2 * layers * 8 * width


def test_a_checkpoint_keeps_the_step_of_an_annealed_temperature(tmp_path: Path) -> None:
    config = narrow("annealed-top-k-tiny")
    model = build(config)
    assert all(m.step == 0 for m in model.modules() if isinstance(m, Temperature))
    set_step(model, 300)
    save_model(model, ModelSpec(name="annealed", family=None, model=config), tmp_path / "annealed")
    loaded = load(tmp_path / "annealed", dtype=torch.bfloat16)
    assert [int(m.step) for m in loaded.modules() if isinstance(m, Temperature)] == [300] * 4


@pytest.mark.parametrize("name", ["switch-decoder-tiny", "hash-tiny", "ds-moe-tiny"])
def test_generation_goes_on_from_the_cache(name: str) -> None:
    """One token a call finds a place in any expert; a prompt that is short enough does, too."""
    model = build(narrow(name), dtype=torch.float64).eval()
    prompts = [[5, 6, 7], [8]]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(6):
            # Every token that is generated was a call of its own.
            cache = model.new_cache(1, len(tokens))
            model(torch.tensor([prompt]), cache=cache)
            out = [model(torch.tensor([[t]]), cache=cache) for t in tokens[len(prompt) :]]
            last = out[-1] if out else model(torch.tensor([prompt]))
            tokens.append(int(last.logits[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    assert generate(model, prompts, max_new_tokens=6) == expected


@pytest.mark.parametrize("recompute", ["experts", "block"])
@pytest.mark.parametrize("name", ["st-moe-decoder-tiny", "noisy-top-k-tiny", "expert-choice-tiny"])
def test_recomputed_activations_draw_the_same_numbers(name: str, recompute: Literal["experts", "block"]) -> None:
    gradients = []
    for what in ("none", recompute):
        model = build(narrow(name), dtype=torch.float64).train()
        recompute_activations(model, what)  # type: ignore[arg-type]
        torch.manual_seed(3)
        model(torch.randint(300, (2, 12))).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert any(g.abs().sum() > 0 for g in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_experts_that_choose_neither_generate_nor_score() -> None:
    model = build(narrow("expert-choice-tiny")).eval()
    with pytest.raises(
        ValueError, match=r"moe.routing.choice = expert: what an expert chooses depends on later tokens"
    ):
        generate(model, [[1, 2]], max_new_tokens=1)


def test_drafts_that_would_take_places_are_refused() -> None:
    routing = {"eval_capacity_factor": 2.0}
    config = dataclasses.replace(with_routing(**routing), mtp_depth=1)
    with torch.device("meta"):
        drafting = Decoder(config)
    with pytest.raises(ValueError, match="drafts compete for places in the experts"):
        check_speculative(drafting)


def test_layouts_that_would_route_otherwise_are_refused() -> None:
    with torch.device("meta"):
        random, hashed = Decoder(narrow("gshard-decoder-tiny")), Decoder(narrow("hash-tiny"))
    rules = resolve(load_plan("tp_ep_fsdp"), random)
    with pytest.raises(ValueError, match=r"tensor = 2 ranks: they would draw different random numbers"):
        check_sizes(random.config, MeshSizes(tensor=2), rules)
    check_sizes(random.config, MeshSizes(data_shard=2, expert=2), rules)
    with pytest.raises(ValueError, match=r"pipeline: moe.routing.choice = hash: only the first stage has the tokens"):
        cut(hashed, range(2))


def fit_named(fit_config: Path, run: Path, name: str, steps: int, **moe: Any) -> list[str]:
    values = yaml.safe_load(fit_config.read_text())
    attention = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 16}
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_layers": 2, "intermediate_size": 32, "attention": attention}
    moe = {"moe_intermediate_size": 16, "layer_interval": 2, **moe}
    values["model"] |= {"name": name, "overrides": {**sizes, "moe": moe}, "bias_update_rate": 0.0}
    values["trainer"] |= {"default_root_dir": str(run), "max_steps": steps}
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return ["--config", str(path)]


def test_training_anneals_and_logs_what_is_dropped(fit_config: Path, tmp_path: Path) -> None:
    temperature = {"start": 3.0, "end": 1.0, "steps": 4}
    routing = {"capacity_factor": 0.5, "jitter": 0.1, "temperature": temperature}
    run = tmp_path / "run"
    assert fit(fit_named(fit_config, run, "annealed-top-k-tiny", 6, routing=routing)) == 0
    with (run / "metrics.csv").open(newline="") as file:
        dropped = [
            float(row["train/dropped_fraction"]) for row in csv.DictReader(file) if row["train/dropped_fraction"]
        ]
    assert len(dropped) == 6 and all(0.45 < share < 0.8 for share in dropped)
    assert [int(m.step) for m in load(run / "final").modules() if isinstance(m, Temperature)] == [5]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in paper_names() if name.endswith("-tiny")])
def test_every_routing_trains_by_its_name(
    name: str, fit_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(fit_named(fit_config, tmp_path / "run", name, 5)) == 0
    said = {"expert-choice-tiny": "after and while training", "sinkhorn-tiny": "later tokens while training"}
    err = capsys.readouterr().err
    assert said[name] in err if name in said else "later tokens" not in err
