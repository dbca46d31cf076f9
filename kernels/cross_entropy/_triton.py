"""The kernels: a pass over the logits for their log-sum-exp, and one that turns logits into their gradient.

Names:  N = rows, V = vocabulary, D = features; a tile is [BLOCK_N, BLOCK_V], its dot product runs over BLOCK_D.
        What a row needs of its logits besides lse (its target's logit, the sum of all) is gathered in the same pass.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from ..launch import tl, triton


@triton.jit
def _capped(logits, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return ``softcap * tanh(logits / softcap)``; tanh(a) = 2 sigmoid(2 a) - 1."""
    if HAS_SOFTCAP:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    return logits


@triton.jit
def _gradient(z_NV, col_V, vocab, lse_N, target_N, dloss_N, smoothing, z_loss, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return the gradient of the logits whose capped values are ``z_NV``."""
    p_NV = tl.exp(z_NV - lse_N[:, None]) * (1.0 + 2.0 * z_loss * lse_N)[:, None]
    dz_NV = p_NV - tl.where(col_V[None, :] == target_N[:, None], 1.0 - smoothing, 0.0) - smoothing / vocab
    if HAS_SOFTCAP:
        ratio_NV = z_NV / softcap
        dz_NV = dz_NV * (1.0 - ratio_NV * ratio_NV)
    return dz_NV * dloss_N[:, None]


@triton.jit
def _join(max_N, sum_N, z_NV, valid_NV):
    """Add a tile's exponentials to a running ``sum exp(z - max)``."""
    new_N = tl.maximum(max_N, tl.max(tl.where(valid_NV, z_NV, float("-inf")), axis=1))
    # A row of -inf so far has no finite maximum to subtract.
    safe_N = tl.where(new_N == float("-inf"), 0.0, new_N)
    tile_N = tl.sum(tl.where(valid_NV, tl.exp(z_NV - safe_N[:, None]), 0.0), axis=1)
    return new_N, sum_N * tl.exp(max_N - safe_N) + tile_N


@triton.jit
def _product(
    x_ptr,
    w_ptr,
    row_N,
    col_V,
    num_rows,
    end,
    num_features,
    x_stride,
    w_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the logits of some rows and columns in fp32; those behind the ends repeat the last ones."""
    acc_NV = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    dim_D = tl.arange(0, BLOCK_D)
    # Clamped instead of masked: no predicates in the inner loop, and what repeats is masked behind it.
    x_ND = x_ptr + tl.minimum(row_N, num_rows - 1).to(tl.int64)[:, None] * x_stride + dim_D[None, :]
    w_VD = w_ptr + tl.minimum(col_V, end - 1).to(tl.int64)[:, None] * w_stride + dim_D[None, :]
    for first in range(0, num_features, BLOCK_D):
        if EVEN_D:
            x_tile = tl.load(x_ND)
            w_tile = tl.load(w_VD)
        else:
            inside = (first + dim_D < num_features)[None, :]
            x_tile = tl.load(x_ND, mask=inside, other=0.0)
            w_tile = tl.load(w_VD, mask=inside, other=0.0)
        acc_NV = tl.dot(x_tile, tl.trans(w_tile), acc_NV, input_precision=PRECISION)
        x_ND += BLOCK_D
        w_VD += BLOCK_D
    return acc_NV


@triton.jit
def _grouped(program, num_row_blocks, num_others, GROUP: tl.constexpr):
    """Return (row block, other): GROUP row blocks take turns for each other, so that both stay in the L2 cache."""
    per_group = GROUP * num_others
    first = (program // per_group) * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    return first + (program % per_group) % size, (program % per_group) // size


@triton.jit
def linear_lse_kernel(
    x_ptr,
    w_ptr,
    targets_ptr,
    max_ptr,
    sum_ptr,
    z_target_ptr,
    z_sum_ptr,
    num_rows,
    vocab,
    num_features,
    x_stride,
    w_stride,
    share,
    num_shares,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program walks over one share of the vocabulary with its rows; `lse_join_kernel` puts the shares together.
    block, part = _grouped(tl.program_id(0), tl.cdiv(num_rows, BLOCK_N), num_shares, GROUP)
    row_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    target_N = tl.load(targets_ptr + row_N, mask=row_N < num_rows, other=-1)
    max_N = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    sum_N = tl.zeros((BLOCK_N,), dtype=tl.float32)
    z_target_N = tl.zeros((BLOCK_N,), dtype=tl.float32)
    z_sum_N = tl.zeros((BLOCK_N,), dtype=tl.float32)
    end = tl.minimum((part + 1) * share, vocab)
    for first in range(part * share, end, BLOCK_V):
        col_V = first + tl.arange(0, BLOCK_V)
        z_NV = _product(
            x_ptr, w_ptr, row_N, col_V, num_rows, end, num_features, x_stride, w_stride,
            BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, PRECISION,
        )  # fmt: skip
        z_NV = _capped(z_NV, softcap, HAS_SOFTCAP)
        valid_NV = (col_V < end)[None, :]
        max_N, sum_N = _join(max_N, sum_N, z_NV, valid_NV)
        # The last tile reaches into the next share, which counts its own targets.
        own_V = tl.where(col_V < end, col_V, -1)
        z_target_N += tl.sum(tl.where(own_V[None, :] == target_N[:, None], z_NV, 0.0), axis=1)
        if HAS_SMOOTHING:
            z_sum_N += tl.sum(tl.where(valid_NV, z_NV, 0.0), axis=1)
    out_N = row_N.to(tl.int64) * num_shares + part
    tl.store(max_ptr + out_N, max_N, mask=row_N < num_rows)
    tl.store(sum_ptr + out_N, sum_N, mask=row_N < num_rows)
    tl.store(z_target_ptr + out_N, z_target_N, mask=row_N < num_rows)
    if HAS_SMOOTHING:
        tl.store(z_sum_ptr + out_N, z_sum_N, mask=row_N < num_rows)


@triton.jit
def _row_loss(lse_N, z_target_N, z_sum_N, target_N, vocab, ignore_index, smoothing, z_loss):
    loss_N = lse_N - (1.0 - smoothing) * z_target_N - smoothing * z_sum_N / vocab + z_loss * lse_N * lse_N
    # No kernel can raise: a target outside of the vocabulary gives a loss that nobody overlooks.
    loss_N = tl.where((target_N >= 0) & (target_N < vocab), loss_N, float("nan"))
    return tl.where(target_N == ignore_index, 0.0, loss_N)


@triton.jit
def lse_join_kernel(
    max_ptr,
    sum_ptr,
    z_target_ptr,
    z_sum_ptr,
    targets_ptr,
    loss_ptr,
    lse_ptr,
    num_rows,
    vocab,
    num_shares,
    ignore_index,
    smoothing,
    z_loss,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr,
):
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part_S = tl.arange(0, SHARES)
    mask_NS = (row_N < num_rows)[:, None] & (part_S < num_shares)[None, :]
    in_NS = row_N.to(tl.int64)[:, None] * num_shares + part_S[None, :]
    max_NS = tl.load(max_ptr + in_NS, mask=mask_NS, other=float("-inf"))
    max_N = tl.max(max_NS, axis=1)
    safe_N = tl.where(max_N == float("-inf"), 0.0, max_N)
    sum_NS = tl.load(sum_ptr + in_NS, mask=mask_NS, other=0.0)
    sum_N = tl.sum(sum_NS * tl.exp(max_NS - safe_N[:, None]), axis=1)
    # Rows behind the last one have no logits: log(1), not log(0).
    lse_N = safe_N + tl.log(tl.where(row_N < num_rows, sum_N, 1.0))
    z_target_N = tl.sum(tl.load(z_target_ptr + in_NS, mask=mask_NS, other=0.0), axis=1)
    z_sum_N = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_SMOOTHING:
        z_sum_N = tl.sum(tl.load(z_sum_ptr + in_NS, mask=mask_NS, other=0.0), axis=1)
    target_N = tl.load(targets_ptr + row_N, mask=row_N < num_rows, other=-1)
    loss_N = _row_loss(lse_N, z_target_N, z_sum_N, target_N, vocab, ignore_index, smoothing, z_loss)
    tl.store(loss_ptr + row_N, loss_N, mask=row_N < num_rows)
    tl.store(lse_ptr + row_N, lse_N, mask=row_N < num_rows)


@triton.jit
def linear_gradient_kernel(
    x_ptr,
    w_ptr,
    targets_ptr,
    lse_ptr,
    dloss_ptr,
    out_ptr,
    num_rows,
    vocab,
    num_features,
    x_stride,
    w_stride,
    dloss_stride,
    first_col,
    end,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The logits of columns first_col to end, once more, turned into their gradient before they leave the registers.
    num_cols = end - first_col
    block, part = _grouped(tl.program_id(0), tl.cdiv(num_rows, BLOCK_N), tl.cdiv(num_cols, BLOCK_V), GROUP)
    row_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    col_V = first_col + part * BLOCK_V + tl.arange(0, BLOCK_V)
    z_NV = _product(
        x_ptr, w_ptr, row_N, col_V, num_rows, end, num_features, x_stride, w_stride,
        BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, PRECISION,
    )  # fmt: skip
    z_NV = _capped(z_NV, softcap, HAS_SOFTCAP)
    known_N = tl.minimum(row_N, num_rows - 1)
    target_N = tl.load(targets_ptr + known_N)
    lse_N = tl.load(lse_ptr + known_N)
    dloss_N = tl.load(dloss_ptr + known_N.to(tl.int64) * dloss_stride)
    dz_NV = _gradient(z_NV, col_V, vocab, lse_N, target_N, dloss_N, smoothing, z_loss, softcap, HAS_SOFTCAP)
    # Not by multiplying: an ignored row may hold infinities.
    dz_NV = tl.where((target_N == ignore_index)[:, None], 0.0, dz_NV)
    out_NV = row_N.to(tl.int64)[:, None] * num_cols + (col_V - first_col)[None, :]
    mask_NV = (row_N < num_rows)[:, None] & (col_V < end)[None, :]
    tl.store(out_ptr + out_NV, dz_NV.to(out_ptr.dtype.element_ty), mask=mask_NV)


@triton.jit
def loss_kernel(
    logits_ptr,
    targets_ptr,
    loss_ptr,
    lse_ptr,
    vocab,
    stride,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # One row a program; [1, BLOCK_V] tiles, so that it shares the two-dimensional steps.
    row_N = tl.program_id(0) + tl.arange(0, 1)
    row_ptr = logits_ptr + row_N.to(tl.int64)[:, None] * stride
    target_N = tl.load(targets_ptr + row_N)
    max_N = tl.full((1,), float("-inf"), dtype=tl.float32)
    sum_N = tl.zeros((1,), dtype=tl.float32)
    z_target_N = tl.zeros((1,), dtype=tl.float32)
    z_sum_N = tl.zeros((1,), dtype=tl.float32)
    for first in range(0, vocab, BLOCK_V):
        col_V = first + tl.arange(0, BLOCK_V)
        valid_NV = (col_V < vocab)[None, :]
        z_NV = tl.load(row_ptr + col_V[None, :], mask=valid_NV, other=0.0).to(tl.float32)
        z_NV = _capped(z_NV, softcap, HAS_SOFTCAP)
        max_N, sum_N = _join(max_N, sum_N, z_NV, valid_NV)
        z_target_N += tl.sum(tl.where(col_V[None, :] == target_N[:, None], z_NV, 0.0), axis=1)
        z_sum_N += tl.sum(tl.where(valid_NV, z_NV, 0.0), axis=1)
    lse_N = max_N + tl.log(sum_N)
    # Without smoothing a row may hold -inf, which 0 times would make NaN.
    z_sum_N = tl.where(smoothing == 0.0, 0.0, z_sum_N)
    loss_N = _row_loss(lse_N, z_target_N, z_sum_N, target_N, vocab, ignore_index, smoothing, z_loss)
    tl.store(loss_ptr + row_N, loss_N)
    tl.store(lse_ptr + row_N, lse_N)


@triton.jit
def gradient_kernel(
    logits_ptr,
    targets_ptr,
    lse_ptr,
    dloss_ptr,
    out_ptr,
    vocab,
    stride,
    dloss_stride,
    blocks_per_row,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    program = tl.program_id(0)
    row_N = program // blocks_per_row + tl.arange(0, 1)
    col_V = program % blocks_per_row * BLOCK_V + tl.arange(0, BLOCK_V)
    valid_NV = (col_V < vocab)[None, :]
    wide_N = row_N.to(tl.int64)
    z_NV = tl.load(logits_ptr + wide_N[:, None] * stride + col_V[None, :], mask=valid_NV, other=0.0).to(tl.float32)
    z_NV = _capped(z_NV, softcap, HAS_SOFTCAP)
    target_N = tl.load(targets_ptr + row_N)
    lse_N = tl.load(lse_ptr + row_N)
    dloss_N = tl.load(dloss_ptr + wide_N * dloss_stride)
    dz_NV = _gradient(z_NV, col_V, vocab, lse_N, target_N, dloss_N, smoothing, z_loss, softcap, HAS_SOFTCAP)
    dz_NV = tl.where((target_N == ignore_index)[:, None], 0.0, dz_NV)
    out_NV = wide_N[:, None] * vocab + col_V[None, :]
    tl.store(out_ptr + out_NV, dz_NV.to(out_ptr.dtype.element_ty), mask=valid_NV)
