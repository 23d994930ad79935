"""A few optimizer steps of a tiny model, on one process and in any layout: what the layouts are compared by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import numpy as np
import torch
from pool import TIMEOUT
from torch import Tensor
from torch.distributed.tensor import DTensor

from zoo.config import (
    AttentionConfig,
    InterleavedRopeConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RelativePositionConfig,
    RopeConfig,
)
from zoo.config_routing import RoutingConfig
from zoo.model import Decoder, build
from zoo.moe.balance import load_balance_loss, z_loss
from zoo.moe.router import Router, update_selection_bias
from zoo.moe.stats import expert_counts
from zoo.parallel import init
from zoo.parallel.apply import ParallelOptions, parallelize
from zoo.parallel.grads import clip_gradients, global_norm, set_last_micro_batch, sum_over_data
from zoo.parallel.mesh import Meshes, build_meshes
from zoo.parallel.plan import load_plan
from zoo.parallel.torch_private import gathered, local_slices, set_timeout
from zoo.registry import find_spec

_BASE = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_layers": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "norm_eps": 1e-6,
    "rope": RopeConfig(theta=10_000.0),
    "initializer_range": 0.2,
}
_GQA = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4)
_MIXTRAL = MoEConfig(
    num_experts=8, top_k=2, moe_intermediate_size=12, score_func="softmax", norm_topk_prob=True, router_bias=True
)
MODELS = {
    "mixtral": ModelConfig(**_BASE, attention=_GQA, moe=_MIXTRAL),
    "deepseek-v3": ModelConfig(
        **_BASE,
        mla=MLAConfig(num_heads=4, kv_lora_rank=8, q_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4),
        moe=MoEConfig(
            num_experts=8,
            top_k=3,
            moe_intermediate_size=8,
            score_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            num_groups=4,
            top_k_groups=2,
            group_score="top2_sum",
            router_bias=True,
            num_shared_experts=1,
            first_k_dense=1,
        ),
    ),
    "qwen2": ModelConfig(
        **_BASE,
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=4, qkv_bias=True),
        moe=MoEConfig(
            num_experts=8,
            top_k=4,
            moe_intermediate_size=8,
            score_func="softmax",
            norm_topk_prob=False,
            num_shared_experts=2,
            shared_expert_gate=True,
        ),
    ),
    "qwen3": ModelConfig(
        **{**_BASE, "tie_word_embeddings": True},
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm="head", output_bias=True),
        moe=dataclasses.replace(_MIXTRAL, router_bias=False),
    ),
    "gpt-oss": ModelConfig(
        **_BASE,
        attention=dataclasses.replace(_GQA, sinks=True, sliding_window=5, full_attention_interval=2),
        moe=dataclasses.replace(_MIXTRAL, router_bias=False, router_logit_bias=True, swiglu_limit=0.1),
    ),
    "llama4": ModelConfig(
        **_BASE,
        attention=dataclasses.replace(
            _GQA,
            interleaved_rope=InterleavedRopeConfig(
                full_attention_interval=2, chunk_size=5, qk_norm=True, temperature_scale=0.5, temperature_floor=4
            ),
        ),
        moe=MoEConfig(
            num_experts=8,
            top_k=1,
            moe_intermediate_size=12,
            score_func="sigmoid",
            norm_topk_prob=False,
            num_shared_experts=1,
            scaled_input=True,
            layer_interval=2,
        ),
    ),
    "capacity": ModelConfig(
        **_BASE,
        attention=_GQA,
        moe=dataclasses.replace(_MIXTRAL, routing=RoutingConfig(capacity_factor=0.75)),
    ),
    "expert-choice": ModelConfig(
        **_BASE,
        attention=_GQA,
        moe=dataclasses.replace(
            _MIXTRAL, norm_topk_prob=False, router_bias=False, routing=RoutingConfig(choice="expert")
        ),
    ),
    "dense": ModelConfig(**_BASE, attention=_GQA),
    "relative": ModelConfig(
        **_BASE | {"rope": None},
        attention=dataclasses.replace(_GQA, relative_positions=RelativePositionConfig(num_buckets=4, max_distance=6)),
        moe=dataclasses.replace(_MIXTRAL, router_bias=False, ffn="relu"),
    ),
    "ungated": ModelConfig(
        **_BASE,
        attention=_GQA,
        moe=dataclasses.replace(_MIXTRAL, router_bias=False, dense_ffn=True, layer_interval=2),
        ffn="relu",
    ),
}
MODELS["mtp"] = dataclasses.replace(MODELS["deepseek-v3"], mtp_depth=1)


def model_config(name: str) -> ModelConfig:
    """One of ``MODELS``, or a model of the zoo with their vocabulary and spread of weights."""
    if name in MODELS:
        return MODELS[name]
    small = {key: _BASE[key] for key in ("vocab_size", "initializer_range")}
    return dataclasses.replace(find_spec(name).model, **small)


Batch = tuple[Tensor, Tensor]
"""input_ids, labels, each [B, S]."""


@dataclass(frozen=True)
class Layout:
    """A plan and the sizes it is used with."""

    plan: str
    world: int
    tensor: int = 1
    expert: int = 1
    replicate: int | None = None
    pipeline: int = 1

    @property
    def data(self) -> int:
        return self.world // self.tensor // self.pipeline


@cache
def meshes_of(layout: Layout) -> Meshes:
    """The meshes of a layout, once in the life of a worker."""
    sizes = load_plan(layout.plan).sizes(
        layout.world,
        pipeline=layout.pipeline,
        tensor=layout.tensor,
        expert=layout.expert,
        replicate=layout.replicate,
    )
    meshes = build_meshes("cpu", sizes)
    set_timeout(timedelta(seconds=TIMEOUT))
    return meshes


PLAIN = ParallelOptions()

LAYOUTS = {
    "dp2": Layout("ddp", 2),
    "fsdp2": Layout("fsdp", 2),
    "ep2": Layout("ep", 2, expert=2),
    "tp2": Layout("tp_ep_fsdp", 2, tensor=2),
    "tp2_ep2_folded": Layout("tp_ep_fsdp", 2, tensor=2, expert=2),
    "dp2_ep2": Layout("ep", 4, expert=2),
    "fsdp2_ep2": Layout("ep_fsdp", 4, expert=2),
    "tp2_ep2": Layout("tp_ep_fsdp", 4, tensor=2, expert=2),
    "tp2_ep4": Layout("tp_ep_fsdp", 4, tensor=2, expert=4),
    "hybrid2_ep2": Layout("ep_fsdp", 4, expert=2, replicate=2),
}


@dataclass(frozen=True)
class Run:
    """What is trained, and how."""

    model: str
    steps: int = 5
    lr: float = 0.01
    accumulate: int = 1
    max_norm: float | None = 0.5
    bias_rate: float = 0.0
    idle: tuple[int, ...] = ()
    """Experts that no token chooses."""
    dtype: torch.dtype = torch.float64


Result = dict[str, np.ndarray]
"""``loss``, ``norm`` [steps], ``load`` [steps, L, E]; ``param/…``, ``grad/…``, ``exp_avg/…``, ``exp_avg_sq/…`` and
``buffer/…`` at the end."""


def batch(vocab_size: int, step: int, data_rank: int, micro: int) -> Batch:
    """Rows and labels differ in number from rank to rank and from micro-batch to micro-batch.

    No row begins with the same token twice: what attention makes of them is equal but for rounding, and where experts
    choose tokens that rounding, which may be another in another layout, would choose between them.
    """
    generator = torch.Generator().manual_seed(1000 * step + 10 * data_rank + micro)
    ids = torch.randint(vocab_size, (1 + (data_rank + micro + step) % 3, 7), generator=generator)
    ids[:, 1] = torch.where(ids[:, 0] == ids[:, 1], (ids[:, 1] + 1) % vocab_size, ids[:, 1])
    labels = ids.roll(-1, 1)
    labels[:, -1 - data_rank % 2 :] = -100
    return ids, labels


def micro_loss(model: Decoder, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over labels of all losses, expert counts [L, E])."""
    out = model(ids, logits_to_keep=None, mtp=True)
    loss = model.nll(out.hidden, labels)
    for hidden in out.mtp_hidden:
        loss = loss + 0.3 * model.nll(hidden[:, :-1], labels[:, 1:])
    if not out.router_outputs:
        return loss, torch.zeros(0, 0, dtype=torch.int64)
    count = (labels != -100).sum()
    loss = loss + count * (0.1 * load_balance_loss(out.router_outputs) + 0.01 * z_loss(out.router_outputs))
    return loss, torch.stack([expert_counts(r) for r in out.router_outputs])


