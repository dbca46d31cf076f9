"""The two backward kernels: one sums over keys for dq, the other over queries for dk and dv.

Each program alone writes what it owns, in an order that never changes: no atomics, so results are the same bit by bit
on every run. The price is that scores and their gradients are computed twice, 7 products instead of 5. The query heads
that share a key head are summed in the program that owns the key head.

With P = exp(S - lse):  dV = P^T dO,  dP = dO V^T,  dS = P * (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q,  where
delta = rowsum(O * dO) - dlse. Under a softcap dS is multiplied by 1 - tanh^2.
"""
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from ..launch import tl, triton
from ._tiles import LOG2E, key_ranges, load_rows, span, store_rows, tanh, tile_indices, tile_of, visible


@triton.jit
def _load_lse2(lse_ptr, rows, len_q, MASKED: tl.constexpr):
    """Load log-sum-exps in base 2, infinite where a row saw nothing or is none: its probabilities become 0."""
    if MASKED:
        lse = tl.load(lse_ptr + rows, mask=rows < len_q, other=-float("inf"))
    else:
        lse = tl.load(lse_ptr + rows)
    return tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)


@triton.jit
def _walk_keys(
    dq,
    q,
    grad,
    lse2,
    delta,
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
        v = load_rows(v_ptr + first * v_stride + v_tile, keys, len_k, columns, WIDTH, BLOCK_D, MASKED)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        factor = scale * LOG2E
        if HAS_SOFTCAP:
            score = tanh(score * (scale / softcap))
            factor = softcap * LOG2E
        exponent = score * factor - lse2[:, None]
        if MASKED:
            mask = visible(rows[:, None], keys[None, :], len_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
            exponent = tl.where(mask, exponent, -float("inf"))
        probability = tl.exp2(exponent)
        grad_score = probability * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if HAS_SOFTCAP:
            grad_score *= 1.0 - score * score
        dq = tl.dot(grad_score.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_ptr,
    lse_ptr,
    grad_lse_ptr,
    delta_ptr,
    dq_ptr,
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
    grad_stride_b,
    grad_stride_h,
    grad_stride_s,
    grad_stride_d,
    dq_stride_b,
    dq_stride_h,
    dq_stride_s,
    dq_stride_d,
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
    HAS_GRAD_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    LONG: tl.constexpr,
):
    num_blocks = tl.cdiv(max_q, BLOCK_M)
    block, index = tile_of(num_blocks, batch * num_heads, heads_per_section)
    sequence = index // num_heads
    head = index % num_heads
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
    out_ptr += sequence * out_stride_b + head * out_stride_h + first_q * out_stride_s
    grad_ptr += sequence * grad_stride_b + head * grad_stride_h + first_q * grad_stride_s
    k_tile = tile_rows * k_stride_s + tile_columns * k_stride_d
    v_tile = tile_rows * v_stride_s + tile_columns * v_stride_d
    q_tile = long_rows * q_stride_s + tile_columns * q_stride_d
    out_tile = long_rows * out_stride_s + tile_columns * out_stride_d
    grad_tile = long_rows * grad_stride_s + tile_columns * grad_stride_d
    lse_offset = sequence * lse_stride_b + head * lse_stride_h + first_q

    # delta is made here, where the rows of the output are read anyway, and left for the other kernel.
    grad = load_rows(grad_ptr + grad_tile, rows, len_q, columns, WIDTH, BLOCK_D, True)
    out = load_rows(out_ptr + out_tile, rows, len_q, columns, WIDTH, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + lse_offset + rows, mask=rows < len_q, other=0.0)
    tl.store(delta_ptr + lse_offset + rows, delta, mask=rows < len_q)
    q = load_rows(q_ptr + q_tile, rows, len_q, columns, WIDTH, BLOCK_D, True)
    lse2 = _load_lse2(lse_ptr + lse_offset, rows, len_q, True)

    last_row = tl.minimum(first_row + BLOCK_M, len_q) - 1
    lo, full_lo, full_hi, hi = key_ranges(first_row, last_row, len_k, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if HAS_LEFT:
        dq = _walk_keys(
            dq, q, grad, lse2, delta, k_ptr, v_ptr, k_tile, v_tile, k_stride_s, v_stride_s,
            lo, tl.minimum(full_lo, hi), rows, len_k, shift, left, right, scale, softcap,
            WIDTH, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, True,
        )  # fmt: skip
    dq = _walk_keys(
        dq, q, grad, lse2, delta, k_ptr, v_ptr, k_tile, v_tile, k_stride_s, v_stride_s,
        full_lo, full_hi, rows, len_k, shift, left, right, scale, softcap,
        WIDTH, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, False,
    )  # fmt: skip
    dq = _walk_keys(
        dq, q, grad, lse2, delta, k_ptr, v_ptr, k_tile, v_tile, k_stride_s, v_stride_s,
        full_hi, hi, rows, len_k, shift, left, right, scale, softcap,
        WIDTH, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, True,
    )  # fmt: skip
    dq_ptr += sequence * dq_stride_b + head * dq_stride_h + first_q * dq_stride_s
    store_rows(dq_ptr + long_rows * dq_stride_s + tile_columns * dq_stride_d, dq * scale, rows, len_q, columns, WIDTH)


@triton.jit
def _walk_queries(
    dk,
    dv,
    k,
    v,
    q_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    q_tile,
    grad_tile,
    q_stride,
    grad_stride,
    lo,
    hi,
    gap_at,
    gap,
    keys,
    len_q,
    len_k,
    shift,
    left,
    right,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)
    for step in range(lo, hi, BLOCK_M):
        start = step
        if MASKED:
            # One loop for the tiles in front of those seen in full and behind them: two would cost registers.
            start = step + tl.where(step >= gap_at, gap, 0)
        first = tl.cast(start, tl.int64)
        rows = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr + first * q_stride + q_tile, rows, len_q, columns, WIDTH, BLOCK_D, MASKED)
        grad = load_rows(grad_ptr + first * grad_stride + grad_tile, rows, len_q, columns, WIDTH, BLOCK_D, MASKED)
        lse2 = _load_lse2(lse_ptr, rows, len_q, MASKED)
        if MASKED:
            delta = tl.load(delta_ptr + rows, mask=rows < len_q, other=0.0)
        else:
            delta = tl.load(delta_ptr + rows)
        # Keys by queries: what is multiplied next needs no transposition.
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        factor = scale * LOG2E
        if HAS_SOFTCAP:
            score = tanh(score * (scale / softcap))
            factor = softcap * LOG2E
        exponent = score * factor - lse2[None, :]
        if MASKED:
            mask = visible(rows[None, :], keys[:, None], len_k, shift, left, right, HAS_LEFT, HAS_RIGHT)
            exponent = tl.where(mask, exponent, -float("inf"))
        probability = tl.exp2(exponent)
        dv = tl.dot(probability.to(grad.dtype), grad, dv, input_precision=PRECISION)
        grad_score = probability * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        if HAS_SOFTCAP:
            grad_score *= 1.0 - score * score
        dk = tl.dot(grad_score.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
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
    grad_stride_b,
    grad_stride_h,
    grad_stride_s,
    grad_stride_d,
    dk_stride_b,
    dk_stride_h,
    dk_stride_s,
    dk_stride_d,
    dv_stride_b,
    dv_stride_h,
    dv_stride_s,
    dv_stride_d,
    lse_stride_b,
    lse_stride_h,
    part_stride,
    batch,
    num_kv_heads,
    group,
    heads_per_part,
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
    # Under a causal mask the first keys are seen by the most queries: they start first.
    block, index = tile_of(tl.cdiv(max_k, BLOCK_N), batch * num_kv_heads * (group // heads_per_part), heads_per_section)
    first_key = block * BLOCK_N
    num_parts = group // heads_per_part
    part = index % num_parts
    kv_head = index // num_parts % num_kv_heads
    sequence = index // num_parts // num_kv_heads
    first_q, len_q = span(cu_q_ptr, sequence, max_q, PACKED)
    first_k, len_k = span(cu_k_ptr, sequence, max_k, PACKED)
    if first_key >= len_k:
        return
    shift = 0
    if BOTTOM_RIGHT:
        shift = len_k - len_q
    first_head = kv_head * group + part * heads_per_part
    kv_head = tl.cast(kv_head, tl.int64)
    sequence = tl.cast(sequence, tl.int64)
    first_q = tl.cast(first_q, tl.int64)
    first_k = tl.cast(first_k, tl.int64)
    keys = first_key + tl.arange(0, BLOCK_N)
    long_keys = keys.to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_D)
    tile_rows, tile_columns = tile_indices(BLOCK_M, BLOCK_D, LONG)

    k_ptr += sequence * k_stride_b + kv_head * k_stride_h + first_k * k_stride_s
    v_ptr += sequence * v_stride_b + kv_head * v_stride_h + first_k * v_stride_s
    k_tile = long_keys * k_stride_s + tile_columns * k_stride_d
    v_tile = long_keys * v_stride_s + tile_columns * v_stride_d
    q_tile = tile_rows * q_stride_s + tile_columns * q_stride_d
    grad_tile = tile_rows * grad_stride_s + tile_columns * grad_stride_d
    k = load_rows(k_ptr + k_tile, keys, len_k, columns, WIDTH, BLOCK_D, True)
    v = load_rows(v_ptr + v_tile, keys, len_k, columns, WIDTH, BLOCK_D, True)

    # Query i sees keys i + shift - left .. i + shift + right, so key j is seen by queries j - shift - right ..
    # j - shift + left: the same ranges with the two sides exchanged. Keys past the end need no mask: each fills a row
    # of dk and dv that is not stored.
    lo, full_lo, full_hi, hi = key_ranges(
        first_key, first_key + BLOCK_N - 1, len_q, -shift, right, left, HAS_RIGHT, HAS_LEFT, BLOCK_M
    )
    # The end of the masked tiles, were there no gap between them.
    cut_hi = tl.maximum(hi - (full_hi - full_lo), tl.minimum(full_lo, hi))
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for step in range(heads_per_part):
        head = tl.cast(first_head + step, tl.int64)
        head_q_ptr = q_ptr + sequence * q_stride_b + head * q_stride_h + first_q * q_stride_s
        head_grad_ptr = grad_ptr + sequence * grad_stride_b + head * grad_stride_h + first_q * grad_stride_s
        lse_offset = sequence * lse_stride_b + head * lse_stride_h + first_q
        head_lse_ptr = lse_ptr + lse_offset
        head_delta_ptr = delta_ptr + lse_offset
        dk, dv = _walk_queries(
            dk, dv, k, v, head_q_ptr, head_grad_ptr, head_lse_ptr, head_delta_ptr, q_tile, grad_tile,
            q_stride_s, grad_stride_s, lo, cut_hi, full_lo, full_hi - full_lo, keys, len_q, len_k, shift, left, right,
            scale, softcap, WIDTH, BLOCK_D, BLOCK_M, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, True,
        )  # fmt: skip
        dk, dv = _walk_queries(
            dk, dv, k, v, head_q_ptr, head_grad_ptr, head_lse_ptr, head_delta_ptr, q_tile, grad_tile,
            q_stride_s, grad_stride_s, full_lo, full_hi, 0, 0, keys, len_q, len_k, shift, left, right,
            scale, softcap, WIDTH, BLOCK_D, BLOCK_M, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, PRECISION, False,
        )  # fmt: skip
    part_offset = tl.cast(part, tl.int64) * part_stride
    dk_ptr += part_offset + sequence * dk_stride_b + kv_head * dk_stride_h + first_k * dk_stride_s
    dv_ptr += part_offset + sequence * dv_stride_b + kv_head * dv_stride_h + first_k * dv_stride_s
    dk_tile = long_keys * dk_stride_s + tile_columns * dk_stride_d
    dv_tile = long_keys * dv_stride_s + tile_columns * dv_stride_d
    store_rows(dk_ptr + dk_tile, dk * scale, keys, len_k, columns, WIDTH)
    store_rows(dv_ptr + dv_tile, dv, keys, len_k, columns, WIDTH)
