"""Norms, steps that all ranks skip, half precision, and what is communicated when."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from layouts import (
    LAYOUTS,
    MODELS,
    Layout,
    Run,
    batch,
    make_parallel,
    meshes_of,
    micro_loss,
    train_alone,
    train_parallel,
    whole,
)
from pool import Pools
from torch._C._distributed_c10d import _get_work_registry_size
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from zoo.model import build
from zoo.moe.balance import communication_balance_loss, device_balance_loss, load_balance_loss, sent_tokens
from zoo.moe.stats import expert_counts
from zoo.parallel.apply import ParallelOptions
from zoo.parallel.grads import all_finite, global_norm, set_last_micro_batch, sum_over_data
from zoo.parallel.mesh import Meshes
from zoo.parallel.torch_private import gathered


def backward(model: torch.nn.Module, meshes: Meshes, micro: int = 0) -> torch.Tensor:
    ids, labels = batch(model.config.vocab_size, 0, meshes.data.get_local_rank(), micro)
    loss, _ = micro_loss(model, ids, labels)
    loss.backward()
    return loss


def norms(layout: Layout) -> tuple[float, float]:
    model, meshes = make_parallel("deepseek-v3", layout)
    backward(model, meshes)
    gradients = [p.grad.full_tensor().flatten() for p in model.parameters()]
    return global_norm(model.parameters()).item(), torch.cat(gradients).norm().item()


@pytest.mark.parametrize("layout", ["tp2_ep2", "fsdp2_ep2", "hybrid2_ep2"])
def test_the_norm_counts_every_parameter_once(pools: Pools, layout: str) -> None:
    results = pools[4].run(norms, LAYOUTS[layout])
    assert len(set(results)) == 1
    ours, whole_norm = results[0]
    assert ours == pytest.approx(whole_norm, rel=1e-12)


def poisoned(layout: Layout, rank: int) -> tuple[bool, bool]:
    """One rank's part of a parameter that tensor ranks hold copies of gets a NaN."""
    model, meshes = make_parallel("mixtral", layout)
    backward(model, meshes)
    before = bool(all_finite(global_norm(model.parameters())))
    if torch.distributed.get_rank() == rank:
        model.layers[0].ffn.router.weight.grad.to_local().fill_(float("nan"))
    return before, bool(all_finite(global_norm(model.parameters())))


@pytest.mark.parametrize("rank", [0, 3])
def test_all_ranks_agree_that_a_gradient_is_not_finite(pools: Pools, rank: int) -> None:
    assert pools[4].run(poisoned, LAYOUTS["tp2_ep2"], rank) == [(True, False)] * 4


def reductions(layout: Layout) -> list[int]:
    """Gradient reductions in the backward pass of each of three micro-batches."""
    model, meshes = make_parallel("mixtral", layout)
    counts = []
    for micro in range(3):
        set_last_micro_batch(model, micro == 2)
        with CommDebugMode() as comm:
            backward(model, meshes, micro)
        counts.append(sum(n for op, n in comm.get_comm_counts().items() if "reduce" in str(op)))
    return counts


def test_only_the_last_micro_batch_reduces_gradients(pools: Pools) -> None:
    for first, second, last in pools[4].run(reductions, LAYOUTS["fsdp2_ep2"]):
        assert (first, second) == (0, 0)
        assert last == 2 * 2 + 1  # experts and the rest of each block, and the root


def counts_of(layout: Layout) -> int:
    meshes = meshes_of(layout)
    return int(sum_over_data(torch.tensor(10 ** meshes.data.get_local_rank()), meshes))


def test_sums_go_over_data_ranks_only(pools: Pools) -> None:
    assert pools[4].run(counts_of, LAYOUTS["tp2_ep2"]) == [11] * 4
    assert pools[4].run(counts_of, LAYOUTS["fsdp2_ep2"]) == [1111] * 4
    assert pools[2].run(counts_of, LAYOUTS["tp2"]) == [1] * 2


def balance_gradients(layout: Layout | None) -> dict[str, np.ndarray]:
    """Of the balance losses over the global batch: on a rank of a layout, or of all rows on one process."""
    if layout is None:
        model, ranks, total = build(MODELS["mixtral"], seed=3, dtype=torch.float64), range(4), lambda x: x
    else:
        model, meshes = make_parallel("mixtral", layout)
        ranks, total = [meshes.data.get_local_rank()], lambda x: sum_over_data(x, meshes)
    ids = torch.cat([batch(model.config.vocab_size, 0, rank, 0)[0] for rank in ranks])
    outputs = model(ids).router_outputs
    counts = total(torch.stack([expert_counts(o) for o in outputs]))
    tokens = torch.tensor(ids.numel())
    sent = total(torch.stack([sent_tokens(o, 4) for o in outputs])) / total(tokens)
    loss = load_balance_loss(outputs, counts=list(counts)) + device_balance_loss(outputs, 4, counts=list(counts))
    loss = loss + communication_balance_loss(outputs, 4, 2, sent=list(sent))
    (loss * tokens / total(tokens)).backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", [Layout("fsdp", 4), Layout("ep_fsdp", 4, expert=4)], ids=["fsdp4", "ep4"])
def test_row_03_balance_losses_over_the_global_batch_do_not_depend_on_its_split_over_ranks(
    pools: Pools, layout: Layout
) -> None:
    expected = balance_gradients(None)
    assert np.abs(expected["layers.1.ffn.router.weight"]).max() > 1e-4
    for result in pools[4].run(balance_gradients, layout):
        for name, gradient in expected.items():
            np.testing.assert_allclose(result[name], gradient, rtol=1e-10, atol=1e-12, err_msg=name)


