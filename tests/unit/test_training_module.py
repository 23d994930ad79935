"""The loss of an optimizer step, its gradients, and what follows it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity

from zoo.model import build
from zoo.moe.balance import (
    communication_balance_loss,
    device_balance_loss,
    load_balance_loss,
    sent_tokens,
    z_loss,
)
from zoo.moe.router import Router, update_selection_bias
from zoo.moe.stats import expert_counts
from zoo.training.guard import SpikeConfig, robust_limit
from zoo.training.module import ZooModule
from zoo.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer
from zoo.training.ramp import Ramp

B, S, V = 2, 12, 50
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_layers": 2,
    "intermediate_size": 32,
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    "moe": {"num_experts": 4, "moe_intermediate_size": 8},
}
BIASED = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_layers": 2,
    "intermediate_size": 32,
    "mla": dict(num_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    "moe": {"num_experts": 8, "top_k": 2, "moe_intermediate_size": 8},
}


def batches(count: int) -> list[dict[str, Tensor]]:
    """Micro-batches with unequal numbers of labels, two documents a row and padding in the last."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids = torch.randint(0, V, (B, S + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:, 5] = -100
        labels[0, : 3 * i] = -100
        documents = torch.arange(S).ge(6).long().repeat(B, 1)
        if i == count - 1:
            documents[1, 9:] = -1
            labels[1, 9:] = -100
        made.append({"input_ids": ids[:, :-1], "labels": labels, "document_ids": documents})
    return made


