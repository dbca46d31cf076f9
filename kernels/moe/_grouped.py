"""The two persistent kernels of grouped.py: rows times their expert's matrix, and the gradient of the matrices.

Every program walks over tiles p, p + P, p + 2P ... of one list in which an expert's tiles are neighbours, and within an
expert GROUP row tiles share the column tiles next to each other: what runs at the same time reads the same few tiles,
from the L2 cache. The list is made of the offsets, by each program for itself: the host knows no count.

Two ways to load: pointers with masks, for any shape and stride; or, TMA, tensor descriptors made by the host, where
rows are aligned to 16 bytes and BLOCK_K divides what is summed over.
"""
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

from ..launch import tl, triton


@triton.jit
def place_in_expert(local, num_m, num_n, GROUP: tl.constexpr):
    """Return (row tile, column tile) of an expert's tile ``local``: down GROUP rows first, then one column on."""
    width = GROUP * num_n
    first = local // width * GROUP
    height = tl.minimum(num_m - first, GROUP)
    rest = local % width
    return first + rest % height, rest // height


@triton.jit
def rows_of(offsets_ptr, expert, num_experts, num_rows):
    """Return (first, end) of an expert's rows; those that no expert has belong to the expert after the last one."""
    first = tl.load(offsets_ptr + expert, mask=expert <= num_experts, other=num_rows)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < num_experts, other=num_rows)
    first = tl.minimum(tl.maximum(first, 0), num_rows)
    return first, tl.minimum(tl.maximum(end, first), num_rows)


