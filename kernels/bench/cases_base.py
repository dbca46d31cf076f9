"""What the device itself attains: the ceilings that the other rows are read against."""

from __future__ import annotations

import torch

from .case import Case, call


def cases() -> list[Case]:
    """Return one case for the memory and one for the matrix units."""
    num_bytes, side = 1 << 30, 8192
    return [
        Case(
            name="copy",
            shape="1 GiB",
            make=lambda device, small: (_normal((1 << 10,) if small else (num_bytes // 4,), torch.float32, device),),
            variants={"torch": call(torch.clone)},
            unit="TB/s",
            work=2 * num_bytes,
        ),
        Case(
            name="matmul",
            shape=f"{side} x {side} x {side}, bf16",
            make=lambda device, small: tuple(
                _normal((64, 64) if small else (side, side), torch.bfloat16, device, seed) for seed in (0, 1)
            ),
            variants={"torch": call(torch.matmul)},
            unit="TFLOP/s",
            work=2 * side**3,
        ),
    ]


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)
