"""The loss of an optimizer step, its gradients, and what follows it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity
from training_steps import BIASED, SMALL, S, V, batches, fit_steps, one_step

from zoo.model import build
from zoo.moe.balance import (
    communication_balance_loss,
    device_balance_loss,
    load_balance_loss,
    sent_tokens,
    z_loss,
)
from zoo.moe.router import Router
from zoo.moe.stats import expert_counts
from zoo.training.module import ZooModule
from zoo.training.ramp import Ramp

COEFFICIENTS = {"load_balance_coef": 0.3, "z_loss_coef": 0.2}
OF_DEVICES = {"device_balance_coef": 0.4, "communication_balance_coef": 0.1, "balance_devices": 2}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_row_04_a_step_descends_the_mean_over_labels_plus_each_balance_loss_once(
    count: int, scope: Any, tmp_path: Path
) -> None:
    module = ZooModule("mixtral-tiny", SMALL, balance_scope=scope, seed=3, **COEFFICIENTS, **OF_DEVICES)
    gradients = one_step(module, batches(count), tmp_path)

    model = build(module.spec.model, seed=3).double()
    total, labels = torch.zeros((), dtype=torch.float64), 0
    seen = {"counts": torch.zeros(2, 4), "sent": torch.zeros(2, 2), "tokens": 0}
    for batch in batches(count):
        out = model(batch["input_ids"], document_ids=batch["document_ids"])
        mask, routing = batch["document_ids"] >= 0, out.router_outputs
        kept = batch["labels"] != -100
        nll = -out.logits.log_softmax(-1)[kept].gather(-1, batch["labels"][kept].unsqueeze(-1)).sum()
        counts = sent = None
        if scope == "global_batch":
            # Of this micro-batch and those before it.
            seen["counts"] = seen["counts"] + torch.stack([expert_counts(r, mask) for r in routing])
            seen["sent"] = seen["sent"] + torch.stack([sent_tokens(r, 2, mask) for r in routing])
            seen["tokens"] += mask.sum()
            counts, sent = list(seen["counts"]), list(seen["sent"] / seen["tokens"])
        of_tokens = "sequence" if scope == "sequence" else "micro_batch"
        balance = 0.3 * load_balance_loss(routing, mask, of_tokens, counts=counts) + 0.2 * z_loss(routing, mask)
        balance = balance + 0.4 * device_balance_loss(routing, 2, mask, of_tokens, counts=counts)
        balance = balance + 0.1 * communication_balance_loss(routing, 2, 2, mask, of_tokens, sent=sent)
        n = int(kept.sum())
        total, labels = total + nll + n * balance, labels + n
    loss = total / labels
    loss.backward()

    assert module.step_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[f"model.{name}"].double(), parameter.grad, rtol=1e-3, atol=1e-6)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert module.step_metrics["train/grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)


def test_a_split_step_has_the_gradients_of_the_whole_one(tmp_path: Path) -> None:
    parts = batches(3)
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    split = one_step(ZooModule("mixtral-tiny", SMALL), parts, tmp_path)
    unsplit = one_step(ZooModule("mixtral-tiny", SMALL), [whole], tmp_path)
    for name, gradient in unsplit.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-3, atol=1e-6)


def test_row_03_balance_gradients_are_those_of_any_split_where_the_definition_says_so(tmp_path: Path) -> None:
    """Of the z-loss and of losses per sequence, where the parts have equally many labels."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, V, (4, S + 1), generator=generator)
    whole = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "document_ids": torch.zeros(4, S, dtype=torch.long)}
    found = []
    for split in (1, 2, 4):
        module = ZooModule("mixtral-tiny", SMALL, balance_scope="sequence", **COEFFICIENTS, **OF_DEVICES)
        parts = [
            dict(zip(whole, part, strict=True)) for part in zip(*(v.chunk(split) for v in whole.values()), strict=True)
        ]
        found.append(one_step(module, parts, tmp_path))
    assert len(found[0]) == len(found[1])
    for name, gradient in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-6)


