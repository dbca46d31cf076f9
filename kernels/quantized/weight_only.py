"""Launches the kernels of the weight-only formats; int4.py, nf4.py and binary.py say what their numbers mean.

Shapes:  M = tokens, N = outputs, K = features; the packed weight is ``[N, B]`` uint8 (bits.py).
Path:    one token takes the GEMV, which is bound by memory; more take the GEMM, whose K is split over programs where
         the output alone gives the GPU too few. Parts are added in fp32 in a fixed order: the same bits in every run.
Cost:    the packed weight is read once (GEMM: once per TOKENS rows, mostly from the second level cache).
         Backward: the weight is dequantized whole, in the gradient's dtype, for one dense product.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch

from ..launch import cdiv, is_interpreting, next_power_of_2, num_sms
from ..tuning import config_for
from ._weight_only import _dequantize_kernel, _gemm_kernel, _gemv_kernel
from .bits import UNIT_BYTES, packed_bytes

Scheme = Literal["int4", "nf4", "binary"]

BITS: dict[str, int] = {"int4": 4, "nf4": 4, "binary": 1}

# The 16 quantiles of a normal distribution that QLoRA (arXiv 2305.14314, appendix E) fixed, 0 exact.
NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def nf4_table(device: torch.device) -> torch.Tensor:
    """Return the 16 values of NF4 on ``device``, fp32."""
    return torch.tensor(NF4_TABLE, dtype=torch.float32, device=device)


# For the operators alone: what they are called with is never fake.
_stored_table = cache(nf4_table)


def gemv_config(num_outputs: int, device: torch.device) -> dict[str, int]:
    """Default of the GEMV: 256 bytes of each of 16 rows at a time, K split until every SM has two programs."""
    split = 1
    while split < 8 and cdiv(num_outputs, 16) * split < 2 * num_sms(device):
        split *= 2
    return {"TILE_BYTES": 256, "ROWS": 16, "SPLIT": split, "num_warps": 4, "num_stages": 3}


def gemm_config(scheme: str, num_tokens: int, num_outputs: int, device: torch.device) -> dict[str, int]:
    """Default of the GEMM: the tile grows with the tokens, K is split until the tiles fill the GPU.

    A step of 64 bytes is two products of depth 64; one bit a weight has eight planes of x in shared memory, so less.
    """
    tokens = min(max(next_power_of_2(num_tokens), 16), 128)
    rows = 64 if tokens < 64 else 128
    tiles, split = cdiv(num_tokens, tokens) * cdiv(num_outputs, rows), 1
    while split < 8 and 2 * tiles * split <= num_sms(device):
        split *= 2
    warps = 8 if tokens == 128 else 4
    depth = {"TILE_BYTES": 32, "num_stages": 2} if scheme == "binary" else {"TILE_BYTES": 64, "num_stages": 3}
    return {"TOKENS": tokens, "ROWS": rows, "SPLIT": split, "num_warps": warps, **depth}


def group_bytes(bits: int, num_features: int, group: int) -> int:
    """Return the bytes that lie under one scale: a whole row where ``group`` is all of K."""
    return packed_bytes(num_features, bits) if group >= num_features else group * bits // 8


def tile_shape(tile_bytes: int, scaled_bytes: int) -> dict[str, int]:
    """Cut a tile of ``tile_bytes`` a row into groups that each lie under one scale."""
    power = scaled_bytes & -scaled_bytes
    size = min(max(power, UNIT_BYTES), tile_bytes)
    return {"BYTES": size, "GROUPS": tile_bytes // size}


def _sizes(packed: torch.Tensor, scale: torch.Tensor, group: int, features: int, bits: int, size: int) -> list[int]:
    """num_outputs, num_features, num_groups, num_scales, per_scale of the kernels."""
    num_outputs, row_bytes = packed.shape
    per_scale = group_bytes(bits, features, group) // size
    return [num_outputs, features, row_bytes // size, scale.numel() // max(num_outputs, 1), per_scale]


def _pointers(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    level2: torch.Tensor | None,
    offset: torch.Tensor | None,
    scheme: str,
) -> list[torch.Tensor | None]:
    table = _stored_table(packed.device) if scheme == "nf4" else None
    return [packed, scale, zero, level2, offset, table]


@torch.library.custom_op("danaus::weight_only_dequantize", mutates_args=())
def dequantize_op(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    level2: torch.Tensor | None,
    offset: torch.Tensor | None,
    scheme: str,
    group: int,
    features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the weight ``[N, K]`` in ``dtype``: each value computed in fp32 and rounded once."""
    weight = torch.empty((packed.shape[0], features), dtype=dtype, device=packed.device)
    if weight.numel():
        bits, rows = BITS[scheme], 16
        tile = tile_shape(128, group_bytes(bits, features, group))
        _dequantize_kernel[(cdiv(packed.shape[0], rows), cdiv(packed.shape[1], 128))](
            *_pointers(packed, scale, zero, level2, offset, scheme),
            weight,
            *_sizes(packed, scale, group, features, bits, tile["BYTES"]),
            SCHEME=scheme,
            BITS=bits,
            HAS_ZERO=zero is not None,
            ROWS=rows,
            **tile,
            enable_fp_fusion=False,
        )
    return weight


