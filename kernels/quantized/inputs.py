"""What the wrappers of this folder check alike, and the scale that any number can be divided by."""

from __future__ import annotations

import torch

from ..launch import LAUNCH_MAX

floats = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of activations, weights before they are quantized, and scales."""


def divisor(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return positive scales in ``dtype``: its smallest normal number where they are 0 or would round to it."""
    return scale.clamp(min=torch.finfo(dtype).smallest_normal).to(dtype)


def check_floats(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuse dtypes that the kernel of ``op`` would silently narrow."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in floats:
            raise ValueError(
                f"{op}: {name} is {tensor.dtype}, the kernel takes float32, bfloat16, float16: cast it, "
                f'or pass impl="reference"'
            )


def check_linear(op: str, x: torch.Tensor, outputs: int, features: int) -> None:
    """Refuse activations whose last dim is not the weight's, and sizes beyond 32-bit indices of one row."""
    if x.ndim < 1 or x.shape[-1] != features:
        raise ValueError(
            f"{op}: expected x [..., {features}] for a weight [{outputs}, {features}], got {list(x.shape)}"
        )
    if max(outputs, features, x.shape[:-1].numel()) > LAUNCH_MAX // 2:
        raise ValueError(f"{op}: x {list(x.shape)} with {outputs} outputs: a dim has at most {LAUNCH_MAX // 2}: split")