def test_row_03_balance_gradients_do_not_depend_on_recomputed_activations_which_take_less_memory(
    tmp_path: Path,
) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    kept = {}
    for recompute in ("none", "experts", "block"):
        module = ZooModule(
            "deepseek-v3-tiny",
            BIASED,
            balance_scope="global_batch",
            bias_update_rate=0.1,
            recompute=recompute,
            **COEFFICIENTS,
            **OF_DEVICES,
        )
        found[recompute] = one_step(module, batches(2), tmp_path) | dict(module.named_buffers())
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            module.model(batches(1)[0]["input_ids"], logits_to_keep=None)
        kept[recompute] = sum(saved)
    assert kept["block"] < kept["experts"] < kept["none"]
    for recompute in ("experts", "block"):
        assert found[recompute].keys() == found["none"].keys()
        for name, value in found["none"].items():
            torch.testing.assert_close(found[recompute][name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_a_ramp_weighs_a_loss_by_the_step(tmp_path: Path) -> None:
    ramp = Ramp(start=0.0, end=0.4, from_step=1, to_step=3)
    module = ZooModule("mixtral-tiny", SMALL, z_loss_coef=ramp, mtp_coef=0.0)
    seen = []

    class Weights(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
            metrics = pl_module.step_metrics
            extra = metrics["train/loss"] - metrics["train/lm_loss"]
            seen.append((extra / metrics["train/z_loss"]).item())

    fit_steps(module, 5, tmp_path, Weights())
    assert seen == pytest.approx([0.0, 0.0, 0.2, 0.4, 0.4], abs=1e-5)


def test_a_ramp_by_hand_and_its_mistakes() -> None:
    line = Ramp(start=1.0, end=0.0, from_step=10, to_step=20)
    assert [line.at(step) for step in (0, 10, 15, 20, 99)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    curve = Ramp(start=1.0, end=3.0, from_step=0, to_step=4, shape="cosine")
    assert [curve.at(step) for step in range(5)] == pytest.approx([1, 2 - math.sqrt(0.5), 2, 2 + math.sqrt(0.5), 3])
    jump = Ramp(start=0.3, end=0.1, from_step=5, to_step=5)
    assert [jump.at(step) for step in (4, 5)] == [0.3, 0.1]
    for field, values in {"end": (1, -1, 0, 1), "to_step": (1, 0, 5, 4), "throughout": (0, 0, 0, 1)}.items():
        with pytest.raises(ValueError, match=field):
            Ramp(**dict(zip(("start", "end", "from_step", "to_step"), values, strict=True)))


def test_row_07_the_selection_bias_moves_once_a_step_by_the_load_of_all_micro_batches(tmp_path: Path) -> None:
    module = ZooModule("deepseek-v3-tiny", BIASED, bias_update_rate=0.5, seed=1)
    one_step(module, batches(3), tmp_path)

    model = build(module.spec.model, seed=1)
    counts = torch.zeros(8)
    for batch in batches(3):
        routing = model(batch["input_ids"], document_ids=batch["document_ids"]).router_outputs[0]
        chosen = routing.experts[(batch["document_ids"] >= 0).flatten()]
        counts += F.one_hot(chosen, 8).sum((0, 1))
    assert counts.unique().numel() > 1
    (router,) = (m for m in module.model.modules() if isinstance(m, Router))
    assert router.bias is not None
    torch.testing.assert_close(router.bias, 0.5 * torch.sign(counts.mean() - counts))
    assert module.step_expert_counts.tolist() == [counts.long().tolist()]


def test_validation_leaves_the_model_alone_and_weighs_every_label_the_same(tmp_path: Path) -> None:
    module = ZooModule("deepseek-v3-tiny", BIASED, bias_update_rate=0.5)
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.validate(module, DataLoader(batches(3), batch_size=None), verbose=False)

    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    reference = Perplexity(ignore_index=-100)
    with torch.no_grad():
        for batch in batches(3):
            reference.update(module.model.logits(module(batch).hidden), batch["labels"])
    expected = reference.compute().item()
    assert module.val_metrics["val/perplexity"].item() == pytest.approx(expected, rel=1e-5)
    assert module.val_metrics["val/loss"].item() == pytest.approx(math.log(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mixtral-tin"}, "did you mean 'mixtral-tiny'"),
        ({"name": "mixtral-tiny", "overrides": {"moe": {"top_k": 9}}}, r"moe.top_k = 9: .* num_experts = 8"),
        ({"name": "mixtral-tiny", "overrides": {"moe": {"topk": 2}}}, "unknown key 'topk'; did you mean 'top_k'"),
        ({"name": "mixtral-tiny", "load_balance_coef": -1.0}, "model.load_balance_coef = -1.0"),
        ({"name": "mixtral-tiny", "bias_update_rate": -1.0}, "model.bias_update_rate = -1.0"),
        (
            {"name": "mixtral-tiny", "device_balance_coef": 0.1},
            "model.balance_devices = 1: give a divisor, .* 8 experts",
        ),
        ({"name": "mixtral-tiny", **OF_DEVICES, "balance_devices": 3}, "model.balance_devices = 3"),
        ({"name": "llama-tiny", **OF_DEVICES}, "model.device_balance_coef = 0.4: llama-tiny has no experts"),
        ({"name": "mixtral-tiny", "max_skipped_steps": -1}, "model.max_skipped_steps = -1"),
        ({"name": "llama-tiny", "z_loss_coef": 0.1}, "model.z_loss_coef = 0.1: llama-tiny has no experts"),
        ({"name": "mixtral-tiny", "bias_update_rate": 0.1}, "mixtral-tiny has no selection bias"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZooModule(**arguments)


def test_overrides_are_merged_into_the_model() -> None:
    config = ZooModule("mixtral-tiny", {"num_layers": 3, "moe": {"top_k": 1, "norm_topk_prob": False}}).spec.model
    assert config.moe is not None
    assert (config.num_layers, config.moe.top_k, config.moe.norm_topk_prob, config.moe.num_experts) == (3, 1, False, 8)


def test_a_dense_twin_is_an_override_away() -> None:
    spec = ZooModule("mixtral-tiny", {"moe": None}).spec
    assert spec.model.moe is None
    assert spec.family != "mixtral"
