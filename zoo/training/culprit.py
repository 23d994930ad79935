"""Which module made a loss or a gradient that is not finite. Nothing here runs in a step that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from zoo.moe.router import RouterOutput

AllFinite = Callable[[Tensor], Tensor]
"""Values → which of them are finite, on every rank alike."""


def describe(
    name: str, model: nn.Module, forwards: Iterable[Callable[[], Any]], all_finite: AllFinite = torch.isfinite
) -> str:
    """Where the value ``name``, which is not finite, comes from.

    Args:
        name: ``loss``, or another for the norm of the gradients that ``model`` has.
        model: Whose.
        forwards: The forward pass of each micro-batch, to be run again.
        all_finite: On several ranks, that of all.
    """
    if name != "loss":
        parameter = of_backward(model, all_finite)
        return (
            f"first in the gradient of {parameter}" if parameter else "though every gradient is: their squares are not"
        )
    for forward in forwards:
        module = of_forward(model, forward, all_finite)
        if module:
            return f"first in the output of {module}"
    return "though the output of every module is"


@torch.no_grad()
def of_forward(model: nn.Module, forward: Callable[[], Any], all_finite: AllFinite = torch.isfinite) -> str | None:
    """Name of the module in ``model`` whose output is the first that is not finite while ``forward()`` runs it again.

    An inner module comes before the one that it is in. ``None`` if all outputs are finite. Random generators are left
    as they were.
    """
    names: list[str] = []
    sums: list[Tensor] = []

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        names.append(name)
        # Zero times what is finite is zero, and NaN otherwise.
        sums.append(sum((0 * tensor.detach().float()).sum() for tensor in _floats(output)) + torch.zeros(()))

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules() if name]
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # No backward pass follows that would do so.
                module.reshard()
    return _first(names, sums, all_finite)


@torch.no_grad()
def of_backward(model: nn.Module, all_finite: AllFinite = torch.isfinite) -> str | None:
    """Name of the parameter in ``model`` that the backward pass reached first of those with a gradient not finite.

    It goes from the last module to the first, and what one hands down that is not finite makes all before it so.
    """
    names, sums = [], []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            names.append(name)
            sums.append((0 * gradient.float()).sum())
    return _first(names[::-1], sums[::-1], all_finite)


def _first(names: list[str], values: list[Tensor], all_finite: AllFinite) -> str | None:
    if not names:
        return None
    device = max((value.device for value in values), key=lambda device: device.type != "cpu")
    finite: Iterable[bool] = all_finite(torch.stack([value.to(device) for value in values])).tolist()
    return next((name for name, good in zip(names, finite, strict=True) if not good), None)


def _floats(output: Any) -> Iterator[Tensor]:
    """Tensors of floats in what a module returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, RouterOutput):
        # Logits may be masked with -inf.
        yield from (output.scores, output.weights)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _floats(part)
