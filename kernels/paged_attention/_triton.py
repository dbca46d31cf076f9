"""The kernels: attention of a block of new tokens over pages, cut into splits, and the merge of the splits.

The query heads of a group and up to BLOCK_Q tokens are packed into the BLOCK_M rows of a tile, so that each key is
read once per group. The tile of keys has nothing to do with the page: every row looks its page up.

A program is (block of tokens, key head, split). A sequence whose new tokens fit into one block, as they do in decode,
is cut into NUM_SPLITS stretches of keys, each leaving its normalised output and log-sum-exp in fp32; a longer one
(prefill) has programs enough and is walked whole by split 0. How many programs there are depends on shapes only, never
on the lengths, so a CUDA graph can replay the launch.
"""
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from ..attention._tiles import LOG2E, key_ranges, tanh, visible
from ..launch import tl, triton


@triton.jit
def _sequence_of(starts_ptr, block, num_sequences, BLOCK_Q: tl.constexpr):
    """Return the last sequence whose blocks begin at or before ``block``.

    Sequence s begins at block starts[s] // BLOCK_Q + s: each may waste a part of one block, so no list of blocks has
    to be made on the host.
    """
    low = 0
    high = num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(starts_ptr + middle) // BLOCK_Q + middle
        if begins <= block:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _split_range(len_q, len_k, left, split, HAS_LEFT: tl.constexpr, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """Return (first key, end) of one split of a sequence that has one block; empty where begin >= end."""
    begin = 0
    if HAS_LEFT:
        begin = tl.maximum(len_k - len_q - left, 0) // BLOCK_N * BLOCK_N
    per_split = tl.cdiv(tl.cdiv(tl.maximum(len_k - begin, 0), BLOCK_N), NUM_SPLITS) * BLOCK_N
    begin += split * per_split
    return begin, tl.minimum(begin + per_split, len_k)


@triton.jit
def _walk_pages(
    acc,
    row_max,
    row_sum,
    q,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    k_stride_p,
    k_stride_s,
    k_stride_d,
    v_stride_p,
    v_stride_s,
    v_stride_d,
    k_scale_stride_p,
    k_scale_stride_s,
    v_scale_stride_p,
    v_scale_stride_s,
    lo,
    hi,
    positions,
    len_k,
    left,
    scale,
    softcap,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)[None, :]
    for start in range(lo, hi, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        slot = keys % PAGE
        if MASKED:
            # Entries of the table past the last page may be anything.
            page = tl.load(table_ptr + keys // PAGE, mask=keys < len_k, other=0).to(tl.int64)
            inside = (keys < len_k)[:, None] & (columns < WIDTH)
        else:
            page = tl.load(table_ptr + keys // PAGE).to(tl.int64)
            inside = columns < WIDTH
        k_rows = (page * k_stride_p + slot * k_stride_s)[:, None]
        v_rows = (page * v_stride_p + slot * v_stride_s)[:, None]
        if MASKED or WIDTH != BLOCK_D:
            k = tl.load(k_ptr + k_rows + columns * k_stride_d, mask=inside, other=0.0)
            v = tl.load(v_ptr + v_rows + columns * v_stride_d, mask=inside, other=0.0)
        else:
            k = tl.load(k_ptr + k_rows + columns * k_stride_d)
            v = tl.load(v_ptr + v_rows + columns * v_stride_d)
        score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale
        if HAS_SCALES:
            # Scales belong to keys and values as wholes, so they act on scores and probabilities instead.
            if MASKED:
                seen = keys < len_k
                k_scale = tl.load(k_scale_ptr + page * k_scale_stride_p + slot * k_scale_stride_s, mask=seen, other=0.0)
                v_scale = tl.load(v_scale_ptr + page * v_scale_stride_p + slot * v_scale_stride_s, mask=seen, other=0.0)
            else:
                k_scale = tl.load(k_scale_ptr + page * k_scale_stride_p + slot * k_scale_stride_s)
                v_scale = tl.load(v_scale_ptr + page * v_scale_stride_p + slot * v_scale_stride_s)
            score *= k_scale[None, :]
        if HAS_SOFTCAP:
            score = tanh(score / softcap) * softcap
        if MASKED:
            mask = visible(positions[:, None], keys[None, :], len_k, 0, left, 0, HAS_LEFT, True)
            score = tl.where(mask, score, -float("inf"))
        score *= LOG2E
        new_max = tl.maximum(row_max, tl.max(score, 1))
        base = new_max
        if MASKED:
            base = tl.where(new_max == -float("inf"), 0.0, new_max)
        probability = tl.exp2(score - base[:, None])
        decay = tl.exp2(row_max - base)
        row_sum = row_sum * decay + tl.sum(probability, 1)
        row_max = new_max
        if HAS_SCALES:
            probability *= v_scale[None, :]
        acc = tl.dot(probability.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _paged_kernel(  # noqa: PLR0915  a kernel is one piece
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    lens_ptr,
    starts_ptr,
    out_ptr,
    part_ptr,
    part_lse_ptr,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    k_stride_p,
    k_stride_s,
    k_stride_h,
    k_stride_d,
    v_stride_p,
    v_stride_s,
    v_stride_h,
    v_stride_d,
    k_scale_stride_p,
    k_scale_stride_s,
    k_scale_stride_h,
    v_scale_stride_p,
    v_scale_stride_s,
    v_scale_stride_h,
    table_stride,
    out_stride_t,
    out_stride_h,
    out_stride_d,
    num_sequences,
    left,
    scale,
    softcap,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    DECODE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    if DECODE:
        sequence = block
        first_q = block
        len_q = 1
        first_row = 0
    else:
        sequence = _sequence_of(starts_ptr, block, num_sequences, BLOCK_Q)
        first_q = tl.load(starts_ptr + sequence)
        len_q = tl.load(starts_ptr + sequence + 1) - first_q
        first_row = (block - (first_q // BLOCK_Q + sequence)) * BLOCK_Q
        if first_row >= len_q:
            return
    len_k = tl.load(lens_ptr + sequence)
    is_split = (NUM_SPLITS > 1) & (len_q <= BLOCK_Q)
    if (split > 0) & (len_q > BLOCK_Q):
        return
    begin = 0
    end = len_k
    if is_split:
        begin, end = _split_range(len_q, len_k, left, split, HAS_LEFT, BLOCK_N, NUM_SPLITS)
        if (begin >= end) & (split > 0):
            return

    # Row r of the tile is head r % GROUP of the group for token r // GROUP of the block.
    lane = tl.arange(0, BLOCK_M)
    rows = first_row + lane // GROUP
    is_row = (lane < BLOCK_Q * GROUP) & (rows < len_q)
    heads = kv_head * GROUP + lane % GROUP
    tokens = (first_q + rows).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = is_row[:, None] & (columns < WIDTH)[None, :]
    q_rows = (tokens * q_stride_t + heads * q_stride_h)[:, None]
    q = tl.load(q_ptr + q_rows + columns[None, :] * q_stride_d, mask=inside, other=0.0)
    k_ptr += kv_head * k_stride_h
    v_ptr += kv_head * v_stride_h
    if HAS_SCALES:
        k_scale_ptr += kv_head * k_scale_stride_h
        v_scale_ptr += kv_head * v_scale_stride_h
    table_ptr += tl.cast(sequence, tl.int64) * table_stride

    shift = len_k - len_q
    last_row = tl.minimum(first_row + BLOCK_Q, len_q) - 1
    lo, full_lo, full_hi, hi = key_ranges(first_row, last_row, len_k, shift, left, 0, HAS_LEFT, True, BLOCK_N)
    positions = rows + shift
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_LEFT:
        acc, row_max, row_sum = _walk_pages(
            acc, row_max, row_sum, q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr,
            k_stride_p, k_stride_s, k_stride_d, v_stride_p, v_stride_s, v_stride_d,
            k_scale_stride_p, k_scale_stride_s, v_scale_stride_p, v_scale_stride_s,
            tl.maximum(lo, begin), tl.minimum(tl.minimum(full_lo, hi), end), positions, len_k, left, scale, softcap,
            PAGE, WIDTH, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_SOFTCAP, HAS_SCALES, PRECISION, True,
        )  # fmt: skip
    acc, row_max, row_sum = _walk_pages(
        acc, row_max, row_sum, q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr,
        k_stride_p, k_stride_s, k_stride_d, v_stride_p, v_stride_s, v_stride_d,
        k_scale_stride_p, k_scale_stride_s, v_scale_stride_p, v_scale_stride_s,
        tl.maximum(full_lo, begin), tl.minimum(full_hi, end), positions, len_k, left, scale, softcap,
        PAGE, WIDTH, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_SOFTCAP, HAS_SCALES, PRECISION, False,
    )  # fmt: skip
    acc, row_max, row_sum = _walk_pages(
        acc, row_max, row_sum, q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr,
        k_stride_p, k_stride_s, k_stride_d, v_stride_p, v_stride_s, v_stride_d,
        k_scale_stride_p, k_scale_stride_s, v_scale_stride_p, v_scale_stride_s,
        tl.maximum(full_hi, begin), tl.minimum(hi, end), positions, len_k, left, scale, softcap,
        PAGE, WIDTH, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_SOFTCAP, HAS_SCALES, PRECISION, True,
    )  # fmt: skip

    empty = row_sum == 0.0
    acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
    if is_split:
        lse2 = tl.where(empty, -float("inf"), row_max + tl.log2(tl.where(empty, 1.0, row_sum)))
        # [sequence, key head, row, split]: the merge reads the splits of a row side by side.
        part = ((tl.cast(sequence, tl.int64) * tl.num_programs(1) + kv_head) * BLOCK_M + lane) * NUM_SPLITS + split
        tl.store(part_lse_ptr + part, lse2, mask=is_row)
        tl.store(part_ptr + part[:, None] * WIDTH + columns[None, :], acc, mask=inside)
    else:
        out_rows = (tokens * out_stride_t + heads * out_stride_h)[:, None]
        out_ptrs = out_ptr + out_rows + columns[None, :] * out_stride_d
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _merge_kernel(
    part_ptr,
    part_lse_ptr,
    lens_ptr,
    starts_ptr,
    out_ptr,
    out_stride_t,
    out_stride_h,
    out_stride_d,
    left,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DECODE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
):
    """One program per (sequence, head, token of the block) takes all of a row's splits at once."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2)
    if DECODE:
        first_q = sequence
        len_q = 1
    else:
        first_q = tl.load(starts_ptr + sequence).to(tl.int64)
        len_q = (tl.load(starts_ptr + sequence + 1) - first_q).to(tl.int32)
        if (row >= len_q) | (len_q > BLOCK_Q):
            return
    len_k = tl.load(lens_ptr + sequence)
    splits = tl.arange(0, BLOCK_S)
    begin, end = _split_range(len_q, len_k, left, splits, HAS_LEFT, BLOCK_N, NUM_SPLITS)
    # Split 0 is written even where it is empty.
    written = (splits < NUM_SPLITS) & ((begin < end) | (splits == 0))
    num_kv_heads = tl.num_programs(1) // GROUP
    lane = (sequence * num_kv_heads + head // GROUP) * BLOCK_M + row * GROUP + head % GROUP
    lse2 = tl.load(part_lse_ptr + lane * NUM_SPLITS + splits, mask=written, other=-float("inf"))
    columns = tl.arange(0, BLOCK_D)
    pointers = part_ptr + (lane * NUM_SPLITS + splits)[:, None] * WIDTH + columns[None, :]
    parts = tl.load(pointers, mask=written[:, None] & (columns < WIDTH)[None, :], other=0.0)
    top = tl.max(lse2, 0)
    weight = tl.exp2(lse2 - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weight, 0)
    out = tl.sum(parts * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    out_ptr += (first_q + row) * out_stride_t + head * out_stride_h
    tl.store(out_ptr + columns * out_stride_d, out.to(out_ptr.dtype.element_ty), mask=columns < WIDTH)
