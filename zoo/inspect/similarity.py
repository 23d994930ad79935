"""How alike the experts of a layer are, and what the shared experts add.

Shapes: B batch, S sequence, T tokens, D model, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.moe.layer import MoE

_ROWS = 4096
"""Rows of experts' outputs held at a time, as tokens times experts."""


@torch.no_grad()
def weight_cosines(moe: MoE) -> Tensor:
    """[E, E] fp64, cosines of the experts' weights, all of an expert's in one vector.

    Two experts that compute the same with their hidden units in another order are not alike here; copies of one dense
    FFN are. Independent weights have cosines near 0.
    """
    weights = moe.experts.weights
    gram = torch.zeros(len(weights[0]), len(weights[0]), dtype=torch.float64)
    for weight in weights:
        rows = weight.flatten(1).float()
        gram += (rows @ rows.T).double().cpu()
    norms = gram.diagonal().sqrt().clamp(min=1e-30)
    return gram / torch.outer(norms, norms)


@torch.no_grad()
def output_cosines(moe: MoE, x: Tensor) -> Tensor:
    """x [T, D], inputs of the layer → [E, E] fp64, cosines of what two experts make of the same token, mean over T."""
    experts = len(moe.experts.weights[0])
    total = torch.zeros(experts, experts, dtype=torch.float64)
    for part in x.split(max(1, _ROWS // experts)):
        counts = torch.full((experts,), len(part), device=x.device)
        rows = moe.experts(part.repeat(experts, 1), counts).view(experts, len(part), -1)
        unit = F.normalize(rows.double(), dim=-1)
        total += torch.einsum("itd,jtd->ij", unit, unit).cpu()
    return total / max(1, len(x))


@torch.no_grad()
def shared_share(moe: MoE, x: Tensor, out: Tensor) -> Tensor:
    """x and out [B, S, D], what the layer took and gave → [T] fp32, ‖shared‖ / (‖shared‖ + ‖routed‖)."""
    assert moe.shared_experts is not None
    shared = moe.shared_experts(x)
    if moe.shared_expert_gate is not None:
        shared = shared * moe.shared_expert_gate(x).sigmoid()
    norms = torch.stack([shared.float().norm(dim=-1), (out.float() - shared.float()).norm(dim=-1)])
    return (norms[0] / norms.sum(dim=0).clamp(min=1e-30)).flatten()
