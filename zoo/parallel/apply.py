"""Spreading a decoder over ranks: expert, then tensor, then data parallelism, each from outside.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from zoo.config import ModelConfig
from zoo.layers.mla import MLA
from zoo.model import Decoder
from zoo.moe.layer import MoE
from zoo.parallel.collectives import SumGradient, Traffic
from zoo.parallel.exchange import choose_exchange
from zoo.parallel.expert_parallel import ExchangeDispatcher, forward_local_experts, forward_overlapped
from zoo.parallel.mesh import Meshes, MeshSizes
from zoo.parallel.plan import Plan, ResolvedPlan, resolve
from zoo.parallel.torch_private import waited


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Memory, speed and rounding; all but ``capacity_factor`` leave the result as it is.

    Attributes:
        recompute: Whose activations are computed again in the backward pass instead of kept.
        param_dtype: Dtype that parameters are gathered and computed in; gradients are reduced in fp32. By default
            theirs.
        compile_backend: ``torch.compile`` every block with this backend (``inductor``); by default none.
        capacity_factor: Bound on what an expert takes, over its balanced load; more tokens are dropped, and all shapes
            are known beforehand. By default nothing is dropped.
        overlap_shared_experts: Compute shared experts while tokens travel.
        reshard_after_forward: Free gathered parameters after the forward pass and gather them again for the backward.
        ranks_per_node: Neighbouring ranks that share fast links; where the expert ranks fill several such nodes, a
            token crosses the network once to a node, not once to a rank. By default all ranks share them.
    """

    recompute: Literal["none", "experts", "block"] = "none"
    param_dtype: torch.dtype | None = None
    compile_backend: str | None = None
    capacity_factor: float | None = None
    overlap_shared_experts: bool = True
    reshard_after_forward: bool = True
    ranks_per_node: int | None = None


def parallelize(
    model: Decoder, meshes: Meshes, plan: Plan | ResolvedPlan, options: ParallelOptions = ParallelOptions()
) -> Decoder:
    """Spread ``model`` over the ranks, in place. Every rank calls it.

    The forward pass, parameter names and global shapes stay what they were. Gradients are summed over ranks and never
    divided: run the backward pass on each rank's loss over the global number of tokens (``grads.sum_over_data``), or on
    its sum, and scale gradients afterwards.

    Args:
        model: On the meta device (then ``to_empty``, and ``init.initialize`` or ``weights.load_weights``), or with the
            same weights on every rank.
        meshes: Of this world.
        plan: Where everything goes; resolved and its sizes checked where ``model`` is a part of what it is for.
        options: Memory, speed and precision.

    Returns:
        ``model``; every parameter is a DTensor, and every module of a unit an ``FSDPModule``. One rank has nothing to
        spread: its parameters stay plain tensors, unless ``options.param_dtype`` has them cast.

    Raises:
        ValueError: the plan or the sizes do not fit the model.
    """
    if isinstance(plan, Plan):
        rules = resolve(plan, model)
        check_sizes(model.config, meshes.sizes, rules)
    else:
        rules = plan
    _apply_expert(model, meshes, rules, options)
    _apply_tensor(model, meshes.tensor, rules)
    recompute_activations(model, options.recompute)
    if options.compile_backend is not None:
        _apply_compile(model, options.compile_backend)
    if meshes.sizes.stage > 1 or options.param_dtype is not None:
        _apply_data(model, meshes, rules, options)
    return model


