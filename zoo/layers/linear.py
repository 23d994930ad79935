"""Products with a matrix of weights, on the CPU in the way that is the fastest on it.

torch leaves fp32 to MKL, which takes no AVX-512 on AMD's CPUs. On a Zen 5 that is half the speed of oneDNN, which
torch has as well, for bf16 and for compiled graphs. It takes fp32 where it is allowed to round to bf16, and rounds with
AMX only: on CPUs without, products are those of fp32, which is tried out before any is left to it. There and with MKL
on Intel's CPUs some numbers of rows are quicker as columns. ``scripts/products_table.py`` times all of it.

Shapes: I inputs, O outputs, n rows.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Library = Literal["mkl", "onednn"]
"""``mkl`` stands for whatever torch takes by itself."""

VARIABLE = "MOE_ZOO_PRODUCTS"
"""Environment variable with the name of a library, for a whole command."""

Way = Literal["rows", "columns", "onednn"]
"""x · Wᵀ or (W · xᵀ)ᵀ by torch's own library; x · Wᵀ by oneDNN."""

LARGE, SOME_ROWS = 900_000, range(8, 24)
"""MKL on Intel's CPUs reads a matrix of at least ``LARGE`` numbers for each thread at up to one and a half times
the speed for so many columns; for fewer, or smaller matrices, rows are faster."""

FEW_ROWS, FEW_NUMBERS, SHORT = range(2, 5), 1 << 15, 1024
"""On AMD's, so many columns are the fastest for a matrix of at least so many numbers with up to ``SHORT`` inputs."""

ONE_ROW = range(1 << 16, 1 << 18)
"""There one row is faster as two equal columns, for a matrix of so many numbers; oneDNN is for larger ones."""

MULTIPLICATIONS = 1 << 19
"""And for so many of more rows; its calls take 10 µs more than MKL's."""

ROUND = 16
"""Products of oneDNN have a multiple of so many rows, if they have more."""

SPARE = 1 / 8
"""Share of rows that may be added to make products together."""

_PLAIN = (Tensor, nn.Parameter)
_asked_for: list[Library] = []
"""By ``products_by``, the innermost last."""


