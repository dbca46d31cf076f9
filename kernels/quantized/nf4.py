"""Weights of 4 bits whose 16 values are the quantiles of a normal distribution (NF4, QLoRA), scales quantized again.

Shapes:  M = tokens (all leading dims together), N = outputs, K = features, S = N * K / 64 blocks, B = K / 2 bytes.
Math:    w = table[code] * scale[s], one scale for each 64 neighbours of a row: their max|w|.
         Double quantization: scale[s] = q[s] * level2[s // 256] + offset, with q in int8 and offset the mean of all
         scales, every product and sum in fp32. Rounded once to x's dtype; y = x w.T.
Cost:    4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight: one token is at most 3.9 times as fast as bf16. No GPU decodes
         NF4: a look-up a weight, from a table of 64 bytes that stays in the first level cache.
         Differentiable in x, whose gradient takes the weight dequantized.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from ..launch import Impl, check_device
from .bits import pack_bits, unpack_bits
from .inputs import check_floats, check_linear, divisor, floats
from .weight_only import dequantize_op, matmul_op, nf4_table

BLOCK = 64
"""Weights that share a scale."""
SECOND_BLOCK = 256
"""Scales that share a scale of the second level."""

_CHOICES = ("reference", "triton")


class Nf4Weight(NamedTuple):
    """A matrix ``[N, K]`` in NF4 with double quantization."""

    packed: torch.Tensor
    """``[N, B]`` uint8, two codes a byte (bits.py)."""
    scale: torch.Tensor
    """``[S]`` int8, row after row."""
    level2: torch.Tensor
    """``[S / 256, rounded up]`` fp32."""
    offset: torch.Tensor
    """``[1]`` fp32."""

    @property
    def features(self) -> int:
        """K."""
        return 2 * self.packed.shape[1]


def nf4_quantize(w_NK: torch.Tensor) -> Nf4Weight:
    """Round a matrix to NF4: to the nearest of the 16 values, the lower one where two are as near.

    Args:
        w_NK: ``[N, K]`` fp32, fp16 or bf16; K a multiple of 64.

    Raises:
        ValueError: Another shape or dtype.
    """
    if w_NK.ndim != 2 or w_NK.dtype not in floats or not w_NK.shape[1] or w_NK.shape[1] % BLOCK:
        raise ValueError(
            f"nf4_quantize: expected a float matrix [N, K] with K a multiple of {BLOCK}, got {w_NK.dtype} "
            f"{list(w_NK.shape)}"
        )
    blocks = w_NK.detach().to(torch.float32).reshape(-1, BLOCK)
    absmax_S = divisor(blocks.abs().amax(-1), torch.float32)
    table = nf4_table(w_NK.device)
    codes = torch.bucketize(blocks / absmax_S[:, None], (table[1:] + table[:-1]) / 2)
    scale_S, level2, offset = _quantize_scales(absmax_S)
    return Nf4Weight(pack_bits(codes.view(w_NK.shape), 4), scale_S, level2, offset)


def nf4_dequantize(weight: Nf4Weight, dtype: torch.dtype = torch.float32, *, impl: Impl = "triton") -> torch.Tensor:
    """Return the matrix ``[N, K]``; both implementations give the same bits.

    Raises:
        ValueError: ``impl`` is neither "reference" nor "triton", or the parts of the weight do not fit.
    """
    check_device("nf4_dequantize", impl, *weight, choices=_CHOICES)
    _check_weight(weight)
    if impl == "triton":
        packed_NB, scale_S, level2, offset = (part.contiguous() for part in weight)
        return dequantize_op(packed_NB, scale_S, None, level2, offset, "nf4", BLOCK, weight.features, dtype)
    codes = unpack_bits(weight.packed, 4, weight.features)
    wide = torch.promote_types(dtype, torch.float32)
    blocks = nf4_table(codes.device).to(wide)[codes.to(torch.int32)].reshape(-1, BLOCK)
    return (blocks * nf4_scales(weight, wide)[:, None]).view(codes.shape).to(dtype)


def nf4_scales(weight: Nf4Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the scale of each block, ``[S]``, computed in ``dtype``."""
    level2_S = weight.level2.to(dtype).repeat_interleave(SECOND_BLOCK)[: weight.scale.numel()]
    return weight.scale.to(dtype) * level2_S + weight.offset.to(dtype)


def nf4_linear_reference(x: torch.Tensor, weight: Nf4Weight) -> torch.Tensor:
    """Define the result: the weight dequantized to x's dtype, then a dense product."""
    return x @ nf4_dequantize(weight, x.dtype, impl="reference").T


def nf4_linear(x: torch.Tensor, weight: Nf4Weight, *, impl: Impl = "triton") -> torch.Tensor:
    """Multiply activations by a weight in NF4: same result as :func:`nf4_linear_reference`.

    Args:
        x: ``[..., K]`` fp32, fp16 or bf16; rows may lie apart.
        weight: What :func:`nf4_quantize` made.
        impl: Who computes it; torch has nothing of its own.

    Returns:
        ``[..., N]`` in x's dtype, differentiable in x.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    check_device("nf4_linear", impl, x, *weight, choices=_CHOICES)
    _check_weight(weight)
    check_linear("nf4_linear", x, weight.packed.shape[0], weight.features)
    if impl == "reference":
        return nf4_linear_reference(x, weight)
    check_floats("nf4_linear", x=x)
    packed_NB, scale_S, level2, offset = (part.contiguous() for part in weight)
    y = matmul_op(x.reshape(-1, x.shape[-1]), packed_NB, scale_S, None, level2, offset, "nf4", BLOCK)
    return y.view(*x.shape[:-1], y.shape[-1])


def _quantize_scales(absmax_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Second level: int8 around the mean, one fp32 scale for 256."""
    offset = absmax_S.mean(0, keepdim=True) if absmax_S.numel() else absmax_S.new_zeros(1)
    rest = functional.pad(absmax_S - offset, (0, -absmax_S.numel() % SECOND_BLOCK)).view(-1, SECOND_BLOCK)
    level2 = divisor(rest.abs().amax(-1) / 127, torch.float32)
    codes = (rest / level2[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes.flatten()[: absmax_S.numel()].contiguous(), level2, offset


def _check_weight(weight: Nf4Weight) -> None:
    packed_NB, scale_S, level2, offset = weight
    blocks = packed_NB.numel() * 2 // BLOCK
    fits = (
        packed_NB.ndim == 2
        and packed_NB.shape[1] > 0
        and weight.features % BLOCK == 0
        and scale_S.shape == (blocks,)
        and level2.shape == (-(-blocks // SECOND_BLOCK),)
        and offset.shape == (1,)
        and (packed_NB.dtype, scale_S.dtype) == (torch.uint8, torch.int8)
        and (level2.dtype, offset.dtype) == (torch.float32, torch.float32)
    )
    if not fits:
        shapes = ", ".join(f"{part.dtype} {list(part.shape)}" for part in weight)
        raise ValueError(
            f"nf4: expected packed uint8 [N, K/2], scales int8 [N*K/{BLOCK}], level2 fp32 (one for {SECOND_BLOCK} "
            f"scales) and offset fp32 [1], K a multiple of {BLOCK}; got {shapes}: make it with nf4_quantize"
        )
