"""A decoder in stages trains as one process does, from Python, alone and with the other dimensions."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layouts import MODELS, PLAIN, Layout, Result, meshes_of, snapshot
from pool import Pools
from torch import Tensor

from zoo.model import Decoder, build
from zoo.moe.balance import load_balance_loss, z_loss
from zoo.moe.router import Router, update_selection_bias
from zoo.moe.stats import expert_counts
from zoo.parallel import init
from zoo.parallel.apply import ParallelOptions
from zoo.parallel.grads import clip_gradients, global_norm, sum_over_data
from zoo.parallel.pipeline import Pipeline
from zoo.parallel.plan import load_plan

ROWS, LENGTH = 4, 9
STEPS, LEARNING_RATE, BIAS_RATE = 3, 0.01, 0.01
MICRO_BATCHES = 2


def model_of(name: str, layers: int = 4) -> MODELS:
    return dataclasses.replace(MODELS[name], num_layers=layers)


def batch(step: int, data_rank: int) -> dict[str, Tensor]:
    """Packed documents of all lengths; labels that differ in number from row to row; padding at the end of some."""
    generator = torch.Generator().manual_seed(100 * step + data_rank)
    ids = torch.randint(37, (ROWS, LENGTH), generator=generator)
    documents = (torch.rand(ROWS, LENGTH, generator=generator) < 0.3).cumsum(1)
    mask = torch.ones_like(ids)
    mask[data_rank::3, -2:] = 0
    labels = ids.roll(-1, 1).masked_fill(documents != documents.roll(-1, 1), -100).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "labels": labels, "document_ids": documents, "attention_mask": mask}


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def balance(outputs: list, micro: dict[str, Tensor]) -> Tensor:
    mask = micro["attention_mask"] != 0
    loss = 0.3 * load_balance_loss(outputs, mask) + 0.1 * z_loss(outputs, mask)
    return (micro["labels"] != -100).sum() * loss


def update(parameters, routers, optimizer, norm, counts) -> None:
    clip_gradients(parameters, 0.5, norm)
    optimizer.step()
    for router, count in zip(routers, counts, strict=True):
        if router.bias is not None:
            update_selection_bias(router.bias, count, BIAS_RATE)


@cache
def alone(name: str, data: int, layers: int = 4) -> Result:
    """One process, the micro-batches one after the other."""
    model = build(model_of(name, layers), seed=3, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    routers = [m for m in model.modules() if isinstance(m, Router)]
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        batches = [batch(step, rank) for rank in range(data)]
        labels = sum((b["labels"] != -100).sum() for b in batches)
        total, counts = 0.0, 0
        for whole in batches:
            for part in range(MICRO_BATCHES):
                rows = slice(part * ROWS // MICRO_BATCHES, (part + 1) * ROWS // MICRO_BATCHES)
                micro = {key: tensor[rows] for key, tensor in whole.items()}
                out = model(micro["input_ids"], micro["attention_mask"], document_ids=micro["document_ids"])
                loss = nll(out.logits, micro["labels"])
                if out.router_outputs:
                    loss = loss + balance(out.router_outputs, micro)
                    mask = micro["attention_mask"] != 0
                    counts = counts + torch.stack([expert_counts(o, mask) for o in out.router_outputs])
                (loss / labels).backward()
                total += loss.item() / labels.item()
        norm = global_norm(model.parameters())
        update(model.parameters(), routers, optimizer, norm, counts if routers else [])
        losses.append(total)
        norms.append(norm.item())
    return {"loss": np.array(losses), "norm": np.array(norms)} | snapshot(model, optimizer)


def make(name: str, layout: Layout, options: ParallelOptions, layers: int, settings: dict) -> Pipeline:
    with torch.device("meta"):
        model = Decoder(model_of(name, layers)).to(torch.float64)
    pipeline = Pipeline(
        model, meshes_of(layout), load_plan(layout.plan), options, **{"micro_batches": MICRO_BATCHES, **settings}
    )
    for stage in pipeline.stages.values():
        init.initialize(stage.to_empty(device="cpu"), seed=3)
    return pipeline


def train(name: str, layout: Layout, options: ParallelOptions = PLAIN, layers: int = 4, **settings: object) -> Result:
    """On one rank; losses and norms, and of everything else what its stages hold."""
    pipeline, meshes = make(name, layout, options, layers, settings), meshes_of(layout)
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        rows = batch(step, meshes.data.get_local_rank())
        labels = sum_over_data((rows["labels"] != -100).sum(), meshes)
        result = pipeline.step(rows, lambda x, y, n=labels: nll(x, y) / n, lambda o, m, n=labels: balance(o, m) / n)
        norm = global_norm(pipeline.parameters(), meshes.pipeline)
        counts = sum_over_data(result.expert_counts, meshes)
        update(list(pipeline.parameters()), pipeline.routers(), optimizer, norm, counts)
        losses.append(sum_over_data(result.loss, meshes).item())
        norms.append(norm.item())
    held = {"loss": np.array(losses), "norm": np.array(norms)}
    for stage in pipeline.stages.values():
        held |= snapshot(stage, optimizer)
    return held


PP2 = Layout("fsdp", 2, pipeline=2)
PP2_FSDP2 = Layout("fsdp", 4, pipeline=2)
PP2_EP2 = Layout("ep_fsdp", 4, pipeline=2, expert=2)
PP2_TP2 = Layout("tp_ep_fsdp", 4, pipeline=2, tensor=2, expert=2)


def check(pools: Pools, name: str, layout: Layout, *args: object, layers: int = 4, **settings: object) -> None:
    """Every rank has the loss and norm of one process, and all stages together everything that one process has."""
    expected = alone(name, layout.data, layers)
    found: Result = {}
    for result in pools[layout.world].run(train, name, layout, *args, layers=layers, **settings):
        for key, values in result.items():
            np.testing.assert_allclose(values, expected[key], rtol=1e-10, atol=1e-10, err_msg=key)
        found |= result
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("layout", [PP2, PP2_FSDP2, PP2_EP2, PP2_TP2], ids=["pp2", "pp2_fsdp2", "pp2_ep2", "pp2_tp2"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_stages_train_as_one_process(pools: Pools, name: str, layout: Layout) -> None:
    check(pools, name, layout)
