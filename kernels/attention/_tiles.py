"""Parts that the attention kernels share: which tiles a block sees, masks, and arithmetic that Triton lacks.

Query ``i`` of a sequence sees key ``j`` if ``-left <= j - (i + shift) <= right``; ``left`` counts only under HAS_LEFT
and ``right`` only under HAS_RIGHT (causal is ``right = 0``). ``shift`` is 0, or ``len_k - len_q`` where the corners at
the bottom right are aligned.
"""
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false

from __future__ import annotations

from ..launch import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """Exact to a few units in the last place: the exponential form loses small arguments, so they take a series."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    size = tl.abs(x)
    exponential = tl.exp2(size * (-2.0 * LOG2E))
    ratio = (1.0 - exponential) / (1.0 + exponential)
    return tl.where(size < 0.2, series, tl.where(x < 0.0, -ratio, ratio))


@triton.jit
def tile_of(num_blocks, num_heads, heads_per_section):
    """Return (block, head) of this program, where the heads of all sequences are numbered through.

    All blocks of a section's heads run before the next section's, so that their keys and values stay in the L2 cache;
    within it the same block of every head runs first, so that the longest blocks can come first under a causal mask.
    """
    program = tl.program_id(0)
    first = program // (heads_per_section * num_blocks) * heads_per_section
    width = tl.minimum(heads_per_section, num_heads - first)
    rest = program - first * num_blocks
    return rest // width, first + rest % width


@triton.jit
def span(cu_ptr, sequence, length, PACKED: tl.constexpr):
    """Return (first row, number of rows) of a sequence."""
    if PACKED:
        first = tl.load(cu_ptr + sequence)
        return first, tl.load(cu_ptr + sequence + 1) - first
    else:
        return 0, length


@triton.jit
def key_ranges(
    first_row, last_row, len_k, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """Return (lo, full_lo, full_hi, hi): rows first..last see nothing outside lo..hi, everything in full_lo..full_hi.

    All but ``hi`` are multiples of BLOCK or equal to ``lo``; lo <= full_lo <= full_hi.
    """
    lo = 0
    full_lo = 0
    hi = len_k
    full_hi = len_k // BLOCK * BLOCK
    if HAS_RIGHT:
        hi = tl.minimum(hi, tl.maximum(last_row + shift + right + 1, 0))
        full_hi = tl.minimum(full_hi, tl.maximum(first_row + shift + right + 1, 0) // BLOCK * BLOCK)
    if HAS_LEFT:
        lo = tl.maximum(first_row + shift - left, 0) // BLOCK * BLOCK
        full_lo = tl.cdiv(tl.maximum(last_row + shift - left, 0), BLOCK) * BLOCK
    full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def visible(rows, keys, len_k, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Return the mask of two index tensors that broadcast."""
    distance = keys - (rows + shift)
    mask = (keys < len_k) & (distance == distance)
    if HAS_RIGHT:
        mask = mask & (distance <= right)
    if HAS_LEFT:
        mask = mask & (distance >= -left)
    return mask


@triton.jit
def tile_indices(ROWS: tl.constexpr, COLUMNS: tl.constexpr, LONG: tl.constexpr):
    """Return indices inside of a tile, to be multiplied by strides; 64 bits take twice the registers."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    if LONG:
        return rows.to(tl.int64), columns.to(tl.int64)
    else:
        return rows, columns


@triton.jit
def load_rows(pointers, rows, num_rows, columns, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Load a tile of rows by columns; what lies outside reads 0. Rows are checked only where MASKED."""
    if MASKED:
        if WIDTH == BLOCK_D:
            return tl.load(pointers, mask=(rows < num_rows)[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=(rows < num_rows)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(pointers, tile, rows, num_rows, columns, WIDTH: tl.constexpr):
    """Store the part of a tile that lies inside, in the dtype of the pointers."""
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask)