@dequantize_op.register_fake
def _dequantize_fake(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    level2: torch.Tensor | None,
    offset: torch.Tensor | None,
    scheme: str,
    group: int,
    features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    del scale, zero, level2, offset, scheme, group
    return torch.empty((packed.shape[0], features), dtype=dtype, device=packed.device)


@torch.library.custom_op("danaus::weight_only_matmul", mutates_args=())
def matmul_op(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    level2: torch.Tensor | None,
    offset: torch.Tensor | None,
    scheme: str,
    group: int,
) -> torch.Tensor:
    """Return ``x[M, K] @ w[N, K].T`` in x's dtype; differentiable in x."""
    (num_tokens, features), num_outputs = x.shape, packed.shape[0]
    if not num_tokens or not num_outputs:
        return x.new_empty((num_tokens, num_outputs))
    x = x if x.stride(1) == 1 else x.contiguous()
    is_gemv, bits = num_tokens == 1, BITS[scheme]
    if is_gemv:
        config = config_for(f"{scheme}_gemv", f"N{num_outputs},K{features}", gemv_config(num_outputs, x.device))
    else:
        default = gemm_config(scheme, num_tokens, num_outputs, x.device)
        config = config_for(f"{scheme}_gemm", f"M{next_power_of_2(num_tokens)}", default)
    tile = tile_shape(config.pop("TILE_BYTES"), group_bytes(bits, features, group))
    sizes = _sizes(packed, scale, group, features, bits, tile["BYTES"])
    pointers = _pointers(packed, scale, zero, level2, offset, scheme)
    split = config["SPLIT"]
    parts = torch.empty(
        (split, num_tokens, num_outputs), dtype=x.dtype if split == 1 else torch.float32, device=x.device
    )
    options = {"SCHEME": scheme, "BITS": bits, "HAS_ZERO": zero is not None, **tile, **config}
    if is_gemv:
        _gemv_kernel[(cdiv(num_outputs, config["ROWS"]), split)](x, *pointers, parts, *sizes, **options)
    else:
        tiles = cdiv(num_tokens, config["TOKENS"]) * cdiv(num_outputs, config["ROWS"])
        _gemm_kernel[(tiles, split)](
            x, *pointers, parts, x.stride(0), num_tokens, *sizes, WIDE=is_interpreting(), **options
        )
    return parts[0] if split == 1 else parts.sum(0).to(x.dtype)


@matmul_op.register_fake
def _matmul_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    level2: torch.Tensor | None,
    offset: torch.Tensor | None,
    scheme: str,
    group: int,
) -> torch.Tensor:
    del scale, zero, level2, offset, scheme, group
    return x.new_empty((x.shape[0], packed.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    x, packed, scale, zero, level2, offset, ctx.scheme, ctx.group = inputs
    ctx.features, ctx.dtype = x.shape[1], x.dtype
    ctx.save_for_backward(packed, scale, zero, level2, offset)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None, None, None]:
    weight = dequantize_op(*ctx.saved_tensors, ctx.scheme, ctx.group, ctx.features, ctx.dtype)
    return dy @ weight, None, None, None, None, None, None, None


matmul_op.register_autograd(_backward, setup_context=_setup_context)