def train(
    model: Decoder,
    run: Run,
    data_ranks: list[int],
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
    before_micro: Callable[[bool], None] = lambda last: None,
    batches: Callable[[int, int, int], Batch] | None = None,
) -> Result:
    """Train on the batches of ``data_ranks``, one micro-batch after the other."""
    make = batches or (lambda step, rank, micro: batch(model.config.vocab_size, step, rank, micro))
    routers = [m for m in model.modules() if isinstance(m, Router)]
    if run.idle:
        _keep_idle(model, routers, list(run.idle))
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=0.1)
    losses, norms, loads = [], [], []
    for step in range(run.steps):
        micros = [make(step, rank, micro) for micro in range(run.accumulate) for rank in data_ranks]
        labels = reduce(torch.stack([(y != -100).sum() for _, y in micros]).sum())
        total, counts = torch.zeros((), dtype=torch.float64), None
        for i, (ids, y) in enumerate(micros):
            before_micro(i == len(micros) - 1)
            loss, count = micro_loss(model, ids, y)
            (loss / labels).backward()
            total += loss.detach() / labels
            counts = count if counts is None else counts + count
        norm = global_norm(model.parameters())
        if run.max_norm is not None:
            clip_gradients(model.parameters(), run.max_norm, norm)
        optimizer.step()
        loads.append(reduce(counts))
        if run.bias_rate:
            for router, count in zip(routers, loads[-1], strict=True):
                update_selection_bias(router.bias, count, run.bias_rate)
        losses.append(reduce(total).item())
        norms.append(norm.item())
        if step < run.steps - 1:
            optimizer.zero_grad()
    measured = {"loss": np.array(losses), "norm": np.array(norms), "load": torch.stack(loads).numpy()}
    return measured | snapshot(model, optimizer)