class Linear(nn.Linear):
    """``nn.Linear`` by the fastest product."""

    def reset_parameters(self) -> None:
        """As ``nn.Linear``; a weight without memory is left alone, which is most of the time to make one."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] → [..., O]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, with its gradients of every order.

    Args:
        x: [..., I]. weight: [O, I]. bias: [O].

    Returns:
        [..., O].
    """
    # Sizes first: to ask for all else takes as long as the product of a token in a small model.
    if torch.compiler.is_compiling() or (way := _onednn_way(x.numel() // weight.shape[1], weight)) == "rows":
        return F.linear(x, weight, bias)
    if not onednn_takes(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        out: Tensor = _Linear.apply(x, weight, bias, way)
        return out
    return _linear(x, weight, bias, way)


def product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x · weightᵀ [n, O], of any strides, without gradients.

    Args:
        x: [n, I]. weight: [O, I]. Both of any strides.
        out: [n, O], of any strides, where the result is written to if it is given.
    """
    return product_by(_way(x, weight), x, weight, out)


def add_product(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """out [n, O] += ``product``."""
    way = _way(x, weight)
    if way == "rows":
        out.addmm_(x, weight.t())
    elif way == "onednn" and len(x) > 1:
        with onednn_products:
            out.addmm_(x, weight.t())
    else:
        out += product_by(way, x, weight)


def products(x: Tensor, weights: Tensor, out: Tensor) -> None:
    """``product`` of each x [k, n, I] with its weight [k, O, I], written to ``out`` [k, n, O]."""
    if len(x) > 1 and _way(x[0], weights[0]) == "onednn":
        # Every thread makes whole ones, where all threads share a single one.
        with onednn_products:
            torch.bmm(x, weights.mT, out=out)
        return
    for one, weight, of_out in zip(x, weights, out, strict=True):
        product(one, weight, of_out)


def products_of_rows(rows: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """Each row [1, I] · right [I, O].

    By MKL without another call between them: weights fill the caches, so that any costs as if it were the first.
    """
    if uses_onednn():
        return [product(row, weight.t()) for row, weight in zip(rows, right, strict=True)]
    if rows[0].dtype is not torch.float32:  # oneDNN takes these of mm, for which a vector is the slower
        return [torch.mv(weight.t(), row[0]).unsqueeze(0) for row, weight in zip(rows, right, strict=True)]
    return [torch.mm(row, weight) for row, weight in zip(rows, right, strict=True)]


def sum_of_products(rows: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Of ``products_of_rows`` [1, O], each added to the sum as it is made."""
    if uses_onednn():
        out = product(rows[0], right[0].t())
        for row, weight in zip(rows[1:], right[1:], strict=True):
            add_product(out, row, weight.t())
        return out
    out = torch.mm(rows[0], right[0])
    for row, weight in zip(rows[1:], right[1:], strict=True):
        out.addmm_(row, weight)
    return out


def products_apart(left: Sequence[Tensor], right: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """left [n, I] · right [I, O] of each, one after the other, written to its ``out`` [n, O].

    Whether matrices are large is asked of the first of ``right``.
    """
    if right[0].numel() >= LARGE * torch.get_num_threads():
        for one, other, of_out in zip(left, right, out, strict=True):
            product(one, other.t(), of_out)
    else:  # torch's own way, whatever the rows: to decide for each takes some hundredths of a small one
        for one, other, of_out in zip(left, right, out, strict=True):
            torch.mm(one, other, out=of_out)


def rows_of_products(counts: Sequence[int], weight: Tensor, limit: int) -> list[int]:
    """Of how many rows products of ``counts`` with matrices of the size of ``weight`` [O, I] are best made, in turn.

    At least as many; see ``ROUND``. Neighbours get as many as each other where they are made together, ``products``,
    which is faster by more than ``SPARE`` takes; so many have at most ``limit`` rows.
    """
    if not uses_onednn() or weight.dtype is not torch.float32 or not weight.is_cpu:
        return list(counts)
    rounded = [_rounded(count, weight) for count in counts]
    wanted: list[int] = []
    run: list[int] = []
    for rows in rounded:
        longer = [*run, rows]
        small = min(longer) <= ROUND or _onednn_way(min(longer), weight) != "onednn"
        if small or max(longer) * len(longer) > min(limit, (1 + SPARE) * sum(longer)):
            wanted += [max(run, default=0)] * len(run)
            longer = [rows]
        run = longer
    return wanted + [max(run, default=0)] * len(run)


def _rounded(count: int, weight: Tensor) -> int:
    """Rows, see ``ROUND``."""
    return count + -count % ROUND if count > ROUND and _onednn_way(count, weight) == "onednn" else count


def product_by(way: Way, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``product`` in this way."""
    if len(x) > 1 and way == "onednn":
        with onednn_products:
            return torch.mm(x, weight.t(), out=out)
    if way == "rows":
        return torch.mm(x, weight.t(), out=out)
    made = _columns(x, weight).t() if way == "columns" else _one_row(x, weight, None)
    return made if out is None else out.copy_(made)


def _columns(x: Tensor, weight: Tensor) -> Tensor:
    """weight · xᵀ [O, n]."""
    return torch.mm(weight, x.t()) if len(x) > 1 else torch.mm(weight, torch.cat((x, x)).t())[:, :1]


def _way(x: Tensor, weight: Tensor) -> Way:
    """How ``product`` is computed."""
    if uses_onednn():
        way = _onednn_way(len(x), weight)
        return way if way == "rows" or onednn_takes(x, weight) else "rows"
    many = len(x) in SOME_ROWS and weight.numel() >= LARGE * torch.get_num_threads()
    return "columns" if many else "rows"


def _onednn_way(rows: int, weight: Tensor) -> Way:
    """The fastest for so many rows where oneDNN is faster than MKL."""
    outputs, inputs = weight.shape
    numbers = outputs * inputs
    if rows == 1:
        return "rows" if numbers < ONE_ROW.start else "columns" if numbers < ONE_ROW.stop else "onednn"
    if rows in FEW_ROWS and numbers >= FEW_NUMBERS and inputs <= SHORT:
        return "columns"
    return "onednn" if rows * numbers >= MULTIPLICATIONS else "rows"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, way: Way) -> Tensor:
    """``linear`` without gradients."""
    if way == "onednn":
        return _onednn(x, weight, bias)
    out = _columns(x.flatten(0, -2), weight).t().contiguous().unflatten(0, x.shape[:-1])
    return out if bias is None else out.add_(bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, way: Way) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _linear(x, weight, bias, way)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        rows = gradient.flatten(0, -2)
        return (
            None if weight is None else linear(gradient, weight.t()),
            None if x is None else linear(rows.t(), x.flatten(0, -2).t()),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
            None,
        )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear`` by oneDNN, without gradients; x [..., I] and weight [O, I] of any strides."""
    rows = x.flatten(0, -2)
    count, inputs = rows.shape
    if count == 1:
        return _one_row(rows, weight, bias).view(*x.shape[:-1], -1)
    # New code is made for every shape, which takes as long as many a product: numbers of tokens are rounded up. They
    # are rows of x, or what is summed over, as in the gradient of a weight, where x is transposed.
    if rows.stride(1) == 1:
        if count > ROUND and count % ROUND:
            rows = _with_zeros(rows, -count % ROUND)
    elif inputs % ROUND:
        rows, weight = (_with_zeros(matrix.t(), -inputs % ROUND).t() for matrix in (rows, weight))
    with onednn_products:
        out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    return out[:count].unflatten(0, x.shape[:-1])


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [1, I] · weightᵀ + bias [1, O] by what inductor calls for a linear layer, the faster one of oneDNN for this."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        # For others oneDNN has but a loop over single numbers. Along the rows in memory, a copy is the fastest.
        weight = weight.t().contiguous().t() if weight.stride(0) == 1 else weight.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out


_matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


class _OneDNNProducts:
    """Within the block torch takes products of fp32 from oneDNN: those of all threads, for that is how it is set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._before = "none"

    def __enter__(self) -> None:
        with self._lock:
            if not self._blocks:
                self._before = _matmul.fp32_precision
                _matmul.fp32_precision = "bf16"
            self._blocks += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                _matmul.fp32_precision = self._before


onednn_products = _OneDNNProducts()
"""For blocks of what ``onednn_takes``."""


def _with_zeros(matrix: Tensor, count: int) -> Tensor:
    """``matrix`` with so many rows of zeros after its own."""
    rows = len(matrix)
    out = matrix.new_empty(rows + count, matrix.shape[1])
    out[:rows] = matrix
    out[rows:].zero_()
    return out


def uses_onednn() -> bool:
    """Whether products are oneDNN's, but for small ones."""
    return (_asked_for[-1] if _asked_for else _library()) == "onednn"


def onednn_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether it is in use and these are fp32 on the CPU, as plain tensors."""
    return (
        type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.is_cpu
        and x.dim() > 1
        and uses_onednn()
    )


@contextmanager
def products_by(library: Library) -> Iterator[None]:
    """Take products from this library within the block, also where it is not the faster."""
    _asked_for.append(library)
    try:
        yield
    finally:
        _asked_for.pop()


@cache
def libraries() -> tuple[Library, ...]:
    """Those that there are here."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return ("mkl", "onednn") if there and _onednn_keeps_fp32() else ("mkl",)


def _onednn_keeps_fp32() -> bool:
    """Whether products by oneDNN are of fp32, and not rounded to bf16, here.

    Each of these numbers has more bits than bf16, and none of their multiples by powers of two has more than fp32.
    """
    fp32: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults
    x, powers = 1 + torch.arange(1, 129, **fp32) * 2**-20, 2 ** torch.arange(-64, 64, **fp32)
    rows, scale = x.expand(64, 128).contiguous(), torch.diag(powers)
    with torch.autocast("cpu", enabled=False), onednn_products:
        made = [out for n in (2, 16, 64) for out in (rows[:n] @ scale, (scale @ rows[:n].t()).t())]
        made += [torch.addmm(torch.zeros(128, **fp32), rows, scale)]
        made += rows.view(4, 16, 128) @ scale.expand(4, 128, 128)
    return all(torch.equal(one, (x * powers).expand_as(one)) for one in made)


@cache
def _library() -> Library:
    """What ``VARIABLE`` asks for, by default the one that was measured the faster on this CPU.

    Raises:
        ValueError: it asks for none, or for one that is not there.
    """
    asked = os.environ.get(VARIABLE)
    if not asked:
        return "onednn" if _zen5() and "onednn" in libraries() else "mkl"
    for library in libraries():
        if library == asked:
            return library
    raise ValueError(f"{VARIABLE}={asked!r}: no such library here; give {' or '.join(libraries())}, or unset it")


def _zen5() -> bool:
    """Whether this is a CPU of AMD's family 26, the one that was measured, with AVX-512."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    fields = dict(line.replace("\t", "").split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return (
        fields.get("vendor_id", "").strip() == "AuthenticAMD"
        and fields.get("cpu family", "").strip() == "26"
        and "avx512f" in fields.get("flags", "").split()
    )