class Gradients(Callback):
    """Keeps the gradients that the optimizer used."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}


def trainer_of(tmp_path: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **arguments,
    )


def one_step(module: ZooModule, micro_batches: list[dict[str, Tensor]], tmp_path: Path) -> dict[str, Tensor]:
    """Take one optimizer step over ``micro_batches`` and return its gradients."""
    gradients = Gradients()
    trainer = trainer_of(tmp_path, gradients, max_steps=1, accumulate_grad_batches=len(micro_batches))
    trainer.fit(module, DataLoader(micro_batches, batch_size=None))
    return gradients.values


def fit_steps(module: ZooModule, steps: int, tmp_path: Path, *callbacks: Callback, **arguments: Any) -> None:
    """Take so many optimizer steps."""
    data = batches(steps * arguments.get("accumulate_grad_batches", 1))
    trainer_of(tmp_path, *callbacks, max_steps=steps, **arguments).fit(module, DataLoader(data, batch_size=None))


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


class Poison(Callback):
    """Makes the loss or a gradient of some optimizer steps, from 0, not finite."""

    def __init__(self, kind: str, steps: tuple[int, ...]) -> None:
        self.kind, self.steps = kind, steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def infinite(module: Any, args: Any, out: Tensor) -> Tensor:
            return out * (math.inf if self.kind == "loss" and trainer.global_step in self.steps else 1)

        pl_module.model.norm.register_forward_hook(infinite)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.kind == "gradient" and trainer.global_step in self.steps:
            pl_module.model.norm.weight.grad[3] = math.nan


def train_poisoned(module: ZooModule, kind: str, poisoned: tuple[int, ...], tmp_path: Path, steps: int = 6) -> None:
    fit_steps(module, steps, tmp_path, Poison(kind, poisoned), accumulate_grad_batches=2, gradient_clip_val=0.1)


def test_a_step_that_is_not_finite_names_the_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first whose output is not finite, or the first gradient, not those that follow from it."""
    drawn = []

    class Break(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            layers = pl_module.model.layers
            layers[1].ffn.router.register_forward_hook(lambda *_: drawn.append(torch.rand(1).item()))
            # In the second micro-batch of step 1 only.
            layers[0].mixer.o_proj.register_forward_hook(
                lambda m, args, out: out / (0 if trainer.global_step == 1 and args[0].shape[0] == 1 else 1)
            )

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 2:
                for name, parameter in pl_module.model.named_parameters():
                    if name.startswith(("embed", "layers.0")) or name == "layers.1.mixer_norm.weight":
                        parameter.grad[0] = math.nan

    data = batches(8)
    data[3] = {key: value[:1] for key, value in data[3].items()}
    module = ZooModule("mixtral-tiny", SMALL)
    trainer = trainer_of(tmp_path, Break(), max_steps=4, accumulate_grad_batches=2)
    trainer.fit(module, DataLoader(data, batch_size=None))
    assert capsys.readouterr().err.splitlines() == [
        "step 2 is skipped: training loss is not finite, first in the output of layers.0.mixer.o_proj",
        "step 3 is skipped: training gradient norm is not finite, first in the gradient of layers.1.mixer_norm.weight",
    ]
    # The second run of either micro-batch of step 2 gave the random numbers back that it drew.
    assert len(drawn) == 10
    assert len(set(drawn)) == 8


def test_loss_spikes_are_skipped_up_to_a_limit_also_after_a_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Spike(Callback):
        """Gradients of some steps, from 0, are a hundred times too large."""

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            for parameter in pl_module.parameters():
                if parameter.grad is not None and trainer.global_step in (1, 6, *range(9, 14)):
                    parameter.grad.mul_(100)

    skipped = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
            after = pl_module.model.norm.weight.detach().clone()
            skipped.append(bool(self.__dict__.get("before", after - 1).equal(after)))
            self.before = after

    def train(steps: int, checkpoint: Path | None = None) -> ZooModule:
        constant = ScheduleConfig(shape="wsd")
        spikes = SpikeConfig(threshold=20, window=5, max_in_a_row=3)
        module = ZooModule("mixtral-tiny", SMALL, spikes=spikes, schedule=constant)
        trainer = trainer_of(tmp_path, Spike(), Watch(), max_steps=steps)
        trainer.fit(module, DataLoader(batches(1) * 16, batch_size=None), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    # Step 1 is before the window is full; of five in a row the first three are skipped.
    module = train(16)
    assert [step for step, was in enumerate(skipped) if was] == [6, 9, 10, 11]
    assert (module.guard.skipped.total, module.guard.skipped.spikes) == (4, 4)
    assert module.step_metrics["train/skipped_spikes"].item() == 4
    assert re.fullmatch(r"step 7 is skipped: gradient norm \S+ is above \S+", capsys.readouterr().err.splitlines()[0])

    train(11)
    again = train(16, tmp_path / "11.ckpt")
    assert again.guard.skipped == module.guard.skipped
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_robust_limit_by_hand() -> None:
    # Median 3; distances 2, 1, 0, 1, 97, of median 1.
    assert robust_limit((1.0, 2.0, 3.0, 4.0, 100.0), 2.0) == pytest.approx(3 + 2 * 1.4826)
    assert robust_limit((5.0, 5.0, 5.0), 10.0) == pytest.approx(5.5)
    for field, value in {"threshold": 0.0, "window": 2, "max_in_a_row": 0}.items():
        with pytest.raises(ValueError, match=f"spikes.{field} = {value}"):
            SpikeConfig(**{field: value})


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing_but_the_schedule_and_the_data(kind: str, tmp_path: Path) -> None:
    schedule = ScheduleConfig(warmup_steps=3)
    module = ZooModule("deepseek-v3-tiny", BIASED, bias_update_rate=0.01, seed=1, schedule=schedule)
    train_poisoned(module, kind, (0, 3), tmp_path)
    assert (module.guard.skipped.total, module.guard.skipped.in_a_row) == (2, 0)
    assert module.step_metrics["train/skipped_steps"].item() == 2

    model = build(module.spec.model, seed=1)
    adamw, lr = build_optimizer(model, OptimizerConfig(), schedule, 6)
    routers = [m for m in model.modules() if isinstance(m, Router)]
    data = batches(12)
    for step in range(6):
        outputs = [(b, model(b["input_ids"], document_ids=b["document_ids"])) for b in data[2 * step : 2 * step + 2]]
        labels = sum((b["labels"] != -100).sum() for b, _ in outputs)
        nlls = (F.cross_entropy(out.logits.mT, b["labels"], reduction="sum") for b, out in outputs)
        (sum(nlls) / labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if step not in (0, 3):
            adamw.step()
            for i, router in enumerate(routers):
                counts = sum(expert_counts(out.router_outputs[i], b["document_ids"] >= 0) for b, out in outputs)
                update_selection_bias(router.bias, counts, 0.01)
        adamw.zero_grad()
        lr.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    patient = ZooModule("mixtral-tiny", SMALL, max_skipped_steps=2)
    train_poisoned(patient, "gradient", (0, 1, 3, 4), tmp_path)
    assert patient.guard.skipped.total == 4
    module = ZooModule("mixtral-tiny", SMALL, max_skipped_steps=2)
    with pytest.raises(ValueError, match="training loss = nan at step 4, after 2 skipped steps in a row"):
        train_poisoned(module, "loss", (1, 2, 3), tmp_path)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


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
