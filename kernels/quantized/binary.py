"""Weights of one bit: binary weights (BWN), and binary activations as well (XNOR), after arXiv 1603.05279.

Shapes:  M = tokens (all leading dims together), N = outputs, K = features, B = bytes of a packed row.
Math:    sign(v) = -1 for v < 0, else 1; a bit is set for -1; alpha[n] = mean|w[n]|.
         BWN:   y = x (alpha * sign(w)).T, the weight rounded to x's dtype; differentiable in x.
         XNOR:  beta[m] = mean|x[m]|; sign(x) . sign(w) = K - 2 popcount(bits_x xor bits_w), an exact int32;
                y = (that * beta[m]) * alpha[n], rounded once. Inference only.
Cost:    one bit a weight: BWN is bound by arithmetic (a float product a weight), XNOR by memory at one token (an xor, a
         popcount and an add for 32 weights). Hopper has no matrix units for bits: XNOR pays for one or few tokens, as
         weights are read once for each; for many take BWN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch import Impl, cdiv, check_device, next_power_of_2
from ..tuning import config_for
from ._binary import _sign_kernel, _xnor_kernel
from .bits import pack_bits, packed_bytes, unpack_bits
from .inputs import check_floats, check_linear
from .weight_only import dequantize_op, matmul_op

_CHOICES = ("reference", "triton")


class BinaryRows(NamedTuple):
    """A matrix ``[R, K]`` of signs with a scale for each row: weights, or activations of XNOR."""

    packed: torch.Tensor
    """``[R, B]`` uint8, eight signs a byte (bits.py), 1 is minus; a row is padded with 0."""
    scale: torch.Tensor
    """``[R]`` fp32."""
    features: int
    """K."""


def binary_quantize(x_RK: torch.Tensor, *, impl: Impl = "triton") -> BinaryRows:
    """Reduce each row to its signs and the mean of its absolute values.

    The signs are the same bits with either implementation; the mean is a sum whose order differs.

    Raises:
        ValueError: Another shape, dtype or device.
    """
    check_device("binary_quantize", impl, x_RK, choices=_CHOICES)
    if x_RK.ndim != 2 or not x_RK.is_floating_point() or not x_RK.shape[1]:
        raise ValueError(f"binary_quantize: expected a float matrix [R, K], K > 0, got {x_RK.dtype} {list(x_RK.shape)}")
    if impl == "triton":
        check_floats("binary_quantize", x=x_RK)
        packed_RB, scale_R = sign_op(x_RK)
        return BinaryRows(packed_RB, scale_R, x_RK.shape[1])
    x_RK = x_RK.detach()
    return BinaryRows(pack_bits(x_RK < 0, 1), x_RK.abs().mean(-1, dtype=torch.float32), x_RK.shape[1])


def binary_signs(rows: BinaryRows) -> torch.Tensor:
    """Return the int8 matrix ``[R, K]`` of -1 and 1."""
    return 1 - 2 * unpack_bits(rows.packed, 1, rows.features).to(torch.int8)


def binary_dequantize(rows: BinaryRows, dtype: torch.dtype = torch.float32, *, impl: Impl = "triton") -> torch.Tensor:
    """Return the matrix ``[R, K]`` of -scale and scale; both implementations give the same bits.

    Raises:
        ValueError: ``impl`` is neither "reference" nor "triton", or the parts do not fit.
    """
    check_device("binary_dequantize", impl, rows.packed, rows.scale, choices=_CHOICES)
    _check_rows("binary_dequantize", rows)
    if impl == "triton":
        packed_RB, scale_R, features = rows
        return dequantize_op(
            packed_RB.contiguous(), scale_R.contiguous(), None, None, None, "binary", features, features, dtype
        )
    wide = torch.promote_types(dtype, torch.float32)
    return (binary_signs(rows).to(wide) * rows.scale.to(wide)[:, None]).to(dtype)


def binary_linear_reference(x: torch.Tensor, weight: BinaryRows) -> torch.Tensor:
    """Define BWN: the weight dequantized to x's dtype, then a dense product."""
    return x @ binary_dequantize(weight, x.dtype, impl="reference").T