@torch.no_grad()
def _keep_idle(model: Decoder, routers: list[Router], experts: list[int]) -> None:
    """Make the router choose none of ``experts``, whatever the tokens are.

    Where it has no bias for the selection, all tokens get a component in common, which the experts' rows oppose.
    """
    if all(router.bias is not None for router in routers):
        for router in routers:
            router.bias[experts] = -100.0
        return
    embedding = torch.from_numpy(whole(model.embed_tokens.weight))
    embedding[:, 0] = 2.0
    _fill(model.embed_tokens.weight, embedding)
    for router in routers:
        rows = torch.from_numpy(whole(router.weight))
        rows[experts] = 0.0
        rows[experts, 0] = -100.0
        _fill(router.weight, rows)


def _fill(parameter: Tensor, values: Tensor) -> None:
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(values[local_slices(parameter)])
    else:
        parameter.copy_(values)


def whole(tensor: Tensor) -> np.ndarray:
    full = gathered(tensor) if isinstance(tensor, DTensor) else tensor
    full = full.detach().clone()
    return full.float().numpy() if full.dtype == torch.bfloat16 else full.numpy()


def snapshot(model: Decoder, optimizer: torch.optim.Optimizer) -> Result:
    """Every parameter, gradient, moment and buffer, whole."""
    result = {f"buffer/{name}": whole(buffer) for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        result[f"param/{name}"] = whole(parameter)
        result[f"grad/{name}"] = whole(parameter.grad)
        for moment in ("exp_avg", "exp_avg_sq"):
            result[f"{moment}/{name}"] = whole(optimizer.state[parameter][moment])
    return result


def train_alone(run: Run, data: int) -> Result:
    """The same steps on one process, the batches of all data ranks as micro-batches."""
    model = build(model_config(run.model), seed=3, dtype=run.dtype)
    return train(model, run, list(range(data)))


def make_parallel(
    name: str, layout: Layout, dtype: torch.dtype = torch.float64, options: ParallelOptions = PLAIN, meta: bool = True
) -> tuple[Decoder, Meshes]:
    """A tiny model in ``layout``: spread without memory and then filled, or built whole and then spread."""
    meshes = meshes_of(layout)
    if not meta:
        return parallelize(build(model_config(name), 3, dtype), meshes, load_plan(layout.plan), options), meshes
    with torch.device("meta"):
        model = Decoder(model_config(name)).to(dtype)
    parallelize(model, meshes, load_plan(layout.plan), options)
    model.to_empty(device="cpu")
    init.initialize(model, seed=3)
    return model, meshes


def train_parallel(run: Run, layout: Layout, options: ParallelOptions = PLAIN) -> Result:
    """On one rank of a world; gathered results, the same on every rank."""
    model, meshes = make_parallel(run.model, layout, run.dtype, options)
    return train(
        model,
        run,
        [meshes.data.get_local_rank()],
        reduce=lambda x: sum_over_data(x, meshes),
        before_micro=lambda last: set_last_micro_batch(model, last),
    )