def check_sizes(config: ModelConfig, sizes: MeshSizes, rules: ResolvedPlan) -> None:
    """Raise ``ValueError`` where a size of the mesh does not divide what it splits."""
    moe = config.moe
    wanted: list[tuple[str, int, str, int]] = []
    if sizes.expert > 1 and not rules.experts:
        raise ValueError(f"expert = {sizes.expert} ranks: the model has no experts to spread; use expert = 1")
    if moe is not None and rules.experts:
        wanted.append(("expert", sizes.expert, "num_experts", moe.num_experts))
        wanted.append(("expert_shard", sizes.expert_shard, "moe_intermediate_size", moe.moe_intermediate_size))
    if rules.tensor:
        if config.attention and config.attention.qk_norm == "projection" and sizes.tensor > 1:
            raise ValueError(
                f"tensor = {sizes.tensor} ranks: attention.qk_norm = projection is over all heads; use tensor = 1"
            )
        if config.attention and config.attention.sinks and sizes.tensor > 1:
            raise ValueError(
                f"tensor = {sizes.tensor} ranks: attention.sinks of all heads are one tensor; use tensor = 1"
            )
        if config.attention and config.attention.relative_positions and sizes.tensor > 1:
            raise ValueError(
                f"tensor = {sizes.tensor} ranks: attention.relative_positions have one table for all heads; use "
                "tensor = 1"
            )
        if config.attention:
            wanted.append(("tensor", sizes.tensor, "num_kv_heads", config.attention.num_kv_heads))
        if config.mla:
            wanted.append(("tensor", sizes.tensor, "num_heads", config.mla.num_heads))
        dense = not all(config.is_moe_layer(layer) for layer in range(config.num_layers))
        if dense or (moe is not None and moe.dense_ffn):
            wanted.append(("tensor", sizes.tensor, "intermediate_size", config.intermediate_size))
        if moe is not None and moe.num_shared_experts:
            shared = moe.num_shared_experts * moe.moe_intermediate_size
            wanted.append(("tensor", sizes.tensor, "width of the shared experts", shared))
    if sizes.tensor > 1 and (config.dropout or (moe is not None and moe.routing is not None and moe.routing.random)):
        raise ValueError(
            f"tensor = {sizes.tensor} ranks: they would draw different random numbers for dropout or moe.routing; use "
            "tensor = 1"
        )
    for name, ranks, field, value in wanted:
        if value % ranks:
            raise ValueError(f"{name} = {ranks} ranks: {field} = {value} is not divisible by it; give a divisor")


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Call ``forward`` in place of the forward of this one module; its hooks and names stay."""
    vars(module)["forward"] = forward


def recompute_activations(model: Decoder, recompute: Literal["none", "experts", "block"]) -> None:
    """Keep no activations of the experts, or of whole blocks, for the backward pass, but compute them again (in place).

    Gradients stay what they are: routing is computed from the same numbers, and random ones are drawn again.
    """
    if recompute == "block":
        for module in [*model.layers, *model.mtp]:
            replace_forward(module, partial(checkpoint, module.forward, use_reentrant=False))
    elif recompute == "experts":
        for _, moe in moe_layers(model):
            replace_forward(moe.experts, partial(moe.experts.forward_again, moe.experts.forward))


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """(name, layer) of every MoE layer, in order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoE))


def traffic(model: nn.Module) -> list[Traffic]:
    """The all-to-all traffic of every MoE layer that has a dispatcher between ranks."""
    return [m.dispatcher.traffic for _, m in moe_layers(model) if isinstance(m.dispatcher, ExchangeDispatcher)]


# ---------------------------------------------------------------------------------------------------------------
# The four steps
# ---------------------------------------------------------------------------------------------------------------


