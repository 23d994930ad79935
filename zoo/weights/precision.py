"""Which floating dtypes a device multiplies natively."""

from __future__ import annotations

import torch


def native_bf16(device: torch.device) -> bool:
    """Whether ``device`` has instructions for products of bf16, so that they take less time than those of fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def floating_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype called ``name``, or for "auto" bf16 where ``device`` multiplies it natively, and else fp32.

    Raises:
        ValueError: not the name of a floating dtype.
    """
    if name == "auto":
        return torch.bfloat16 if native_bf16(device) else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype = {name!r}: give a floating torch dtype, such as float32 or bfloat16, or auto")
    return dtype
