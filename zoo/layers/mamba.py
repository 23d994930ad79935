"""Mamba (arXiv 2312.00752): a selective state-space model in place of attention, with normalised dt, B and C.

The norms are Jamba's (arXiv 2403.19887, section 2). What the paper calls B and C is ``b`` and ``c`` here.

Shapes: B batch, S sequence, D model, I inner channels, N numbers of state a channel, W convolution width, L tokens of
a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.cache import LayerCache, StateCache
from zoo.config import ModelConfig
from zoo.layers.linear import Linear
from zoo.layers.norm import RMSNorm
from zoo.layers.sequence import RecurrentOrder, SequenceLayout, tail

CHUNK = 32
"""Tokens whose states are in memory together, and computed in log₂ of so many steps."""

DT_RANGE = (1e-3, 1e-1)
"""Of the time steps that a new model begins with (arXiv 2312.00752, section 3.6)."""


class Mamba(nn.Module):
    """out(scan(silu(conv(u))) · silu(gate)) with u, gate = in(x) (arXiv 2312.00752, section 3.4 and algorithm 2).

    The cache holds the last W - 1 inputs of the convolution and the state: as much after a million tokens as after one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        mamba = config.mamba
        assert mamba is not None
        inner = mamba.expand * config.hidden_size
        self.sizes = (mamba.dt_rank, mamba.state_size, mamba.state_size)
        self.in_proj = Linear(config.hidden_size, 2 * inner, bias=False)
        self.conv1d = CausalConv(inner, mamba.conv_width)
        self.x_proj = Linear(inner, sum(self.sizes), bias=False)
        self.dt_norm, self.b_norm, self.c_norm = (RMSNorm(size, config.norm_eps) for size in self.sizes)
        self.dt_proj = Linear(mamba.dt_rank, inner, bias=False)
        self.state_space = StateSpace(inner, mamba.state_size)
        self.out_proj = Linear(inner, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        layout: SequenceLayout,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        last: int | None = None,
    ) -> Tensor:
        """x [B, S, D] → [B, S or last, D]; ``cache`` goes on to the last token. Positions are not looked at."""
        order = layout.recurrent_order
        if order is not None:
            x = _in_order(x, order.index)
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        history, state = (None, None) if cache is None else cache.buffers
        u, history = self.conv1d(u, order, history)
        dt, b, c = self.x_proj(u).split(self.sizes, dim=-1)
        y, state = self.state_space(u, self.dt_proj(self.dt_norm(dt)), self.b_norm(b), self.c_norm(c), order, state)
        if cache is not None:
            cache.buffers = (history, state)
        out: Tensor = self.out_proj(y * F.silu(gate))
        return tail(out if order is None else _in_order(out, order.inverse), last)

    def new_cache(self, batch_size: int, max_length: int) -> LayerCache:
        """Nothing seen yet: inputs [B, W - 1, I] and state [B, I, N], which is fp32 at least."""
        weight, (inner, states) = self.in_proj.weight, self.state_space.A_log.shape
        history = weight.new_zeros(batch_size, self.conv1d.width - 1, inner)
        exact = torch.promote_types(weight.dtype, torch.float32)
        return StateCache([history, weight.new_zeros(batch_size, inner, states, dtype=exact)])


