"""The kernels of one-bit activations (binary.py): packing signs, and xor with a count of bits.

Shapes:  M = tokens, N = outputs, K = features, B = bytes, W = words of four bytes.
"""

# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from ..launch import tl, triton

UNIT: tl.constexpr = tl.constexpr(16)
"""Bytes of a unit of the packed layout (bits.py): 128 signs."""


@triton.jit
def _count_bits(word):
    """Set bits of an int32; the compiler knows the trick and makes one instruction of it."""
    bits = word.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _sign_kernel(x_ptr, packed_ptr, scale_ptr, x_stride, num_features, row_bytes, BYTES: tl.constexpr):
    """One row: its signs, padded with 0, and the mean of its absolute values."""
    row = tl.program_id(0).to(tl.int64)
    sum_B = tl.zeros((BYTES,), dtype=tl.float32)
    for first in range(0, row_bytes, BYTES):
        at_B = first + tl.arange(0, BYTES)
        feature_B = (at_B // UNIT) * (UNIT * 8) + at_B % UNIT
        packed_B = tl.zeros((BYTES,), dtype=tl.int32)
        for plane in tl.static_range(8):
            k_B = feature_B + plane * UNIT
            x_B = tl.load(x_ptr + row * x_stride + k_B, mask=k_B < num_features, other=0.0).to(tl.float32)
            packed_B |= (x_B < 0).to(tl.int32) << plane
            sum_B += tl.abs(x_B)
        tl.store(packed_ptr + row * row_bytes + at_B, packed_B.to(tl.uint8), mask=at_B < row_bytes)
    tl.store(scale_ptr + row, tl.sum(sum_B, axis=0) / num_features)


@triton.jit
def _xnor_kernel(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    y_ptr,
    num_tokens,
    num_outputs,
    num_features,
    num_words,
    IS_SCALED: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    # Tokens first: neighbouring programs share weights.
    token = (tl.program_id(0) % num_tokens).to(tl.int64)
    row_N = (tl.program_id(0) // num_tokens).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask_N = row_N < num_outputs
    differing_NW = tl.zeros((ROWS, WORDS), dtype=tl.int32)
    for first in range(0, num_words, WORDS):
        word_W = first + tl.arange(0, WORDS)
        mask_W = word_W < num_words
        x_W = tl.load(x_ptr + token * num_words + word_W, mask=mask_W, other=0)
        w_NW = tl.load(
            w_ptr + row_N[:, None] * num_words + word_W[None, :], mask=mask_N[:, None] & mask_W[None, :], other=0
        )
        # Masked words differ from x, but only in rows that are not stored.
        differing_NW += _count_bits(w_NW ^ x_W[None, :])
    product_N = num_features - 2 * tl.sum(differing_NW, axis=1)
    at_N = token * num_outputs + row_N
    if IS_SCALED:
        w_scale_N = tl.load(w_scale_ptr + row_N, mask=mask_N, other=0.0)
        y_N = product_N.to(tl.float32) * tl.load(x_scale_ptr + token) * w_scale_N
        tl.store(y_ptr + at_N, y_N.to(y_ptr.dtype.element_ty), mask=mask_N)
    else:
        tl.store(y_ptr + at_N, product_N, mask=mask_N)