def binary_linear(x: torch.Tensor, weight: BinaryRows, *, impl: Impl = "triton") -> torch.Tensor:
    """Multiply activations by a weight of one bit (BWN): same result as :func:`binary_linear_reference`.

    Args:
        x: ``[..., K]`` fp32, fp16 or bf16; rows may lie apart.
        weight: What :func:`binary_quantize` made.
        impl: Who computes it; torch has nothing of its own.

    Returns:
        ``[..., N]`` in x's dtype, differentiable in x.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    _check_linear("binary_linear", impl, x, weight)
    if impl == "reference":
        return binary_linear_reference(x, weight)
    packed_RB, scale_R, features = weight
    x_MK = x.reshape(-1, features)
    y = matmul_op(x_MK, packed_RB.contiguous(), scale_R.contiguous(), None, None, None, "binary", features)
    return y.view(*x.shape[:-1], y.shape[-1])


def xnor_matmul(x: BinaryRows, w: BinaryRows, *, impl: Impl = "triton") -> torch.Tensor:
    """Return the exact int32 product ``[M, N]`` of two matrices of signs.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.
    """
    check_device("xnor_matmul", impl, x.packed, w.packed, choices=_CHOICES)
    _check_rows("xnor_matmul", x)
    _check_rows("xnor_matmul", w)
    if x.features != w.features:
        raise ValueError(f"xnor_matmul: rows of {x.features} and of {w.features} signs: make them equal")
    if impl == "reference":
        return (binary_signs(x).to(torch.float64) @ binary_signs(w).to(torch.float64).T).to(torch.int32)
    return xnor_op(x.packed, w.packed, None, None, w.features, torch.int32)


def xnor_linear_reference(x_MK: torch.Tensor, weight: BinaryRows) -> torch.Tensor:
    """Define XNOR for activations ``[M, K]``."""
    rows = binary_quantize(x_MK, impl="reference")
    product = xnor_matmul(rows, weight, impl="reference").to(torch.float32)
    return (product * rows.scale[:, None] * weight.scale).to(x_MK.dtype)


def xnor_linear(x: torch.Tensor, weight: BinaryRows, *, impl: Impl = "triton") -> torch.Tensor:
    """Reduce activations to signs and a scale by token and multiply them by a weight of one bit (XNOR).

    Args:
        x: ``[..., K]`` fp32, fp16 or bf16; rows may lie apart.
        weight: What :func:`binary_quantize` made.
        impl: Who computes it; torch has nothing of its own.

    Returns:
        ``[..., N]`` in x's dtype; no gradient.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    _check_linear("xnor_linear", impl, x, weight)
    x_MK = x.detach().reshape(-1, weight.features)
    if impl == "reference":
        y = xnor_linear_reference(x_MK, weight)
    else:
        packed_MB, scale_M = sign_op(x_MK)
        y = xnor_op(packed_MB, weight.packed, scale_M, weight.scale, weight.features, x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def xnor_config() -> dict[str, int]:
    """Default: 256 bytes of each of 32 rows at a time."""
    return {"WORDS": 64, "ROWS": 32, "num_warps": 4, "num_stages": 3}


@torch.library.custom_op("danaus::sign_pack", mutates_args=())
def sign_op(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the packed signs and the mean of the absolute values of each row."""
    packed_RB, scale_R = _sign_fake(x)
    num_rows, features = x.shape
    if num_rows:
        x = x if x.stride(1) == 1 or features == 1 else x.contiguous()
        row_bytes = packed_RB.shape[1]
        _sign_kernel[(num_rows,)](
            x, packed_RB, scale_R, x.stride(0), features, row_bytes, BYTES=min(next_power_of_2(row_bytes), 512)
        )
    return packed_RB, scale_R


@sign_op.register_fake
def _sign_fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    packed_RB = torch.empty((x.shape[0], packed_bytes(x.shape[1], 1)), dtype=torch.uint8, device=x.device)
    return packed_RB, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


@torch.library.custom_op("danaus::xnor_matmul", mutates_args=())
def xnor_op(
    x: torch.Tensor,
    w: torch.Tensor,
    scale_M: torch.Tensor | None,
    scale_N: torch.Tensor | None,
    features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the product in ``dtype``, times both scales where they are given."""
    y = _xnor_fake(x, w, scale_M, scale_N, features, dtype)
    if not y.numel():
        return y
    config = config_for("xnor", f"N{w.shape[0]},K{features}", xnor_config())
    # Tokens lie on the first axis of the grid, which may be long.
    _xnor_kernel[(x.shape[0] * cdiv(w.shape[0], config["ROWS"]),)](
        _words(x),
        _words(w),
        scale_M,
        None if scale_N is None else scale_N.contiguous(),
        y,
        x.shape[0],
        w.shape[0],
        features,
        w.shape[1] // 4,
        IS_SCALED=scale_M is not None,
        **config,
    )
    return y


@xnor_op.register_fake
def _xnor_fake(
    x: torch.Tensor,
    w: torch.Tensor,
    scale_M: torch.Tensor | None,
    scale_N: torch.Tensor | None,
    features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    del scale_M, scale_N, features
    return torch.empty((x.shape[0], w.shape[0]), dtype=dtype, device=x.device)


def _words(packed: torch.Tensor) -> torch.Tensor:
    """The same bytes as int32, four at a time, at an aligned address."""
    packed = packed.contiguous()
    return (packed.clone() if packed.data_ptr() % 4 else packed).view(torch.int32)


def _check_linear(op: str, impl: str, x: torch.Tensor, weight: BinaryRows) -> None:
    check_device(op, impl, x, weight.packed, weight.scale, choices=_CHOICES)
    _check_rows(op, weight)
    check_linear(op, x, weight.packed.shape[0], weight.features)
    if impl == "triton":
        check_floats(op, x=x)


def _check_rows(op: str, rows: BinaryRows) -> None:
    packed_RB, scale_R, features = rows
    fits = packed_RB.ndim == 2 and features > 0 and packed_RB.shape[1] == packed_bytes(features, 1)
    if (
        not fits
        or scale_R.shape != packed_RB.shape[:1]
        or (packed_RB.dtype, scale_R.dtype)
        != (
            torch.uint8,
            torch.float32,
        )
    ):
        raise ValueError(
            f"{op}: expected packed uint8 [R, {packed_bytes(max(features, 1), 1)}] for {features} features and scale "
            f"fp32 [R], got {packed_RB.dtype} {list(packed_RB.shape)} and {scale_R.dtype} {list(scale_R.shape)}: make "
            f"them with binary_quantize"
        )