class CausalConv(nn.Module):
    """silu(bias + Σ_j weight_j · u_{t-j}): each channel by itself, over the last W tokens of its document."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, u: Tensor, order: RecurrentOrder | None, history: Tensor | None) -> tuple[Tensor, Tensor]:
        """u [B, S, I], the W - 1 inputs before it [B, W - 1, I] or None → ([B, S, I], the last W - 1 inputs)."""
        tokens, before = u.shape[1], self.width - 1
        if history is None:
            history = u.new_zeros(len(u), before, u.shape[2])
        inputs = torch.cat((history, u), dim=1)
        exact = torch.promote_types(u.dtype, torch.float32)
        out = self.bias.to(exact)
        for lag in range(self.width):
            past = inputs[:, before - lag : before - lag + tokens] * self.weight[:, 0, before - lag].to(exact)
            out = out + (past if order is None or lag == 0 else past * (order.age >= lag).unsqueeze(-1))
        if order is None:
            return F.silu(out).to(u.dtype), inputs[:, tokens:]
        last = order.valid.sum(1, keepdim=True) + torch.arange(before, device=u.device)
        return F.silu(out).to(u.dtype), _in_order(inputs, last)


class StateSpace(nn.Module):
    """h_t = exp(dt_t A) h_{t-1} + dt_t b_t u_t, y_t = c_t · h_t + D u_t with dt = softplus(dt + bias), A = -exp(A_log).

    Equations 2 and 4 of arXiv 2312.00752, B discretised as in its code (Euler). All in fp32, also under autocast: the
    state is a product of as many factors as there are tokens.
    """

    def __init__(self, channels: int, state_size: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(channels, state_size))
        self.D = nn.Parameter(torch.empty(channels))
        self.dt_bias = nn.Parameter(torch.empty(channels))

    def forward(
        self, u: Tensor, dt: Tensor, b: Tensor, c: Tensor, order: RecurrentOrder | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """u and dt [B, S, I], b and c [B, S, N], state [B, I, N] or None for 0 → (y [B, S, I], the last state)."""
        with torch.autocast(u.device.type, enabled=False):
            exact = torch.promote_types(u.dtype, torch.float32)
            v, dt, b, c = (tensor.to(exact) for tensor in (u, dt, b, c))
            dt = F.softplus(dt + self.dt_bias.to(exact))
            kept = torch.ones_like(dt[..., 0])
            if order is not None:  # a document begins with nothing; over padding, which comes last, the state waits
                dt, kept = dt * order.valid.unsqueeze(-1), (order.age > 0).to(exact)
            a = -self.A_log.to(exact).exp()
            if state is None:
                state = v.new_zeros(len(v), *a.shape)
            y, state = selective_scan(v, dt, a, b, c, kept, state)
            return (y + v * self.D.to(exact)).to(u.dtype), state


def selective_scan_loop(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, kept: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The readable reference, and the tests' oracle: one token after the other.

    Args:
        u, dt: [B, S, I]. a: [I, N], negative. b, c: [B, S, N]. kept: [B, S], 0 where a token forgets all before it,
            1 elsewhere. state: [B, I, N].

    Returns:
        (y [B, S, I], the last state [B, I, N]).
    """
    out = []
    for t in range(u.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * a) * kept[:, t, None, None]
        state = decay * state + (dt[:, t] * u[:, t])[..., None] * b[:, t, None, :]
        out.append((state * c[:, t, None, :]).sum(-1))
    return torch.stack(out, dim=1), state


def selective_scan(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, kept: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Arguments and results as ``selective_scan_loop``; all tokens of a chunk together, one chunk after the other.

    For the backward pass only the state between chunks is kept: states of all tokens would take N times the
    activations of the layer.
    """
    way: Callable[..., tuple[Tensor, Tensor]] = _rescanned_chunk if torch.is_grad_enabled() else _scan_chunk
    out = []
    for start in range(0, u.shape[1], CHUNK):
        y, state = way(*(tensor[:, start : start + CHUNK] for tensor in (u, dt, b, c, kept)), a, state)
        out.append(y)
    return torch.cat(out, dim=1), state


def _scan_chunk(
    u: Tensor, dt: Tensor, b: Tensor, c: Tensor, kept: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    decay = torch.exp(dt.unsqueeze(-1) * a) * kept[..., None, None]
    states: Tensor = _Recurrence.apply(decay, (dt * u).unsqueeze(-1) * b.unsqueeze(2), state)
    # A copy of the last state: a view of it in a cache would hold all others.
    return (states @ c.unsqueeze(-1)).squeeze(-1), states[:, -1].clone()


def _rescanned_chunk(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """``_scan_chunk``, computed again in the backward pass."""
    result: tuple[Tensor, Tensor] = checkpoint(_scan_chunk, *arguments, use_reentrant=False)
    return result


class _Recurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t for a and b [B, L, I, N] and h_0 [B, I, N]; its backward pass is one from the end."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        h = _scan(a, b, state)
        ctx.save_for_backward(a, h, state)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, state = ctx.saved_tensors
        last = torch.zeros_like(state)
        later = torch.cat((a[:, 1:], last.unsqueeze(1)), dim=1)
        g = _scan(later.flip(1), grads[0].flip(1), last).flip(1)
        return g * torch.cat((state.unsqueeze(1), h[:, :-1]), dim=1), g, a[:, 0] * g[:, 0]


def _scan(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """All h_t by doubling (arXiv 2312.00752, section 3.3.2): two recurrences after each other are one.

    Products of a only: nothing is divided by, so that nothing overflows however fast a state decays.
    """
    a, h, reach = a.clone(), b.clone(), 1
    h[:, 0] += a[:, 0] * state
    while reach < h.shape[1]:
        h[:, reach:] += a[:, reach:] * h[:, :-reach]
        a[:, reach:] = a[:, reach:] * a[:, :-reach]
        reach *= 2
    return h


def initial_parameter(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
    """The first values (fp32) of those parameters of a ``Mamba`` that begin in another way than the model's others.

    A = -1, -2, … -N in every channel; dt log-uniform in ``DT_RANGE``; the convolution as torch's own. Else None.
    """
    if name.endswith("A_log"):
        return torch.arange(1, shape[1] + 1).float().log().expand(shape)
    if name.endswith("dt_bias"):
        low, high = map(math.log, DT_RANGE)
        dt = torch.exp(low + (high - low) * torch.rand(shape, generator=generator))
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    if name.endswith("conv1d.weight"):
        return (2 * torch.rand(shape, generator=generator) - 1) * shape[-1] ** -0.5
    return None


def _in_order(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, I] at index [B, n] of dimension 1 → [B, n, I]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
