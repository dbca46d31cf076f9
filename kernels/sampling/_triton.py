"""The kernel: passes over a row of logits, by which a threshold is found and a token drawn."""

# pyright: reportArgumentType=false

from __future__ import annotations

from ..launch import tl, triton


@triton.jit
def _load_gaps(logits_ptr, row_R, col_V, mask_RV, stride, max_R, sharpness_R):
    z_RV = tl.load(logits_ptr + row_R[:, None] * stride + col_V[None, :], mask=mask_RV, other=float("-inf"))
    return (max_R[:, None] - z_RV.to(tl.float32)) * sharpness_R[:, None]


@triton.jit
def _total(
    logits_ptr, row_R, inside_R, stride, vocab, max_R, sharpness_R, limit_R, MASS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return how many tokens have a gap up to ``limit_R`` (its bits), or their sum of exp(-gap)."""
    total_R = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, vocab, BLOCK):
        col_V = first + tl.arange(0, BLOCK)
        mask_RV = inside_R[:, None] & (col_V < vocab)[None, :]
        gap_RV = _load_gaps(logits_ptr, row_R, col_V, mask_RV, stride, max_R, sharpness_R)
        kept_RV = mask_RV & (gap_RV.to(tl.int32, bitcast=True) <= limit_R[:, None])
        if MASS:
            total_R += tl.sum(tl.where(kept_RV, tl.exp(-gap_RV), 0.0), axis=1)
        else:
            total_R += tl.sum(kept_RV.to(tl.float32), axis=1)
    return total_R


@triton.jit
def _bisect(
    logits_ptr, row_R, inside_R, stride, vocab, max_R, sharpness_R, high_R, wanted_R, MASS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the bits of the smallest gap up to which there are ``wanted_R``, which there are up to ``high_R``."""
    low_R = tl.full((ROWS,), -1, dtype=tl.int32)
    while tl.max(high_R - low_R, axis=0) > 1:
        middle_R = low_R + (high_R - low_R) // 2
        total_R = _total(
            logits_ptr, row_R, inside_R, stride, vocab, max_R, sharpness_R, middle_R, MASS, ROWS, BLOCK
        )  # fmt: skip
        # A row that is done has middle = low: it stays.
        enough_R = (total_R >= wanted_R) & (middle_R > low_R)
        high_R = tl.where(enough_R, middle_R, high_R)
        low_R = tl.where(enough_R, low_R, middle_R)
    return high_R


@triton.jit
def sampling_kernel(
    logits_ptr,
    out_ptr,
    seed_ptr,
    position_ptr,
    noise_ptr,
    sharpness_ptr,
    top_k_ptr,
    top_p_ptr,
    max_gap_ptr,
    num_rows,
    vocab,
    stride,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < num_rows
    noise_R = tl.load(noise_ptr + row_R, mask=inside_R, other=0.0)
    sharpness_R = tl.load(sharpness_ptr + row_R, mask=inside_R, other=1.0)
    seed_R = tl.load(seed_ptr + row_R, mask=inside_R, other=0)
    position_R = tl.load(position_ptr + row_R, mask=inside_R, other=0)
    max_R = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    for first in range(0, vocab, BLOCK):
        col_V = first + tl.arange(0, BLOCK)
        mask_RV = inside_R[:, None] & (col_V < vocab)[None, :]
        z_RV = tl.load(logits_ptr + row_R[:, None] * stride + col_V[None, :], mask=mask_RV, other=float("-inf"))
        max_R = tl.maximum(max_R, tl.max(z_RV.to(tl.float32), axis=1))
    # A row of nothing but -inf would have gaps of NaN; with a maximum of 0 they are infinite.
    max_R = tl.where(max_R == float("-inf"), 0.0, max_R)
    # The bits of infinity: no limit.
    limit_R = tl.full((ROWS,), 0x7F800000, dtype=tl.int32)
    if HAS_TOP_K:
        wanted_R = tl.load(top_k_ptr + row_R, mask=inside_R, other=0.0)
        limit_R = _bisect(
            logits_ptr, row_R, inside_R, stride, vocab, max_R, sharpness_R, limit_R, wanted_R, False, ROWS, BLOCK
        )  # fmt: skip
    if HAS_TOP_P:
        total_R = _total(
            logits_ptr, row_R, inside_R, stride, vocab, max_R, sharpness_R, limit_R, True, ROWS, BLOCK
        )  # fmt: skip
        wanted_R = tl.load(top_p_ptr + row_R, mask=inside_R, other=0.0) * total_R
        limit_R = _bisect(
            logits_ptr, row_R, inside_R, stride, vocab, max_R, sharpness_R, limit_R, wanted_R, True, ROWS, BLOCK
        )  # fmt: skip
    max_gap_R = tl.load(max_gap_ptr + row_R, mask=inside_R, other=0.0)
    limit_R = tl.minimum(limit_R, max_gap_R.to(tl.int32, bitcast=True))
    best_R = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    token_R = tl.full((ROWS,), -1, dtype=tl.int32)
    for first in range(0, vocab, BLOCK):
        col_V = first + tl.arange(0, BLOCK)
        mask_RV = inside_R[:, None] & (col_V < vocab)[None, :]
        gap_RV = _load_gaps(logits_ptr, row_R, col_V, mask_RV, stride, max_R, sharpness_R)
        kept_RV = mask_RV & (gap_RV.to(tl.int32, bitcast=True) <= limit_R[:, None])
        zero_RV = tl.zeros((ROWS, BLOCK), dtype=tl.uint32)
        bits_RV, _, _, _ = tl.philox(
            seed_R[:, None],
            zero_RV + col_V[None, :].to(tl.uint32),
            zero_RV + position_R[:, None].to(tl.uint32),
            zero_RV,
            zero_RV,
        )
        u_RV = tl.minimum(((bits_RV >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.99999994)
        series_RV = u_RV * (1.0 + u_RV * (0.5 + u_RV * 0.3333333333333333))
        log_e_RV = tl.log(tl.where(u_RV < 0.01, series_RV, -tl.log(1.0 - u_RV)))
        key_RV = tl.where(kept_RV, gap_RV + log_e_RV * noise_R[:, None], float("inf"))
        tile_R = tl.min(key_RV, axis=1)
        first_R = tl.min(tl.where(key_RV == tile_R[:, None], col_V[None, :], 2147483647), axis=1)
        token_R = tl.where(tile_R < best_R, first_R, token_R)
        best_R = tl.minimum(best_R, tile_R)
    tl.store(out_ptr + row_R, token_R.to(tl.int64), mask=inside_R)
