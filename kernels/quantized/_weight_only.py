"""The kernels of every format that packs its weights and keeps its activations: GEMV, GEMM, dequantize.

Shapes:  M = tokens, N = outputs (rows of the weight), K = features, G = tile groups, B = bytes of a tile group.
         A tile group is a power of two of bytes that lie under one scale; ``per_scale`` of them share it.
Schemes: "int4": (code - zero) * scale;  "nf4": table[code] * scale, the scale itself 8 bits;  "binary": +-scale.
Codes become floats without a conversion instruction (a quarter of an SM's rate): an integer below 2**23 put under the
exponent of 2**23 is the number 2**23 + code, and the zero point subtracted takes the 2**23 away.
"""

# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from ..launch import tl, triton

UNIT: tl.constexpr = tl.constexpr(16)
"""Bytes of a unit of the packed layout (bits.py)."""
BLOCKS: tl.constexpr = tl.constexpr(256)
"""Scales that share one scale of the second level."""


@triton.jit
def _scales(scale_ptr, level2_ptr, offset_ptr, index, mask, SCHEME: tl.constexpr):
    scale = tl.load(scale_ptr + index, mask=mask, other=0).to(tl.float32)
    if SCHEME == "nf4":
        scale = scale * tl.load(level2_ptr + index // BLOCKS, mask=mask, other=0.0) + tl.load(offset_ptr)
    return scale


@triton.jit
def _zeros(zero_ptr, index, mask, SCHEME: tl.constexpr, HAS_ZERO: tl.constexpr):
    """2**23 + zero point: 8 where the scheme is symmetric."""
    if SCHEME == "int4" and HAS_ZERO:
        return tl.load(zero_ptr + index, mask=mask, other=0).to(tl.float32) + 8388608.0
    return tl.zeros(index.shape, dtype=tl.float32) + 8388616.0


@triton.jit
def _decode(packed, zero, table_ptr, plane: tl.constexpr, SCHEME: tl.constexpr, BITS: tl.constexpr):
    """The plane's weights before the scale, fp32."""
    code = (packed >> (BITS * plane)) & ((1 << BITS) - 1)
    if SCHEME == "nf4":
        return tl.load(table_ptr + code)
    if SCHEME == "binary":
        # Bit 1 is minus: it goes where a float has its sign.
        return ((code << 31) | 0x3F800000).to(tl.float32, bitcast=True)
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - zero


@triton.jit
def _gemv_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    level2_ptr,
    offset_ptr,
    table_ptr,
    y_ptr,
    num_outputs,
    num_features,
    num_groups,
    num_scales,
    per_scale,
    SCHEME: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One token. Each program takes ROWS outputs and every SPLIT-th tile of K; y is ``[SPLIT, N]``."""
    PLANES: tl.constexpr = 8 // BITS
    row_N = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    byte_B = tl.arange(0, BYTES)
    acc_NGB = tl.zeros((ROWS, GROUPS, BYTES), dtype=tl.float32)
    for first in range(split * GROUPS, num_groups, SPLIT * GROUPS):
        group_G = first + tl.arange(0, GROUPS)
        mask_NG = (row_N < num_outputs)[:, None] & (group_G < num_groups)[None, :]
        at_GB = group_G[:, None] * BYTES + byte_B[None, :]
        packed_NGB = tl.load(
            packed_ptr + row_N[:, None, None] * (num_groups * BYTES) + at_GB[None, :, :],
            mask=mask_NG[:, :, None],
            other=0,
        ).to(tl.int32)
        index_NG = row_N[:, None] * num_scales + (group_G // per_scale)[None, :]
        scale_NG = _scales(scale_ptr, level2_ptr, offset_ptr, index_NG, mask_NG, SCHEME)
        zero_NG = _zeros(zero_ptr, index_NG, mask_NG, SCHEME, HAS_ZERO)
        feature_GB = (at_GB // UNIT) * (UNIT * PLANES) + at_GB % UNIT
        sum_NGB = tl.zeros((ROWS, GROUPS, BYTES), dtype=tl.float32)
        for plane in tl.static_range(PLANES):
            k_GB = feature_GB + plane * UNIT
            x_GB = tl.load(x_ptr + k_GB, mask=k_GB < num_features, other=0.0).to(tl.float32)
            sum_NGB += _decode(packed_NGB, zero_NG[:, :, None], table_ptr, plane, SCHEME, BITS) * x_GB[None, :, :]
        acc_NGB += sum_NGB * scale_NG[:, :, None]
    y_N = tl.sum(tl.sum(acc_NGB, axis=2), axis=1)
    at_N = split.to(tl.int64) * num_outputs + row_N
    tl.store(y_ptr + at_N, y_N.to(y_ptr.dtype.element_ty), mask=row_N < num_outputs)


@triton.jit
def _gemm_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    level2_ptr,
    offset_ptr,
    table_ptr,
    y_ptr,
    x_stride,
    num_tokens,
    num_outputs,
    num_features,
    num_groups,
    num_scales,
    per_scale,
    SCHEME: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile ``[TOKENS, ROWS]`` of the output over every SPLIT-th tile of K; y is ``[SPLIT, M, N]``.

    WIDE: multiply in fp32, for the interpreter, which gets products of bf16 wrong.
    """
    PLANES: tl.constexpr = 8 // BITS
    # Neighbouring programs share weights, which are the larger part.
    tiles_M = tl.cdiv(num_tokens, TOKENS)
    token_M = ((tl.program_id(0) % tiles_M) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row_N = ((tl.program_id(0) // tiles_M) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    split = tl.program_id(1)
    byte_B = tl.arange(0, BYTES)
    lane_C = tl.arange(0, GROUPS * BYTES)
    acc_MN = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for first in range(split * GROUPS, num_groups, SPLIT * GROUPS):
        group_G = first + tl.arange(0, GROUPS)
        mask_NG = (row_N < num_outputs)[:, None] & (group_G < num_groups)[None, :]
        at_GB = group_G[:, None] * BYTES + byte_B[None, :]
        packed_NGB = tl.load(
            packed_ptr + row_N[:, None, None] * (num_groups * BYTES) + at_GB[None, :, :],
            mask=mask_NG[:, :, None],
            other=0,
        ).to(tl.int32)
        index_NG = row_N[:, None] * num_scales + (group_G // per_scale)[None, :]
        scale_NG = _scales(scale_ptr, level2_ptr, offset_ptr, index_NG, mask_NG, SCHEME)
        zero_NG = _zeros(zero_ptr, index_NG, mask_NG, SCHEME, HAS_ZERO)
        at_C = first * BYTES + lane_C
        feature_C = (at_C // UNIT) * (UNIT * PLANES) + at_C % UNIT
        for plane in tl.static_range(PLANES):
            k_C = feature_C + plane * UNIT
            mask_MC = (token_M < num_tokens)[:, None] & (k_C < num_features)[None, :]
            x_MC = tl.load(x_ptr + token_M[:, None] * x_stride + k_C[None, :], mask=mask_MC, other=0.0)
            w_NGB = _decode(packed_NGB, zero_NG[:, :, None], table_ptr, plane, SCHEME, BITS) * scale_NG[:, :, None]
            w_NC = tl.reshape(w_NGB, (ROWS, GROUPS * BYTES)).to(x_ptr.dtype.element_ty)
            if WIDE:
                x_MC, w_NC = x_MC.to(tl.float32), w_NC.to(tl.float32)
            acc_MN = tl.dot(x_MC, tl.trans(w_NC), acc_MN, input_precision="ieee")
    at_MN = (split.to(tl.int64) * num_tokens + token_M)[:, None] * num_outputs + row_N[None, :]
    mask_MN = (token_M < num_tokens)[:, None] & (row_N < num_outputs)[None, :]
    tl.store(y_ptr + at_MN, acc_MN.to(y_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit
def _dequantize_kernel(
    packed_ptr,
    scale_ptr,
    zero_ptr,
    level2_ptr,
    offset_ptr,
    table_ptr,
    w_ptr,
    num_outputs,
    num_features,
    num_groups,
    num_scales,
    per_scale,
    SCHEME: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BYTES: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Launched without contraction of a product and a sum, so that its bits are those of the reference."""
    PLANES: tl.constexpr = 8 // BITS
    row_N = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group_G = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    mask_NG = (row_N < num_outputs)[:, None] & (group_G < num_groups)[None, :]
    at_GB = group_G[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    packed_NGB = tl.load(
        packed_ptr + row_N[:, None, None] * (num_groups * BYTES) + at_GB[None, :, :],
        mask=mask_NG[:, :, None],
        other=0,
    ).to(tl.int32)
    index_NG = row_N[:, None] * num_scales + (group_G // per_scale)[None, :]
    scale_NG = _scales(scale_ptr, level2_ptr, offset_ptr, index_NG, mask_NG, SCHEME)
    zero_NG = _zeros(zero_ptr, index_NG, mask_NG, SCHEME, HAS_ZERO)
    feature_GB = (at_GB // UNIT) * (UNIT * PLANES) + at_GB % UNIT
    for plane in tl.static_range(PLANES):
        k_GB = feature_GB + plane * UNIT
        w_NGB = _decode(packed_NGB, zero_NG[:, :, None], table_ptr, plane, SCHEME, BITS) * scale_NG[:, :, None]
        tl.store(
            w_ptr + row_N[:, None, None] * num_features + k_GB[None, :, :],
            w_NGB.to(w_ptr.dtype.element_ty),
            mask=mask_NG[:, :, None] & (k_GB < num_features)[None, :, :],
        )