def _apply_expert(model: Decoder, meshes: Meshes, rules: ResolvedPlan, options: ParallelOptions) -> None:
    """Experts become DTensors over the expert ranks; tokens travel.

    With tensor ranks this is needed even where every rank has all experts: the ranks of a group share the tokens.
    """
    apart = meshes.sizes.expert > 1 or meshes.sizes.tensor > 1
    routing = model.config.moe.routing if model.config.moe else None
    if options.capacity_factor is not None and routing is not None:
        raise ValueError(
            f"capacity_factor = {options.capacity_factor}: the model's moe.routing says what an expert takes; remove it"
        )
    if options.capacity_factor is not None and not (rules.experts and apart):
        raise ValueError(
            f"capacity_factor = {options.capacity_factor}: nothing is exchanged in this layout; spread the experts, or "
            "remove it"
        )
    if not rules.experts or not apart:
        return
    mesh = meshes.expert
    make_dispatcher = choose_exchange(
        mesh,
        meshes.tensor.get_group() if meshes.sizes.tensor > 1 else None,
        ranks_per_node=meshes.sizes.world if options.ranks_per_node is None else options.ranks_per_node,
        capacity_factor=options.capacity_factor,
        dtype=options.param_dtype or next(model.parameters()).dtype,
        hidden_size=model.config.hidden_size,
    )
    for name, moe in moe_layers(model):
        for parameter_name, parameter in list(moe.experts.named_parameters()):
            dim = rules.experts[f"{name}.experts.{parameter_name}"].expert
            local = parameter.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].clone()
            sharded = DTensor.from_local(local, mesh, [Shard(dim)], run_check=False)
            setattr(moe.experts, parameter_name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        moe.dispatcher = make_dispatcher()
        replace_forward(moe.experts, partial(forward_local_experts, moe.experts))
        if options.overlap_shared_experts and moe.shared_experts is not None:
            replace_forward(moe, partial(forward_overlapped, moe))


def _apply_tensor(model: Decoder, mesh: DeviceMesh, rules: ResolvedPlan) -> None:
    if mesh.size() == 1:
        return
    styles: dict[str, ParallelStyle] = {}
    rowwise: list[nn.Module] = []
    for name, style in rules.tensor.items():
        module = model.get_submodule(name)
        if style == "shared_key":
            mixer = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(mixer, MLA)
            module.register_forward_hook(partial(_sum_key_gradient, mesh, mixer.rope))
        elif style == "colwise":
            styles[name] = ColwiseParallel()
        elif style == "rowwise":
            styles[name] = RowwiseParallel()
            rowwise.append(module)
        elif any(True for _ in module.parameters()):
            # Heads take the place of the sequence: [B, S, H, d], sharded along H.
            styles[name] = SequenceParallel(sequence_dim=2, use_local_output=True)
    parallelize_module(model, mesh, styles)
    for module in rowwise:
        module.register_forward_hook(lambda module, args, out: waited(out))


def _sum_key_gradient(mesh: DeviceMesh, size: int, module: nn.Module, args: Any, out: Tensor) -> Tensor:
    """The last ``size`` features are a key that all heads use: its gradient is spread over the tensor ranks."""
    latent, key = out.split((out.shape[-1] - size, size), dim=-1)
    summed: Tensor = SumGradient.apply(key, mesh.get_group())
    return torch.cat((latent, summed), dim=-1)


def _apply_compile(model: Decoder, backend: str) -> None:
    for _, moe in moe_layers(model):
        if isinstance(moe.dispatcher, ExchangeDispatcher):
            # The host decides how much is sent where: that is not traced, and the rest of the block is.
            replace_forward(moe, torch.compiler.disable(moe.forward))
    for block in (*model.layers, *model.mtp):
        block.compile(backend=backend)


def _apply_data(model: Decoder, meshes: Meshes, rules: ResolvedPlan, options: ParallelOptions) -> None:
    """FSDP bottom-up: experts in the sparse view, blocks and the rest in the dense view."""
    half = MixedPrecisionPolicy(param_dtype=options.param_dtype, reduce_dtype=torch.float32)
    policy = MixedPrecisionPolicy() if options.param_dtype is None else half
    reshard = options.reshard_after_forward
    if options.param_dtype is not None:
        full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for name in rules.full_precision:
            fully_shard(
                model.get_submodule(name), mesh=meshes.dense_data, mp_policy=full, reshard_after_forward=reshard
            )
    if rules.experts:
        for name, moe in moe_layers(model):
            dims = {
                parameter: Shard(rules.experts[f"{name}.experts.{key}"].shard)
                for key, parameter in moe.experts.named_parameters()
            }
            fully_shard(
                moe.experts,
                mesh=meshes.sparse_data,
                shard_placement_fn=dims.get,
                mp_policy=policy,
                reshard_after_forward=reshard,
            )
    for name in rules.units:
        fully_shard(model.get_submodule(name), mesh=meshes.dense_data, mp_policy=policy, reshard_after_forward=reshard)
    # The output head is used after the forward pass as well (``Decoder.nll``).
    fully_shard(model, mesh=meshes.dense_data, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Any other factor is divided twice where a mesh dimension has one rank, and fails on gloo.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