@triton.jit
def widen(x, UPCAST: tl.constexpr):
    """Return fp32 in the interpreter, which multiplies bf16 wrongly."""
    if UPCAST:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _grouped_kernel(
    x_ptr,
    w_ptr,
    add_ptr,
    out_ptr,
    x_desc,
    w_desc,
    offsets_ptr,
    num_rows,
    num_in,
    num_out,
    num_experts,
    x_stride,
    w_stride_x,
    w_stride_in,
    w_stride_out,
    GROUPS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    TMA: tl.constexpr,
    IN_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """out[rows of e] = add[rows of e] + x[rows of e] @ w[e]; rows of no expert are 0."""
    num_n = tl.cdiv(num_out, BLOCK_N)
    group_G = tl.arange(0, GROUPS)
    first_G, end_G = rows_of(offsets_ptr, group_G, num_experts, num_rows)
    upto_G = tl.cumsum(tl.where(group_G <= num_experts, tl.cdiv(end_G - first_G, BLOCK_M), 0), axis=0)
    num_tiles = tl.max(upto_G, axis=0) * num_n

    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        done_G = upto_G <= tile // num_n
        expert = tl.sum(done_G.to(tl.int32), axis=0)
        before = tl.max(tl.where(done_G, upto_G, 0), axis=0)
        first, end = rows_of(offsets_ptr, expert, num_experts, num_rows)
        tile_m, tile_n = place_in_expert(tile - before * num_n, tl.cdiv(end - first, BLOCK_M), num_n, GROUP)
        row = first + tile_m * BLOCK_M
        row_M = row + tl.arange(0, BLOCK_M)
        col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows of no expert have nothing to sum over.
        num_k = tl.where(expert < num_experts, tl.cdiv(num_in, BLOCK_K), 0)
        acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if TMA:
            for k in range(num_k):
                x_MK = x_desc.load([row, k * BLOCK_K])
                # Rows and columns beyond the expert's are those of the next: not stored below.
                if IN_LAST:
                    w_KN = tl.trans(w_desc.load([expert * num_out + tile_n * BLOCK_N, k * BLOCK_K]))
                else:
                    w_KN = w_desc.load([expert * num_in + k * BLOCK_K, tile_n * BLOCK_N])
                acc_MN = tl.dot(widen(x_MK, UPCAST), widen(w_KN, UPCAST), acc_MN, input_precision=PRECISION)
        else:
            in_K = tl.arange(0, BLOCK_K)
            x_ptr_MK = x_ptr + row_M.to(tl.int64)[:, None] * x_stride + in_K[None, :]
            w_ptr_KN = w_ptr + expert.to(tl.int64) * w_stride_x
            w_ptr_KN += in_K.to(tl.int64)[:, None] * w_stride_in + col_N.to(tl.int64)[None, :] * w_stride_out
            for k in range(num_k):
                left = num_in - k * BLOCK_K
                x_MK = tl.load(x_ptr_MK, mask=(row_M < end)[:, None] & (in_K < left)[None, :], other=0.0)
                w_KN = tl.load(w_ptr_KN, mask=(in_K < left)[:, None] & (col_N < num_out)[None, :], other=0.0)
                acc_MN = tl.dot(widen(x_MK, UPCAST), widen(w_KN, UPCAST), acc_MN, input_precision=PRECISION)
                x_ptr_MK += BLOCK_K
                w_ptr_KN += BLOCK_K * w_stride_in
        out_MN = row_M.to(tl.int64)[:, None] * num_out + col_N[None, :]
        mask_MN = (row_M < end)[:, None] & (col_N < num_out)[None, :]
        if HAS_ADD:
            acc_MN += tl.load(add_ptr + out_MN, mask=mask_MN, other=0.0).to(tl.float32)
        tl.store(out_ptr + out_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit
def _grouped_weight_grad_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    a_desc,
    b_desc,
    offsets_ptr,
    num_rows,
    num_a,
    num_b,
    num_experts,
    a_stride,
    b_stride,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """out[e] = a[rows of e].T @ b[rows of e]; 0 for an expert without rows."""
    num_m = tl.cdiv(num_a, BLOCK_M)
    num_n = tl.cdiv(num_b, BLOCK_N)
    tiles_per_expert = num_m * num_n

    for tile in tl.range(tl.program_id(0), num_experts * tiles_per_expert, tl.num_programs(0), flatten=FLATTEN):
        expert = tile // tiles_per_expert
        first, end = rows_of(offsets_ptr, expert, num_experts, num_rows)
        tile_m, tile_n = place_in_expert(tile % tiles_per_expert, num_m, num_n, GROUP)
        col_M = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        col_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row_K = tl.arange(0, BLOCK_K)
        acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        masked_from = first
        if TMA:
            num_full = (end - first) // BLOCK_K
            for k in range(num_full):
                a_KM = a_desc.load([first + k * BLOCK_K, tile_m * BLOCK_M])
                b_KN = b_desc.load([first + k * BLOCK_K, tile_n * BLOCK_N])
                acc_MN = tl.dot(widen(tl.trans(a_KM), UPCAST), widen(b_KN, UPCAST), acc_MN, input_precision=PRECISION)
            # The rows of the next expert must not be in the sum: the last tile goes by pointers and masks.
            masked_from = first + num_full * BLOCK_K
        row_first = masked_from.to(tl.int64)
        a_ptr_KM = a_ptr + (row_first + row_K)[:, None] * a_stride + col_M[None, :]
        b_ptr_KN = b_ptr + (row_first + row_K)[:, None] * b_stride + col_N[None, :]
        for k in range(tl.cdiv(end - masked_from, BLOCK_K)):
            left = end - masked_from - k * BLOCK_K
            a_KM = tl.load(a_ptr_KM, mask=(row_K < left)[:, None] & (col_M < num_a)[None, :], other=0.0)
            b_KN = tl.load(b_ptr_KN, mask=(row_K < left)[:, None] & (col_N < num_b)[None, :], other=0.0)
            acc_MN = tl.dot(widen(tl.trans(a_KM), UPCAST), widen(b_KN, UPCAST), acc_MN, input_precision=PRECISION)
            a_ptr_KM += BLOCK_K * a_stride.to(tl.int64)
            b_ptr_KN += BLOCK_K * b_stride.to(tl.int64)
        out_MN = expert.to(tl.int64) * num_a * num_b + col_M.to(tl.int64)[:, None] * num_b + col_N[None, :]
        tl.store(
            out_ptr + out_MN,
            acc_MN.to(out_ptr.dtype.element_ty),
            mask=(col_M < num_a)[:, None] & (col_N < num_b)[None, :],
        )
