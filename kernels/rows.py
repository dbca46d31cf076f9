"""What the kernels that work row by row share: views as rows, tile sizes, checks of dtypes.

A tile is ``[ROWS, BLOCK]`` with BLOCK at least as wide as a row, so that a row is read once and kept in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .launch import cdiv, next_power_of_2, num_sms

if TYPE_CHECKING:
    from collections.abc import Sequence

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute with: loaded in these, summed in fp32."""

MAX_FEATURES = 32_768
"""Widest row that fits the registers of one block: 32 fp32 values for each of 1024 threads."""

TILE = 2_048
"""Elements that a program takes at least, as several short rows if need be: 16 a thread at 4 warps."""

PROGRAMS_PER_SM = 4
"""Of kernels that add up over all rows: enough to hide loads, few enough that the partial sums stay small."""


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return ``x[..., D]`` as ``[T, D]`` with the last dim contiguous: a view, or a copy where no view can."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def check_floats(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuse dtypes that the kernel of ``op`` would silently narrow."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise ValueError(
                f'{op}: {name} is {tensor.dtype}, the kernel takes {allowed}: cast it, or pass impl="reference"'
            )


def check_features(op: str, num_features: int) -> None:
    """Refuse rows that no tile holds."""
    if not 1 <= num_features <= MAX_FEATURES:
        raise ValueError(
            f"{op}: rows of {num_features} features, the kernel takes 1 to {MAX_FEATURES}: "
            f'reshape, or pass impl="reference"'
        )


def row_config(num_features: int) -> dict[str, int]:
    """Return the default tile for rows of ``num_features``: at least TILE elements, 16 or more a thread."""
    block = next_power_of_2(num_features)
    rows = max(1, TILE // block)
    return {"ROWS": min(rows, 32), "num_warps": min(max(rows * block // 512, 4), 32)}


def num_programs(num_rows: int, rows: int, device: torch.device) -> int:
    """Return how many programs share the rows where each keeps a partial sum."""
    return max(1, min(cdiv(num_rows, rows), PROGRAMS_PER_SM * num_sms(device)))


def contiguous_like(x: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
    """Return an uninitialised contiguous tensor of ``x``'s dtype and device."""
    return torch.empty(x.shape if shape is None else tuple(shape), dtype=x.dtype, device=x.device)
