"""Muon for the matrices inside the blocks, beside AdamW for all else, as one optimizer.

Shapes: M rows and N columns of a matrix; ... experts and whatever else matrices are stacked by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.model import Decoder
from zoo.moe.experts import StackedExperts

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (https://kellerjordan.github.io/posts/muon), as in ``torch.optim.Muon``."""
ITERATIONS = 5
EPS = 1e-7


def hidden_matrices(model: Decoder) -> list[nn.Parameter]:
    """Trainable weights of the linear layers and the experts of all blocks.

    Not embeddings, output head, norms, routers and their like: those are no maps from hidden states to hidden states,
    or have a single output.
    """
    found: list[Tensor] = []
    for block in (*model.layers, *model.mtp):
        for module in block.modules():
            if isinstance(module, nn.Linear) and min(module.weight.shape) > 1:
                found.append(module.weight)
            elif isinstance(module, StackedExperts):
                named = module.named_parameters(recurse=False)
                found += [parameter for name, parameter in named if not name.endswith("bias")]
    return [parameter for parameter in found if isinstance(parameter, nn.Parameter) and parameter.requires_grad]


class MuonAdamW(torch.optim.AdamW):
    """AdamW, except for groups with ``momentum``: those are matrices, or stacks of them, that Muon updates.

    Muon's update is the Nesterov momentum of the gradient, made nearly orthogonal, of each expert by itself, times
    0.2 · √max(M, N): the root mean square of AdamW's updates, so that both share learning rate and weight decay
    (arXiv 2502.16982, equation 4). For single matrices this is
    ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``.

    Args:
        matrices: Each [..., M, N].
        others: Groups of AdamW.
        momentum: Muon's.
        weight_decay: Of the matrices.
        adamw: Arguments of AdamW; ``lr`` is of both.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: list[dict[str, Any]],
        *,
        momentum: float,
        weight_decay: float,
        **adamw: Any,
    ) -> None:
        muon = {"params": list(matrices), "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([muon, *others], **adamw)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if "momentum" not in group]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            # AdamW wants a step in every state that it loads.
            state["step"], state["momentum_buffer"] = torch.zeros(()), torch.zeros_like(gradient)
        state["step"] += 1
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonal(gradient.lerp(average, group["momentum"]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-0.2 * math.sqrt(max(parameter.shape[-2:])) * group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """[..., M, N] → the same with singular values near 1, each matrix by itself, bf16 (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    rows, columns = matrices.shape[-2:]
    x = matrices.reshape(-1, rows, columns).bfloat16()
    x = x.mT if rows > columns else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if rows > columns else x).reshape(matrices.shape)
