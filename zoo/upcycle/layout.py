"""Which part of a dense FFN goes into which expert of a sparse model.

A dense FFN is a sum over its F hidden units, so that it is the sum of G = F / M *parts* of M units, one expert wide.
Shared experts take the first S of them, routed experts the other R = G - S, each in E / R copies; where shared experts
take all G, routed ones do so once more and both give half of the output.

Expert e holds part e mod R. R neighbours that hold all parts are a *virtual group* (arXiv 2410.07524): their rows of
the router are equal, so that the K best experts are K / R whole groups, and what they hold adds up to the dense FFN,
times Σ weights / R. The output projection of the experts is divided by that. Where the weights of a token's experts
always add up to the same, the first forward equals the dense model's; where they do not, as with a softmax over all
experts that is not normalised over the K, only that of a router that makes no difference.

Shapes: F dense FFN, M expert, G = F / M parts, S of them shared, R routed, E experts, K top-k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from zoo.config import ModelConfig, ModelSpec, MoEConfig
from zoo.families import expressible

FREE_FIELDS = frozenset(("moe", "intermediate_size", "max_position_embeddings", "initializer_range"))
"""Of ``ModelConfig``, in which dense and sparse model may differ: no other weight depends on them, nor what it does."""

EXACT_FIELDS = frozenset(
    (
        *("num_experts", "top_k", "moe_intermediate_size", "score_func", "norm_topk_prob", "routed_scaling_factor"),
        *("num_groups", "top_k_groups", "group_score", "router_bias", "router_logit_bias"),
        *("num_shared_experts", "shared_expert_gate", "first_k_dense", "layer_interval"),
        *("expert_dropout", "routing"),
    )
)
"""Of ``MoEConfig``, what the first forward, outside of training, can be equal with; any other that is set makes it
another."""


@dataclass(frozen=True)
class Layout:
    """Where the parts of a dense FFN go, and what the output projections are multiplied with."""

    routed: int
    """R, parts that routed experts hold."""
    first_routed: int
    """The first of them."""
    routed_scale: float
    shared_scale: float
    inexact: str | None
    """Why the first forward is not the dense model's, ``None`` where it is."""


def derive(dense: ModelSpec, *, experts: int, top_k: int = 2, granularity: int = 1, shared: int = 0) -> ModelSpec:
    """A sparse model that ``dense`` can be upcycled to without a difference, but for one expert a token.

    Args:
        dense: the dense model.
        experts: copies of every routed part.
        top_k: of them for a token.
        granularity: G, parts of the dense FFN.
        shared: of them in shared experts. All G of them: routed experts hold all parts as well.

    Raises:
        ValueError: the dense FFN does not divide, it has experts already, or a number is out of its range.
    """
    config = dense.model
    for name, value, least in (("experts", experts, 1), ("top_k", top_k, 1), ("granularity", granularity, 1)):
        if value < least:
            raise ValueError(f"{name} = {value}: give {least} or more")
    if not 0 <= shared <= granularity:
        raise ValueError(f"shared = {shared}: give from 0 to granularity = {granularity} parts")
    if config.moe is not None:
        raise ValueError(f"{dense.name}: it has experts already; give a dense model")
    if config.intermediate_size % granularity:
        raise ValueError(
            f"granularity = {granularity}: it must divide the dense model's intermediate_size = "
            f"{config.intermediate_size}"
        )
    routed, width = granularity - shared or granularity, config.intermediate_size // granularity
    moe = MoEConfig(
        num_experts=routed * experts,
        top_k=routed * top_k,
        moe_intermediate_size=width,
        score_func="softmax",
        norm_topk_prob=routed * top_k > 1,
        num_shared_experts=shared,
    )
    # No layer reads the dense width any more; layouts such as Mixtral's have one field for it and the experts'.
    sparse = replace(config, moe=moe, intermediate_size=width)
    name = f"{dense.name}-e{experts}k{top_k}g{granularity}s{shared}"
    return ModelSpec(name=name, family=expressible(sparse), model=sparse)


