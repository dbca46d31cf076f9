"""Weights of 4 bits in groups (W4A16), symmetric or with a zero point; activations stay as they are.

Shapes:  M = tokens (all leading dims together), N = outputs, K = features, G = groups of a row, B = K / 2 bytes.
Math:    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], computed in fp32 and rounded once to x's dtype; y = x w.T.
         Symmetric: zero = 8, codes 1 to 15, scale = max|w| / 7. Asymmetric: codes 0 to 15, scale = (max - min) / 15
         over a range that holds 0, so that 0 stays exact.
Cost:    one token is bound by memory: 4 + 16/group (24/group with zero points) bits a weight, at group 128 at most 3.9
         (3.8) times bf16. Differentiable in x, whose gradient takes the weight dequantized.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch import Impl, check_device
from .bits import pack_bits, unit_codes, unpack_bits
from .inputs import check_floats, check_linear, divisor, floats
from .weight_only import dequantize_op, matmul_op

_CHOICES = ("reference", "triton")


class Int4Weight(NamedTuple):
    """A matrix ``[N, K]`` in 4 bits; the size of a group is K / G."""

    packed: torch.Tensor
    """``[N, B]`` uint8, two codes a byte (bits.py)."""
    scale: torch.Tensor
    """``[N, G]`` fp32, fp16 or bf16."""
    zero: torch.Tensor | None
    """``[N, G]`` uint8, 0 to 15; None: symmetric, 8 everywhere."""

    @property
    def features(self) -> int:
        """K."""
        return 2 * self.packed.shape[1]

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return self.features // max(self.scale.shape[1], 1)


def int4_quantize(w_NK: torch.Tensor, *, group: int = 128, symmetric: bool = True) -> Int4Weight:
    """Round a matrix to 4 bits, to nearest; scales are kept in its dtype.

    Args:
        w_NK: ``[N, K]`` fp32, fp16 or bf16.
        group: Neighbours along K that share a scale: a multiple of 32 that divides K.
        symmetric: Whether to do without a zero point.

    Raises:
        ValueError: The group does not fit.
    """
    _check_group(w_NK, group)
    grouped = w_NK.detach().to(torch.float32).unflatten(1, (-1, group))
    if symmetric:
        scale_NG = divisor(grouped.abs().amax(-1) / 7, w_NK.dtype)
        codes = (grouped / scale_NG[..., None].to(torch.float32)).round().clamp(-8, 7) + 8
        return Int4Weight(pack_bits(codes.flatten(1), 4), scale_NG, None)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale_NG = divisor((high - low) / 15, w_NK.dtype)
    wide = scale_NG.to(torch.float32)
    zero_NG = (-low / wide).round().clamp(0, 15)
    codes = ((grouped / wide[..., None]).round() + zero_NG[..., None]).clamp(0, 15)
    return Int4Weight(pack_bits(codes.flatten(1), 4), scale_NG, zero_NG.to(torch.uint8))


def int4_dequantize(weight: Int4Weight, dtype: torch.dtype = torch.float32, *, impl: Impl = "triton") -> torch.Tensor:
    """Return the matrix ``[N, K]``; both implementations give the same bits.

    Raises:
        ValueError: ``impl`` is neither "reference" nor "triton", or the parts of the weight do not fit.
    """
    check_device("int4_dequantize", impl, *weight, choices=_CHOICES)
    _check_weight(weight)
    if impl == "triton":
        packed_NB, scale_NG, zero_NG = _contiguous(weight)
        return dequantize_op(packed_NB, scale_NG, zero_NG, None, None, "int4", weight.group, weight.features, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    codes = unpack_bits(weight.packed, 4, weight.features).to(wide).unflatten(1, (-1, weight.group))
    zero = 8.0 if weight.zero is None else weight.zero.to(wide)[..., None]
    return ((codes - zero) * weight.scale.to(wide)[..., None]).flatten(1).to(dtype)


def int4_linear_reference(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """Define the result: the weight dequantized to x's dtype, then a dense product."""
    return x @ int4_dequantize(weight, x.dtype, impl="reference").T


def int4_linear(x: torch.Tensor, weight: Int4Weight, *, impl: Impl = "triton") -> torch.Tensor:
    """Multiply activations by a weight of 4 bits: same result as :func:`int4_linear_reference`.

    Args:
        x: ``[..., K]`` fp32, fp16 or bf16; rows may lie apart.
        weight: What :func:`int4_quantize` made.
        impl: Who computes it; torch's own takes weights packed in another way, so there is no "torch".

    Returns:
        ``[..., N]`` in x's dtype, differentiable in x.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    check_device("int4_linear", impl, x, *weight, choices=_CHOICES)
    _check_weight(weight)
    check_linear("int4_linear", x, weight.packed.shape[0], weight.features)
    if impl == "reference":
        return int4_linear_reference(x, weight)
    check_floats("int4_linear", x=x)
    packed_NB, scale_NG, zero_NG = _contiguous(weight)
    y = matmul_op(x.reshape(-1, x.shape[-1]), packed_NB, scale_NG, zero_NG, None, None, "int4", weight.group)
    return y.view(*x.shape[:-1], y.shape[-1])


def _contiguous(weight: Int4Weight) -> Int4Weight:
    zero_NG = None if weight.zero is None else weight.zero.contiguous()
    return Int4Weight(weight.packed.contiguous(), weight.scale.contiguous(), zero_NG)


def _check_group(w_NK: torch.Tensor, group: int) -> None:
    if w_NK.ndim != 2 or w_NK.dtype not in floats:
        raise ValueError(f"int4_quantize: expected a float matrix [N, K], got {w_NK.dtype} {list(w_NK.shape)}")
    if group < 1 or group % unit_codes(4) or w_NK.shape[1] % group or not w_NK.shape[1]:
        raise ValueError(
            f"int4_quantize: groups of {group} in rows of {w_NK.shape[1]}: take a multiple of {unit_codes(4)} that "
            f"divides them"
        )


def _check_weight(weight: Int4Weight) -> None:
    packed_NB, scale_NG, zero_NG = weight
    fits = (
        packed_NB.ndim == scale_NG.ndim == 2
        and packed_NB.dtype == torch.uint8
        and scale_NG.dtype in floats
        and packed_NB.shape[0] == scale_NG.shape[0]
        and scale_NG.shape[1] > 0
        and weight.features == weight.group * scale_NG.shape[1]
        and weight.group % unit_codes(4) == 0
        and (zero_NG is None or (zero_NG.shape == scale_NG.shape and zero_NG.dtype == torch.uint8))
    )
    if not fits:
        zero = "None" if zero_NG is None else f"{zero_NG.dtype} {list(zero_NG.shape)}"
        raise ValueError(
            f"int4: expected packed uint8 [N, K/2], scale float [N, G] and zero uint8 [N, G] or None, groups of a "
            f"multiple of {unit_codes(4)}; got {packed_NB.dtype} {list(packed_NB.shape)}, {scale_NG.dtype} "
            f"{list(scale_NG.shape)} and {zero}: make it with int4_quantize"
        )
