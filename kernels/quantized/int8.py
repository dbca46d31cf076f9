"""Products of int8: one scale for each token, taken when it comes, and one for each output channel (W8A8).

Shapes:  M = tokens (all leading dims together), N = outputs, K = features.
Math:    scale[r] = max|row r| / 127, q = round(row / scale), half to even: 8 bits for activations and weights alike.
         acc = q_x q_w.T in int32, exact while K * 127**2 < 2**31;  y = (acc * scale_x[m]) * scale_w[n], rounded once.
Cost:    2 M N K integer operations on the int8 units, twice the rate of bf16. The activations are read twice, once for
         their maximum. Inference only: no gradient passes the rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch import Impl, cdiv, check_device, is_interpreting, next_power_of_2
from ..tuning import config_for
from ._int8 import _int8_kernel, _quantize_kernel
from .inputs import check_floats, check_linear, divisor

MAX_FEATURES = (2**31 - 1) // 127**2
"""Features whose products surely fit int32."""
MANY_TOKENS = 4096
"""From here on one configuration serves."""


class Int8Rows(NamedTuple):
    """A matrix in int8 with a scale for each row: activations by token, weights by output channel."""

    values: torch.Tensor
    """``[R, K]`` int8, -127 to 127."""
    scale: torch.Tensor
    """``[R]`` fp32."""


def int8_quantize_reference(x_RK: torch.Tensor) -> Int8Rows:
    """Define the rounding: plain torch, any device and float dtype."""
    wide = x_RK.detach().to(torch.float32)
    scale_R = divisor(wide.abs().amax(-1) / 127, torch.float32)
    return Int8Rows((wide / scale_R[:, None]).round().clamp(-127, 127).to(torch.int8), scale_R)


def int8_quantize(x_RK: torch.Tensor, *, impl: Impl = "triton") -> Int8Rows:
    """Round each row to int8 by its own maximum; both implementations give the same bits.

    Args:
        x_RK: ``[R, K]`` fp32, fp16 or bf16; rows may lie apart.
        impl: "reference" or "triton".

    Raises:
        ValueError: Another shape, dtype or device.
    """
    check_device("int8_quantize", impl, x_RK, choices=("reference", "triton"))
    if x_RK.ndim != 2 or not x_RK.shape[1] or not x_RK.is_floating_point():
        raise ValueError(f"int8_quantize: expected a float matrix [R, K], K > 0, got {x_RK.dtype} {list(x_RK.shape)}")
    if impl == "reference":
        return int8_quantize_reference(x_RK)
    check_floats("int8_quantize", x=x_RK)
    values, scale_R = quantize_op(x_RK, None)
    return Int8Rows(values, scale_R)


def int8_dequantize(rows: Int8Rows, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return ``values * scale``, computed in fp32 and rounded once."""
    return (rows.values.to(torch.float32) * rows.scale[:, None]).to(dtype)


def int8_matmul(x: torch.Tensor, w: torch.Tensor, *, impl: Impl = "triton") -> torch.Tensor:
    """Return the exact int32 product ``x[M, K] @ w[N, K].T`` of int8 matrices; "torch" is ``torch._int_mm``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.
    """
    check_device("int8_matmul", impl, x, w)
    _check_pair("int8_matmul", x, w)
    if impl == "reference":
        return int8_matmul_reference(x, w)
    if impl == "torch":
        return _int8_matmul_torch(x, w)
    return matmul_op(x, w, None, None, torch.int32)