def layout(dense: ModelConfig, sparse: ModelConfig) -> Layout:
    """How the FFNs of ``dense`` become the experts of ``sparse``.

    Raises:
        ValueError: they do not fit, naming the field and both values.
    """
    moe = sparse.moe
    if moe is None:
        raise ValueError("the config to upcycle to has no moe block; give a sparse one")
    if dense.moe is not None:
        raise ValueError("the model to upcycle has experts already; give a dense one")
    _check_fields(dense, sparse)
    if moe.swiglu_limit is not None:
        raise ValueError(
            f"moe.swiglu_limit = {moe.swiglu_limit}: such experts compute another FFN than a dense model's"
        )
    if "relu" in (sparse.ffn, sparse.expert_ffn):
        raise ValueError("ffn = relu: only gated FFNs become experts; give a model whose FFNs and experts have a gate")
    if moe.dense_ffn:
        raise ValueError("moe.dense_ffn = True: the dense model has one FFN a layer, not two; set it to false")
    width = moe.moe_intermediate_size
    parts, over = divmod(dense.intermediate_size, width)
    if over:
        raise ValueError(
            f"moe.moe_intermediate_size = {width}: it must divide the dense model's intermediate_size = "
            f"{dense.intermediate_size}"
        )
    if moe.num_shared_experts > parts:
        raise ValueError(
            f"moe.num_shared_experts = {moe.num_shared_experts}: the dense FFN has only {parts} parts of "
            f"moe_intermediate_size = {width}"
        )
    twice = moe.num_shared_experts == parts
    routed = parts if twice else parts - moe.num_shared_experts
    if moe.num_experts % routed:
        raise ValueError(f"moe.num_experts = {moe.num_experts}: give a multiple of the {routed} parts that they hold")
    share = 0.5 if twice else 1.0
    return Layout(
        routed=routed,
        first_routed=0 if twice else moe.num_shared_experts,
        routed_scale=share * routed / _sum_of_weights(moe),
        # A gate of zeros halves the shared experts' output, and learns.
        shared_scale=share * (2 if moe.shared_expert_gate else 1),
        inexact=_why_inexact(moe, routed),
    )


def _check_fields(dense: ModelConfig, sparse: ModelConfig) -> None:
    theirs, ours = (dict(_leaves(replace(config, moe=None))) for config in (dense, sparse))
    for key in ours | theirs:
        if key not in FREE_FIELDS and ours.get(key) != theirs.get(key):
            raise ValueError(
                f"{key} = {ours.get(key)}: the dense model has {theirs.get(key)}; give a config that differs in its "
                "moe block alone, or --experts to derive one"
            )
    blocks = range(sparse.num_layers + sparse.mtp_depth)
    if not all(map(sparse.is_moe_layer, blocks)) and sparse.intermediate_size != dense.intermediate_size:
        raise ValueError(
            f"intermediate_size = {sparse.intermediate_size}: some layers keep their dense FFN, which has "
            f"{dense.intermediate_size}"
        )


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _sum_of_weights(moe: MoEConfig) -> float:
    """Σ of a token's weights: always, where they are normalised, or of a router whose logits are all 0."""
    score = 1 / moe.num_experts if moe.score_func == "softmax" else 0.5
    return moe.routed_scaling_factor * (1.0 if _normalised(moe) else moe.top_k * score)


def _normalised(moe: MoEConfig) -> bool:
    return moe.norm_topk_prob or _choice(moe) == "hash"


def _choice(moe: MoEConfig) -> str:
    return "token" if moe.routing is None else moe.routing.choice


def _why_inexact(moe: MoEConfig, routed: int) -> str | None:
    plain = MoEConfig(**{name: getattr(moe, name) for name in EXACT_FIELDS})
    for field in dataclasses.fields(moe):
        value = getattr(moe, field.name)
        if value != getattr(plain, field.name):
            return f"moe.{field.name} = {value}"
    if moe.routing is not None and moe.routing.eval_capacity_factor is not None:
        return f"moe.routing.eval_capacity_factor = {moe.routing.eval_capacity_factor}: full experts leave tokens out"
    if _choice(moe) == "expert":
        return "moe.routing.choice = expert: a token may have none"
    if not _normalised(moe) and not (moe.score_func == "softmax" and moe.top_k == moe.num_experts):
        return "moe.norm_topk_prob = False: the weights of a token's experts do not add up to the same for all tokens"
    if moe.top_k % routed:
        return f"moe.top_k = {moe.top_k} is no multiple of the {routed} parts that routed experts hold"
    # Groups that are parts of a virtual group are chosen together with the others, their scores being equal.
    size = moe.num_experts // moe.num_groups
    if size % routed and routed % size:
        return f"moe.num_groups = {moe.num_groups} cuts through copies of the {routed} parts that routed experts hold"
    return None
