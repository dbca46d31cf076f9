"""The kernels of ternary weights (ternary.py): words and dp4a for one token, int8 matrix units for more.

Shapes:  M = tokens, N = outputs, K = features, W = words of four bytes, C = bytes of a step.
"""

# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from ..launch import tl, triton

UNIT: tl.constexpr = tl.constexpr(16)
"""Bytes of a unit of the packed layout (bits.py): 4 words, 64 weights."""


@triton.jit
def _dp4a(a, b, acc, INTERP: tl.constexpr):
    """Acc + the four products of the signed bytes of two words."""
    if INTERP:
        for byte in tl.static_range(4):
            # Up to the sign, then down: an arithmetic shift.
            acc += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return acc
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _ternary_gemv_kernel(
    x_ptr,
    packed_ptr,
    x_scale_ptr,
    w_scale_ptr,
    y_ptr,
    num_outputs,
    num_words,
    IS_SCALED: tl.constexpr,
    INTERP: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One token, x as words of whole units; y is ``[SPLIT, N]``. Codes are t + 1: the sum of x is taken off again."""
    row_N = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    acc_NW = tl.zeros((ROWS, WORDS), dtype=tl.int32)
    sum_W = tl.zeros((WORDS,), dtype=tl.int32)
    for first in range(split * WORDS, num_words, SPLIT * WORDS):
        word_W = first + tl.arange(0, WORDS)
        mask_W = word_W < num_words
        packed_NW = tl.load(
            packed_ptr + row_N[:, None] * num_words + word_W[None, :],
            mask=(row_N < num_outputs)[:, None] & mask_W[None, :],
            other=0,
        )
        at_W = (word_W // 4) * 16 + word_W % 4
        for plane in tl.static_range(4):
            x_W = tl.load(x_ptr + at_W + plane * 4, mask=mask_W, other=0)
            x_NW = tl.broadcast_to(x_W[None, :], (ROWS, WORDS))
            acc_NW = _dp4a((packed_NW >> (2 * plane)) & 0x03030303, x_NW, acc_NW, INTERP)
            sum_W = _dp4a(tl.full((WORDS,), 0x01010101, dtype=tl.int32), x_W, sum_W, INTERP)
    product_N = tl.sum(acc_NW, axis=1) - tl.sum(sum_W, axis=0)
    at_N = split.to(tl.int64) * num_outputs + row_N
    if IS_SCALED:
        y_N = product_N.to(tl.float32) * tl.load(x_scale_ptr) * tl.load(w_scale_ptr)
        tl.store(y_ptr + at_N, y_N.to(y_ptr.dtype.element_ty), mask=row_N < num_outputs)
    else:
        tl.store(y_ptr + at_N, product_N, mask=row_N < num_outputs)


@triton.jit
def _ternary_gemm_kernel(
    x_ptr,
    packed_ptr,
    x_scale_ptr,
    w_scale_ptr,
    y_ptr,
    num_tokens,
    num_outputs,
    num_features,
    row_bytes,
    IS_SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    # Neighbouring programs share weights.
    tiles_M = tl.cdiv(num_tokens, TOKENS)
    token_M = ((tl.program_id(0) % tiles_M) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row_N = ((tl.program_id(0) // tiles_M) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    mask_M, mask_N = token_M < num_tokens, row_N < num_outputs
    acc_MN = tl.zeros((TOKENS, ROWS), dtype=tl.int32)
    for first in range(0, row_bytes, BYTES):
        at_C = first + tl.arange(0, BYTES)
        packed_NC = tl.load(
            packed_ptr + row_N[:, None] * row_bytes + at_C[None, :],
            mask=mask_N[:, None] & (at_C < row_bytes)[None, :],
            other=0,
        )
        feature_C = (at_C // UNIT) * (UNIT * 4) + at_C % UNIT
        for plane in tl.static_range(4):
            k_C = feature_C + plane * UNIT
            # Beyond the row x is 0, whatever the code.
            x_MC = tl.load(
                x_ptr + token_M[:, None] * num_features + k_C[None, :],
                mask=mask_M[:, None] & (k_C < num_features)[None, :],
                other=0,
            )
            w_NC = ((packed_NC >> (2 * plane)) & 3).to(tl.int8) - 1
            acc_MN = tl.dot(x_MC, tl.trans(w_NC.to(tl.int8)), acc_MN, out_dtype=tl.int32)
    at_MN = token_M[:, None] * num_outputs + row_N[None, :]
    mask_MN = mask_M[:, None] & mask_N[None, :]
    if IS_SCALED:
        x_scale_M = tl.load(x_scale_ptr + token_M, mask=mask_M, other=0.0)
        y_MN = acc_MN.to(tl.float32) * x_scale_M[:, None] * tl.load(w_scale_ptr)
        tl.store(y_ptr + at_MN, y_MN.to(y_ptr.dtype.element_ty), mask=mask_MN)
    else:
        tl.store(y_ptr + at_MN, acc_MN, mask=mask_MN)