def dtypes(layout: Layout) -> tuple[set[torch.dtype], torch.dtype, torch.dtype]:
    """(dtypes of gradients, of a projection's input, of the router weight in the forward pass)"""
    model, meshes = make_parallel("deepseek-v3", layout, torch.float32, ParallelOptions(param_dtype=torch.bfloat16))
    seen = {}
    block = model.layers[1]
    block.mixer.o_proj.register_forward_pre_hook(lambda m, args: seen.update(projection=args[0].dtype))
    block.ffn.router.register_forward_pre_hook(lambda m, args: seen.update(router=m.weight.dtype))
    backward(model, meshes)
    assert all(isinstance(p.grad, DTensor) for p in model.parameters())
    return {p.grad.dtype for p in model.parameters()}, seen["projection"], seen["router"]


@pytest.mark.parametrize("layout", ["fsdp2_ep2", "tp2_ep2"])
def test_half_precision_computes_in_bf16_and_reduces_in_fp32(pools: Pools, layout: str) -> None:
    expected = ({torch.float32}, torch.bfloat16, torch.float32)
    assert pools[4].run(dtypes, LAYOUTS[layout]) == [expected] * 4


def half_precision_sums(layout: Layout, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], ...]:
    """Gradients by name: of all ranks' losses, then of each rank's loss while those of the others count nothing.

    Parameters are kept in ``dtype`` and computed with in bf16, so that each rank's own gradients are bf16 numbers.
    """

    def gradients(ranks: set[int]) -> dict[str, torch.Tensor]:
        model, meshes = make_parallel("deepseek-v3", layout, dtype, ParallelOptions(param_dtype=torch.bfloat16))
        rank = meshes.data.get_local_rank()
        loss, _ = micro_loss(model, *batch(model.config.vocab_size, 0, rank, 0))
        (loss * float(rank in ranks)).backward()
        return {name: gathered(p.grad) for name, p in model.named_parameters()}

    world = set(range(layout.data))
    return gradients(world), *(gradients({rank}) for rank in world)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (Layout("fsdp", 2), torch.float32),
        (Layout("ep", 2, expert=2), torch.float32),
        (Layout("fsdp", 4), torch.bfloat16),
        (Layout("ep", 4, expert=4), torch.bfloat16),
    ],
    ids=lambda value: value.plan if isinstance(value, Layout) else str(value).removeprefix("torch."),
)
def test_half_precision_gradients_are_summed_in_fp32(pools: Pools, layout: Layout, dtype: torch.dtype) -> None:
    """bf16 parameters need four ranks: the sum of two is the same whether it is rounded by the sum or after it."""
    whole_sum, *of_ranks = pools[layout.world].run(half_precision_sums, layout, dtype)[0]
    differs = 0
    for name, total in whole_sum.items():
        if ".router." in name or (layout.expert > 1 and ".experts." in name):
            continue  # computed in fp32, and on the rows of all ranks at once
        parts = [part[name].bfloat16() for part in of_ranks]
        assert all(torch.equal(part, one[name].to(part)) for part, one in zip(parts, of_ranks, strict=True))
        torch.testing.assert_close(total, sum(part.float() for part in parts).to(dtype), rtol=0, atol=0, msg=name)
        differs += int((total != sum(parts[1:], parts[0]).to(dtype)).sum())
    assert differs > 100, "a sum in bf16 would have been the same"


@pytest.mark.parametrize("layout", ["fsdp2", "ep2"])
@pytest.mark.parametrize("model", ["mixtral", "deepseek-v3"])
def test_half_precision_trains_as_on_one_process(pools: Pools, model: str, layout: str) -> None:
    """Everything in bf16, as with ``bf16-true``: losses of five steps within the spacing of its numbers, 2^-7.

    At the rate of ``configs/train``: with ten times that, AdamW's steps are as large as weights, and rounding decides
    where a run in bf16 goes.
    """
    run = Run(model, accumulate=2, lr=1e-3, dtype=torch.bfloat16)
    expected = train_alone(run, LAYOUTS[layout].data)["loss"]
    for result in pools[2].run(train_parallel, run, LAYOUTS[layout], ParallelOptions(param_dtype=torch.bfloat16)):
        np.testing.assert_allclose(result["loss"], expected, rtol=2**-7)


@pytest.mark.parametrize("layout", ["fsdp2_ep2", "tp2_ep2"])
def test_half_precision_trains_close_to_single(pools: Pools, layout: str) -> None:
    run = Run("mixtral", steps=3, dtype=torch.float32)
    (result, *_) = pools[4].run(train_parallel, run, LAYOUTS[layout], ParallelOptions(param_dtype=torch.bfloat16))
    np.testing.assert_allclose(result["loss"], train_alone(run, LAYOUTS[layout].data)["loss"], rtol=0.02)


def unwaited(layout: Layout) -> int:
    model, meshes = make_parallel("deepseek-v3", layout, options=ParallelOptions(recompute="block"))
    for micro in range(2):
        backward(model, meshes, micro)
    return _get_work_registry_size()


def test_recomputation_leaves_no_collective_behind(pools: Pools) -> None:
    assert pools[4].run(unwaited, LAYOUTS["tp2_ep2"]) == [0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2_ep2", "tp2"])
def test_compiled_blocks_train_as_eager_ones(pools: Pools, layout: str) -> None:
    run = dataclasses.replace(Run("mixtral", steps=2))
    expected = train_alone(run, LAYOUTS[layout].data)
    for result in pools[LAYOUTS[layout].world].run(
        train_parallel, run, LAYOUTS[layout], ParallelOptions(compile_backend="aot_eager")
    ):
        for name, values in expected.items():
            np.testing.assert_allclose(result[name], values, rtol=1e-8, atol=1e-8, err_msg=name)
