"""Ternary weights, four a byte, times int8 activations (W2A8, BitNet b1.58, arXiv 2402.17764).

Shapes:  M = tokens (all leading dims together), N = outputs, K = features, B = bytes of a packed row.
Math:    scale = mean|w| of the whole matrix, t = clamp(round(w / scale), -1, 1), stored as t + 1 in 2 bits.
         Activations are rounded to int8 by token (int8.py). acc = q_x t.T in int32, exact;
         y = (acc * scale_x[m]) * scale, rounded once.
Cost:    2 bits a weight: one token is bound by memory, at most 8 times bf16; dp4a multiplies four bytes at a time, so
         four weights cost a shift, a mask and a dp4a. More tokens take the int8 units, at most at their rate.
         Inference only: training keeps latent weights and passes its gradient by the rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from ..launch import Impl, cdiv, check_device, is_interpreting, next_power_of_2, num_sms
from ..tuning import config_for
from ._ternary import _ternary_gemm_kernel, _ternary_gemv_kernel
from .bits import pack_bits, packed_bytes, unit_codes, unpack_bits
from .inputs import check_floats, check_linear, divisor, floats
from .int8 import MAX_FEATURES, int8_quantize_reference, quantize_op, scaled

_CHOICES = ("reference", "triton")


class TernaryWeight(NamedTuple):
    """A matrix ``[N, K]`` of -1, 0 and 1 with one scale."""

    packed: torch.Tensor
    """``[N, B]`` uint8, four codes a byte (bits.py), 1 is zero; what pads a row is never multiplied but by 0."""
    scale: torch.Tensor
    """``[1]`` fp32."""
    features: int
    """K."""


def ternary_quantize(w_NK: torch.Tensor) -> TernaryWeight:
    """Round a matrix to -1, 0, 1 times the mean of its absolute values.

    Raises:
        ValueError: Another shape or dtype.
    """
    if w_NK.ndim != 2 or w_NK.dtype not in floats or not 1 <= w_NK.shape[1] <= MAX_FEATURES:
        raise ValueError(
            f"ternary_quantize: expected a float matrix [N, K] with K from 1 to {MAX_FEATURES}, got {w_NK.dtype} "
            f"{list(w_NK.shape)}"
        )
    wide = w_NK.detach().to(torch.float32)
    mean = wide.abs().mean().view(1) if wide.numel() else wide.new_zeros(1)
    scale = divisor(mean, torch.float32)
    return TernaryWeight(ternary_pack((wide / scale).round().clamp(-1, 1)), scale, w_NK.shape[1])


def ternary_pack(values_NK: torch.Tensor) -> torch.Tensor:
    """Pack a matrix of -1, 0 and 1."""
    return pack_bits(values_NK + 1, 2)


def ternary_unpack(weight: TernaryWeight) -> torch.Tensor:
    """Return the int8 matrix ``[N, K]`` of -1, 0 and 1."""
    return unpack_bits(weight.packed, 2, weight.features).to(torch.int8) - 1


def ternary_dequantize(weight: TernaryWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the matrix ``[N, K]`` of -scale, 0 and scale."""
    return (ternary_unpack(weight).to(torch.float32) * weight.scale).to(dtype)


def ternary_matmul(x_MK: torch.Tensor, weight: TernaryWeight, *, impl: Impl = "triton") -> torch.Tensor:
    """Return the exact int32 product of int8 activations ``[M, K]`` and the weight's -1, 0 and 1.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.
    """
    check_device("ternary_matmul", impl, x_MK, weight.packed, weight.scale, choices=_CHOICES)
    _check_weight(weight)
    if x_MK.ndim != 2 or x_MK.dtype != torch.int8 or x_MK.shape[1] != weight.features:
        raise ValueError(f"ternary_matmul: expected int8 [M, {weight.features}], got {x_MK.dtype} {list(x_MK.shape)}")
    if impl == "reference":
        return (x_MK.to(torch.float64) @ ternary_unpack(weight).to(torch.float64).T).to(torch.int32)
    return ternary_op(x_MK, weight.packed, None, None, torch.int32)


def ternary_linear_reference(x: torch.Tensor, weight: TernaryWeight) -> torch.Tensor:
    """Define the result for activations ``[M, K]``."""
    rows = int8_quantize_reference(x)
    product = ternary_matmul(rows.values, weight, impl="reference")
    return scaled(product, rows.scale, weight.scale, x.dtype)


