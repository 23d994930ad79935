"""Bytes of tensors that are alive: what a step needs on any device, but for the buffers inside its kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRAPPERS = (DTensor, AsyncCollectiveTensor)
"""Subclasses around a tensor: what they do to it is seen when it is done."""


class LiveBytes(TorchDispatchMode):
    """The most bytes of storages that were alive after any operation; several tensors may share one.

    A collective counts its input and output; copies inside gloo, that NCCL does not make, are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor that was made before."""
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        self._storages[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, WRAPPERS) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if type(leaf) in (Tensor, nn.Parameter) and leaf.device.type != "meta":  # nor fake ones
                self.watch(leaf)
        # FSDP frees storages by giving them size 0: their sizes are looked up again each time.
        alive = {address: storage for address, reference in self._storages.items() if (storage := reference())}
        self._storages = {address: self._storages[address] for address in alive}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values()))
        return result


@contextmanager
def fused_norms() -> Iterator[None]:
    """RMSNorm keeps its input and one number a row, as on a GPU; the CPU's keeps its normalised input as well."""
    original = F.rms_norm
    F.rms_norm = lambda x, shape, weight, eps: _FusedNorm.apply(x, weight, eps)
    try:
        yield
    finally:
        F.rms_norm = original


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normalised, gradient = x * inverse, grads[0] * weight
        of_weight = (grads[0] * normalised).flatten(0, -2).sum(0).to(weight.dtype)
        along = (gradient * normalised).mean(-1, keepdim=True)
        return gradient.sub_(normalised.mul_(along)).mul_(inverse).to(x.dtype), of_weight, None