def int8_matmul_reference(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Define the product: integers below 2**53 are exact in fp64, which every device multiplies."""
    return (x.to(torch.float64) @ w.to(torch.float64).T).to(torch.int32)


def int8_linear(x: torch.Tensor, weight: Int8Rows, *, impl: Impl = "triton") -> torch.Tensor:
    """Round activations to int8 by token and multiply them by an int8 weight.

    Args:
        x: ``[..., K]`` fp32, fp16 or bf16; rows may lie apart.
        weight: What :func:`int8_quantize` made of ``[N, K]``.
        impl: Who computes it; "torch" multiplies with ``torch._int_mm``.

    Returns:
        ``[..., N]`` in x's dtype; no gradient.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    check_device("int8_linear", impl, x, *weight)
    check_weight("int8_linear", weight)
    check_linear("int8_linear", x, *weight.values.shape)
    x_MK = x.detach().reshape(-1, x.shape[-1])
    if impl == "triton":
        check_floats("int8_linear", x=x)
        values, scale_M = quantize_op(x_MK, None)
        y = matmul_op(values, weight.values, scale_M, weight.scale, x.dtype)
    else:
        rows = int8_quantize_reference(x_MK)
        multiply = int8_matmul_reference if impl == "reference" else _int8_matmul_torch
        y = scaled(multiply(rows.values, weight.values), rows.scale, weight.scale, x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def scaled(product: torch.Tensor, scale_M: torch.Tensor, scale_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the int32 product times both scales, in the kernels' order."""
    return (product.to(torch.float32) * scale_M[:, None] * scale_N).to(dtype)


def check_weight(op: str, weight: Int8Rows) -> None:
    """Refuse what :func:`int8_quantize` would not have made."""
    values, scale_R = weight
    fits = values.ndim == 2 and scale_R.shape == values.shape[:1]
    if not fits or (values.dtype, scale_R.dtype) != (torch.int8, torch.float32):
        raise ValueError(
            f"{op}: expected values int8 [N, K] and scale fp32 [N], got {values.dtype} {list(values.shape)} and "
            f"{scale_R.dtype} {list(scale_R.shape)}: make them with int8_quantize"
        )
    _check_pair(op, values, values)


def _check_pair(op: str, x: torch.Tensor, w: torch.Tensor) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or (x.dtype, w.dtype) != (torch.int8, torch.int8):
        raise ValueError(
            f"{op}: expected int8 [M, K] and int8 [N, K], got {x.dtype} {list(x.shape)} and {w.dtype} {list(w.shape)}"
        )
    if not 1 <= x.shape[1] <= MAX_FEATURES:
        raise ValueError(f"{op}: {x.shape[1]} features, int32 sums take 1 to {MAX_FEATURES}: split K and add")


def _int8_matmul_torch(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``torch._int_mm``; on a GPU it wants more than 16 rows."""
    missing = max(17 - x.shape[0], 0)
    padded = torch.nn.functional.pad(x, (0, 0, 0, missing))
    product = torch._int_mm(padded, w.T)  # noqa: SLF001  # pyright: ignore[reportPrivateImportUsage]
    return product[: x.shape[0]]


def matmul_config(num_tokens: int, *, has_outliers: bool = False) -> dict[str, int]:
    """Default tile: 128 x 256 at many tokens, whose sums take half of the registers of eight warps.

    Outliers have sums of their own, in fp32: half the tile.
    """
    tokens = min(max(next_power_of_2(num_tokens), 16), 128)
    if tokens == 128:
        return {
            "TOKENS": 128,
            "ROWS": 128 if has_outliers else 256,
            "BLOCK": 128,
            "GROUP": 8,
            "num_warps": 8,
            "num_stages": 3,
        }
    return {"TOKENS": tokens, "ROWS": 64, "BLOCK": 128, "GROUP": 8, "num_warps": 4, "num_stages": 4}


@torch.library.custom_op("danaus::int8_quantize", mutates_args=())
def quantize_op(x: torch.Tensor, outlier_K: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and scale of each row; columns where ``outlier_K`` is not 0 count as 0."""
    num_rows, features = x.shape
    values, scale_R = _quantize_fake(x, outlier_K)
    if num_rows:
        x = x if x.stride(1) == 1 or features == 1 else x.contiguous()
        block = min(next_power_of_2(features), 4096)
        _quantize_kernel[(num_rows,)](
            x,
            outlier_K,
            values,
            scale_R,
            x.stride(0),
            features,
            HAS_OUTLIERS=outlier_K is not None,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
        )
    return values, scale_R


@quantize_op.register_fake
def _quantize_fake(x: torch.Tensor, outlier_K: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    del outlier_K
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return values, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


@torch.library.custom_op("danaus::int8_matmul", mutates_args=())
def matmul_op(
    x: torch.Tensor,
    w: torch.Tensor,
    scale_M: torch.Tensor | None,
    scale_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the product in ``dtype``, times both scales where they are given."""
    return launch_matmul(x, w, scale_M, scale_N, _matmul_fake(x, w, scale_M, scale_N, dtype))


@matmul_op.register_fake
def _matmul_fake(
    x: torch.Tensor,
    w: torch.Tensor,
    scale_M: torch.Tensor | None,
    scale_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    del scale_M, scale_N
    return torch.empty((x.shape[0], w.shape[0]), dtype=dtype, device=x.device)


def launch_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    scale_M: torch.Tensor | None,
    scale_N: torch.Tensor | None,
    y: torch.Tensor,
    outliers: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Launch the kernel; ``outliers`` are x before rounding, its outlier columns (first) and their number."""
    (num_tokens, features), num_outputs = x.shape, w.shape[0]
    if not y.numel():
        return y
    x, w = x.contiguous(), w.contiguous()
    wide, columns, count = outliers or (None, None, None)
    key = f"M{min(next_power_of_2(num_tokens), MANY_TOKENS)}"
    default = matmul_config(num_tokens, has_outliers=wide is not None)
    config = config_for("int8_matmul" if wide is None else "llm_int8", key, default)
    tiles = cdiv(num_tokens, config["TOKENS"]) * cdiv(num_outputs, config["ROWS"])
    _int8_kernel[(tiles,)](
        x,
        w,
        scale_M,
        None if scale_N is None else scale_N.contiguous(),
        wide,
        columns,
        count,
        y,
        0 if wide is None else wide.stride(0),
        num_tokens,
        num_outputs,
        features,
        IS_SCALED=scale_M is not None,
        HAS_OUTLIERS=wide is not None,
        WIDE=is_interpreting(),
        **config,
    )
    return y
