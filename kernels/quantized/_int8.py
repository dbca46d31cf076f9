"""The kernels of int8 (int8.py) and of its variant with outliers (outliers.py).

Shapes:  M = tokens, N = outputs, K = features, O = outlier columns.
"""

# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from ..launch import tl, triton


@triton.jit
def _round(x):
    """To the nearest integer, half to even, for |x| < 2**22: where 1.5 * 2**23 is added, no fraction is left."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _quantize_kernel(
    x_ptr,
    outlier_ptr,
    values_ptr,
    scale_ptr,
    x_stride,
    num_features,
    HAS_OUTLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its maximum, then its values; the second pass reads from the cache."""
    row = tl.program_id(0).to(tl.int64)
    largest_K = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, num_features, BLOCK):
        k_K = first + tl.arange(0, BLOCK)
        x_K = tl.load(x_ptr + row * x_stride + k_K, mask=k_K < num_features, other=0.0).to(tl.float32)
        if HAS_OUTLIERS:
            x_K = tl.where(tl.load(outlier_ptr + k_K, mask=k_K < num_features, other=0) != 0, 0.0, x_K)
        largest_K = tl.maximum(largest_K, tl.abs(x_K))
    # Divided as IEEE says, not by Triton's faster division: the reference's bits. 2**-126 where all are 0.
    scale = tl.maximum(tl.div_rn(tl.max(largest_K, axis=0), 127.0), 1.1754943508222875e-38)
    tl.store(scale_ptr + row, scale)
    for first in range(0, num_features, BLOCK):
        k_K = first + tl.arange(0, BLOCK)
        x_K = tl.load(x_ptr + row * x_stride + k_K, mask=k_K < num_features, other=0.0).to(tl.float32)
        if HAS_OUTLIERS:
            x_K = tl.where(tl.load(outlier_ptr + k_K, mask=k_K < num_features, other=0) != 0, 0.0, x_K)
        # Clamped before it is rounded: the trick takes no large numbers.
        value_K = _round(tl.minimum(tl.maximum(tl.div_rn(x_K, scale), -127.0), 127.0))
        tl.store(values_ptr + row * num_features + k_K, value_K.to(tl.int8), mask=k_K < num_features)


@triton.jit
def _int8_kernel(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    wide_ptr,
    column_ptr,
    count_ptr,
    y_ptr,
    wide_stride,
    num_tokens,
    num_outputs,
    num_features,
    IS_SCALED: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
):
    # GROUP rows of tiles at a time: what runs together shares both operands in the second level cache.
    tiles_M, tiles_N = tl.cdiv(num_tokens, TOKENS), tl.cdiv(num_outputs, ROWS)
    first_M = (tl.program_id(0) // (GROUP * tiles_N)) * GROUP
    height = tl.minimum(tiles_M - first_M, GROUP)
    inside = tl.program_id(0) % (GROUP * tiles_N)
    token_M = ((first_M + inside % height) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row_N = ((inside // height) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    mask_M, mask_N = token_M < num_tokens, row_N < num_outputs
    acc_MN = tl.zeros((TOKENS, ROWS), dtype=tl.int32)
    for first in range(0, num_features, BLOCK):
        k_K = first + tl.arange(0, BLOCK)
        mask_K = k_K < num_features
        x_MK = tl.load(
            x_ptr + token_M[:, None] * num_features + k_K[None, :], mask=mask_M[:, None] & mask_K[None, :], other=0
        )
        w_NK = tl.load(
            w_ptr + row_N[:, None] * num_features + k_K[None, :], mask=mask_N[:, None] & mask_K[None, :], other=0
        )
        acc_MN = tl.dot(x_MK, tl.trans(w_NK), acc_MN, out_dtype=tl.int32)
    at_MN = token_M[:, None] * num_outputs + row_N[None, :]
    mask_MN = mask_M[:, None] & mask_N[None, :]
    if IS_SCALED:
        x_scale_M = tl.load(x_scale_ptr + token_M, mask=mask_M, other=0.0)
        y_MN = acc_MN.to(tl.float32) * x_scale_M[:, None]
        if HAS_OUTLIERS:
            count = tl.load(count_ptr)
            for first in range(0, count, 16):
                at_O = first + tl.arange(0, 16)
                column_O = tl.load(column_ptr + at_O, mask=at_O < count, other=0)
                x_MO = tl.load(
                    wide_ptr + token_M[:, None] * wide_stride + column_O[None, :],
                    mask=mask_M[:, None] & (at_O < count)[None, :],
                    other=0.0,
                )
                w_NO = tl.load(
                    w_ptr + row_N[:, None] * num_features + column_O[None, :],
                    mask=mask_N[:, None] & (at_O < count)[None, :],
                    other=0,
                )
                if WIDE:
                    # For the interpreter, which gets products of bf16 wrong.
                    x_MO, w_NO = x_MO.to(tl.float32), w_NO.to(tl.float32)
                else:
                    w_NO = w_NO.to(wide_ptr.dtype.element_ty)
                y_MN = tl.dot(x_MO, tl.trans(w_NO), y_MN, input_precision="ieee")
        y_MN *= tl.load(w_scale_ptr + row_N, mask=mask_N, other=0.0)[None, :]
        tl.store(y_ptr + at_MN, y_MN.to(y_ptr.dtype.element_ty), mask=mask_MN)
    else:
        tl.store(y_ptr + at_MN, acc_MN, mask=mask_MN)
