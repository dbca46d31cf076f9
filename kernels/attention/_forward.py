"""The forward kernel: one block of queries walks over the keys that it sees, with a running softmax.

A program owns BLOCK_M queries of one head. Its keys come in three stretches: tiles cut by the left edge of the window,
tiles that every query sees in full (no mask, no bound checks: nearly all of the work), and tiles cut by the diagonal or
by the end of the keys. Tiles that no query sees are not visited. Exponentials are in base 2, with the scale folded in.
"""
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from ..launch import tl, triton
from ._tiles import LN2, LOG2E, key_ranges, load_rows, span, store_rows, tanh, tile_indices, tile_of, visible


@triton.jit
def _walk(
    acc,
    row_max,
    row_sum,
    q,
    k_ptr,
    v_ptr,
    k_tile,
    v_tile,
    k_stride,
    v_stride,
    lo,
    hi,
    rows,
    len_k,
    shift,
    left,
    right,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)
    for start in range(lo, hi, BLOCK_N):
        first = tl.cast(start, tl.int64)
        keys = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr + first * k_stride + k_tile, keys, len_k, columns, WIDTH, BLOCK_D, MASKED)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        factor = scale * LOG2E
        if HAS_SOFTCAP:
            score = tanh(score * (scale / softcap))
            factor = softcap * LOG2E
        if MASKED:
            mask = visible(rows[:, None], keys[None, :], len_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
            score = tl.where(mask, score, -float("inf"))
        # The factor is positive: the maximum may be taken before it.
        new_max = tl.maximum(row_max, tl.max(score, 1) * factor)
        base = new_max
        if MASKED:
            # A row that has seen nothing yet would give inf - inf.
            base = tl.where(new_max == -float("inf"), 0.0, new_max)
        probability = tl.exp2(score * factor - base[:, None])
        decay = tl.exp2(row_max - base)
        row_sum = row_sum * decay + tl.sum(probability, 1)
        row_max = new_max
        v = load_rows(v_ptr + first * v_stride + v_tile, keys, len_k, columns, WIDTH, BLOCK_D, MASKED)
        acc = tl.dot(probability.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    v_stride_d,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    out_stride_d,
    lse_stride_b,
    lse_stride_h,
    batch,
    num_heads,
    group,
    max_q,
    max_k,
    heads_per_section,
    left,
    right,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    LONG: tl.constexpr,
):
    num_blocks = tl.cdiv(max_q, BLOCK_M)
    block, index = tile_of(num_blocks, batch * num_heads, heads_per_section)
    sequence = index // num_heads
    head = index % num_heads
    # Under a causal mask the last block is the longest: it starts first.
    first_row = (num_blocks - 1 - block) * BLOCK_M
    first_q, len_q = span(cu_q_ptr, sequence, max_q, PACKED)
    first_k, len_k = span(cu_k_ptr, sequence, max_k, PACKED)
    if first_row >= len_q:
        return
    shift = 0
    if BOTTOM_RIGHT:
        shift = len_k - len_q
    kv_head = tl.cast(head // group, tl.int64)
    sequence = tl.cast(sequence, tl.int64)
    head = tl.cast(head, tl.int64)
    first_q = tl.cast(first_q, tl.int64)
    first_k = tl.cast(first_k, tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    long_rows = rows.to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_D)
    tile_rows, tile_columns = tile_indices(BLOCK_N, BLOCK_D, LONG)

    q_ptr += sequence * q_stride_b + head * q_stride_h + first_q * q_stride_s
    k_ptr += sequence * k_stride_b + kv_head * k_stride_h + first_k * k_stride_s
    v_ptr += sequence * v_stride_b + kv_head * v_stride_h + first_k * v_stride_s
    q_tile = long_rows * q_stride_s + tile_columns * q_stride_d
    k_tile = tile_rows * k_stride_s + tile_columns * k_stride_d
    v_tile = tile_rows * v_stride_s + tile_columns * v_stride_d
    q = load_rows(q_ptr + q_tile, rows, len_q, columns, WIDTH, BLOCK_D, True)

    last_row = tl.minimum(first_row + BLOCK_M, len_q) - 1
    lo, full_lo, full_hi, hi = key_ranges(first_row, last_row, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_LEFT:
        acc, row_max, row_sum = _walk(
            acc, row_max, row_sum, q, k_ptr, v_ptr, k_tile, v_tile, k_stride_s, v_stride_s,
            lo, tl.minimum(full_lo, hi), rows, len_k, shift, left, right, scale, softcap,
            WIDTH, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, True,
        )  # fmt: skip
    acc, row_max, row_sum = _walk(
        acc, row_max, row_sum, q, k_ptr, v_ptr, k_tile, v_tile, k_stride_s, v_stride_s,
        full_lo, full_hi, rows, len_k, shift, left, right, scale, softcap,
        WIDTH, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, False,
    )  # fmt: skip
    acc, row_max, row_sum = _walk(
        acc, row_max, row_sum, q, k_ptr, v_ptr, k_tile, v_tile, k_stride_s, v_stride_s,
        full_hi, hi, rows, len_k, shift, left, right, scale, softcap,
        WIDTH, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, True,
    )  # fmt: skip

    # Rows that see nothing: output 0, log-sum-exp -inf.
    empty = row_sum == 0.0
    acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
    lse = tl.where(empty, -float("inf"), (row_max + tl.log2(tl.where(empty, 1.0, row_sum))) * LN2)
    out_ptr += sequence * out_stride_b + head * out_stride_h + first_q * out_stride_s
    out_tile = long_rows * out_stride_s + tile_columns * out_stride_d
    store_rows(out_ptr + out_tile, acc, rows, len_q, columns, WIDTH)
    lse_ptr += sequence * lse_stride_b + head * lse_stride_h + first_q
    tl.store(lse_ptr + rows, lse, mask=rows < len_q)