def ternary_linear(x: torch.Tensor, weight: TernaryWeight, *, impl: Impl = "triton") -> torch.Tensor:
    """Round activations to int8 by token and multiply them by ternary weights.

    Args:
        x: ``[..., K]`` fp32, fp16 or bf16; rows may lie apart.
        weight: What :func:`ternary_quantize` made.
        impl: Who computes it; torch has nothing of its own.

    Returns:
        ``[..., N]`` in x's dtype; no gradient.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    check_device("ternary_linear", impl, x, weight.packed, weight.scale, choices=_CHOICES)
    _check_weight(weight)
    check_linear("ternary_linear", x, weight.packed.shape[0], weight.features)
    x_MK = x.detach().reshape(-1, x.shape[-1])
    if impl == "reference":
        y = ternary_linear_reference(x_MK, weight)
    else:
        check_floats("ternary_linear", x=x)
        values, scale_M = quantize_op(x_MK, None)
        y = ternary_op(values, weight.packed, scale_M, weight.scale, x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def gemv_config(num_outputs: int, device: torch.device) -> dict[str, int]:
    """Default for one token: 256 bytes of each of 16 rows at a time, K split until every SM has two programs."""
    split = 1
    while split < 8 and cdiv(num_outputs, 16) * split < 2 * num_sms(device):
        split *= 2
    return {"WORDS": 64, "ROWS": 16, "SPLIT": split, "num_warps": 4, "num_stages": 3}


def gemm_config(num_tokens: int) -> dict[str, int]:
    """Default for more: a step is 64 bytes of each row, so four products of depth 64."""
    tokens = min(max(next_power_of_2(num_tokens), 16), 128)
    return {"TOKENS": tokens, "ROWS": 128, "BYTES": 64, "num_warps": 8 if tokens == 128 else 4, "num_stages": 3}


@torch.library.custom_op("danaus::ternary_matmul", mutates_args=())
def ternary_op(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale_M: torch.Tensor | None,
    scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the product in ``dtype``, times both scales where they are given."""
    (num_tokens, features), num_outputs = x.shape, packed.shape[0]
    y = _ternary_fake(x, packed, scale_M, scale, dtype)
    if not y.numel():
        return y
    packed = packed.contiguous()
    if num_tokens == 1:
        # Whole units and aligned words: the kernel reads four bytes at a time.
        x = functional.pad(x, (0, -features % unit_codes(2))).contiguous()
        x = x.clone() if x.data_ptr() % 4 else x
        packed = packed.clone() if packed.data_ptr() % 4 else packed
        config = config_for("ternary_gemv", f"N{num_outputs},K{features}", gemv_config(num_outputs, x.device))
        split = config["SPLIT"]
        parts = y if split == 1 else torch.empty((split, num_outputs), dtype=torch.int32, device=x.device)
        _ternary_gemv_kernel[(cdiv(num_outputs, config["ROWS"]), split)](
            x.view(torch.int32),
            packed.view(torch.int32),
            scale_M,
            scale,
            parts,
            num_outputs,
            packed.shape[1] // 4,
            IS_SCALED=scale_M is not None and split == 1,
            INTERP=is_interpreting(),
            **config,
        )
        return y if split == 1 else _joined(parts.sum(0, keepdim=True), scale_M, scale, dtype)
    config = config_for("ternary_gemm", f"M{next_power_of_2(num_tokens)}", gemm_config(num_tokens))
    tiles = cdiv(num_tokens, config["TOKENS"]) * cdiv(num_outputs, config["ROWS"])
    _ternary_gemm_kernel[(tiles,)](
        x.contiguous(),
        packed,
        scale_M,
        scale,
        y,
        num_tokens,
        num_outputs,
        features,
        packed.shape[1],
        IS_SCALED=scale_M is not None,
        **config,
    )
    return y


@ternary_op.register_fake
def _ternary_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale_M: torch.Tensor | None,
    scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    del scale_M, scale
    return torch.empty((x.shape[0], packed.shape[0]), dtype=dtype, device=x.device)


def _joined(
    product: torch.Tensor, scale_M: torch.Tensor | None, scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    if scale_M is None or scale is None:
        return product.to(dtype)
    return scaled(product, scale_M, scale, dtype)


def _check_weight(weight: TernaryWeight) -> None:
    packed_NB, scale, features = weight
    fits = packed_NB.ndim == 2 and features > 0 and packed_NB.shape[1] == packed_bytes(features, 2)
    if not fits or scale.shape != (1,) or (packed_NB.dtype, scale.dtype) != (torch.uint8, torch.float32):
        raise ValueError(
            f"ternary: expected packed uint8 [N, {packed_bytes(max(features, 1), 2)}] for {features} features and "
            f"scale fp32 [1], got {packed_NB.dtype} {list(packed_NB.shape)} and {scale.dtype} {list(scale.shape)}: "
            f"make it with ternary_quantize"
        )
