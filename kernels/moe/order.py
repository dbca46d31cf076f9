"""Which row of its expert each choice of a token takes: a stable counting sort on the device, with or without capacity.

Shapes:  T = tokens, K = choices of a token, X = experts, M = rows: T * K, or min(T * K, X * capacity).
         Assignment ``t * K + k`` is choice k of token t.
Math:    Rows are sorted by expert; within an expert all first choices come before all second ones, tokens in order.
         What comes after ``capacity`` rows of an expert is dropped, and so is what names no expert of 0..X-1 (that of
         another rank).
Cost:    two passes over the assignments and a [blocks, X] table of counts; nothing waits for the host, and M is known
         to it, so that everything after it can be launched, and captured, without looking at the counts.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch import LAUNCH_MAX, Impl, cdiv, check_device, next_power_of_2, tl, triton
from ..tuning import config_for

MAX_EXPERTS = 4096
"""Widest row of the table that a block compares its assignments with."""


class Order(NamedTuple):
    """The rows of the experts."""

    source: torch.Tensor
    """``[M]`` int32: the assignment in each row; -1 in the rows from ``offsets[-1]`` on, which nobody uses."""
    place: torch.Tensor
    """``[T, K]`` int32: the row of each assignment, -1 where it was dropped."""
    offsets: torch.Tensor
    """``[X + 1]`` int32: expert x has the rows ``offsets[x]`` to ``offsets[x + 1]``."""


def sort_by_expert_reference(experts_TK: torch.Tensor, num_experts: int, *, capacity: int | None = None) -> Order:
    """Define the result: plain torch, any device."""
    num_tokens, k = experts_TK.shape
    num_rows = _num_rows(experts_TK, num_experts, capacity)
    device = experts_TK.device
    flat_A = experts_TK.t().reshape(-1).long()
    flat_A = torch.where((flat_A >= 0) & (flat_A < num_experts), flat_A, num_experts)
    order_A = flat_A.sort(stable=True).indices
    sorted_A = flat_A[order_A]
    count_X = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    count_X.scatter_add_(0, flat_A, torch.ones_like(flat_A))
    rank_A = torch.arange(flat_A.numel(), device=device) - (count_X.cumsum(0) - count_X)[sorted_A]
    count_X[num_experts] = 0
    if capacity is not None:
        count_X.clamp_(max=capacity)
    first_X = count_X.cumsum(0) - count_X
    place_A = torch.where(rank_A < count_X[sorted_A], first_X[sorted_A] + rank_A, -1).int()
    assignment_A = order_A % max(num_tokens, 1) * k + order_A // max(num_tokens, 1)
    place_TK = torch.empty(num_tokens * k, dtype=torch.int32, device=device)
    place_TK[assignment_A] = place_A
    # Row M takes what has no place.
    source = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=device)
    source[torch.where(place_A < 0, num_rows, place_A).long()] = assignment_A.int()
    return Order(source[:num_rows], place_TK.view(num_tokens, k), first_X.int())


def _num_rows(experts_TK: torch.Tensor, num_experts: int, capacity: int | None) -> int:
    rows = experts_TK.shape[0] * experts_TK.shape[1]
    return rows if capacity is None else min(rows, num_experts * capacity)


@triton.jit
def _matches(
    experts_ptr, num_tokens, num_assignments, num_experts, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_X: tl.constexpr
):
    """Return (assignments, their experts, one-hot rows of these) of this program's stretch, first choices first."""
    position_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask_B = position_B < num_assignments
    assignment_B = position_B % num_tokens * K + position_B // num_tokens
    expert_B = tl.load(experts_ptr + assignment_B, mask=mask_B, other=-1)
    # Compared before it is narrowed: 2**32 is no expert 0.
    expert_B = tl.where((expert_B >= 0) & (expert_B < num_experts), expert_B, -1).to(tl.int32)
    hot_BX = (expert_B[:, None] == tl.arange(0, BLOCK_X)[None, :]).to(tl.int32)
    return assignment_B, expert_B, hot_BX


@triton.jit
def _count_kernel(
    experts_ptr,
    counts_ptr,
    num_tokens,
    num_assignments,
    num_experts,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    _, _, hot_BX = _matches(experts_ptr, num_tokens, num_assignments, num_experts, K, BLOCK, BLOCK_X)
    expert_X = tl.arange(0, BLOCK_X)
    out_X = tl.program_id(0).to(tl.int64) * num_experts + expert_X
    tl.store(counts_ptr + out_X, tl.sum(hot_BX, axis=0), mask=expert_X < num_experts)


@triton.jit
def _place_kernel(
    experts_ptr,
    before_ptr,
    offsets_ptr,
    source_ptr,
    place_ptr,
    num_tokens,
    num_assignments,
    num_experts,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    assignment_B, expert_B, hot_BX = _matches(experts_ptr, num_tokens, num_assignments, num_experts, K, BLOCK, BLOCK_X)
    expert_X = tl.arange(0, BLOCK_X)
    before_X = tl.load(
        before_ptr + tl.program_id(0).to(tl.int64) * num_experts + expert_X, mask=expert_X < num_experts, other=0
    )
    rank_B = tl.sum((tl.cumsum(hot_BX, axis=0) - 1 + before_X[None, :]) * hot_BX, axis=1)
    valid_B = expert_B >= 0
    first_B = tl.load(offsets_ptr + expert_B, mask=valid_B, other=0)
    end_B = tl.load(offsets_ptr + expert_B + 1, mask=valid_B, other=0)
    row_B = first_B + rank_B
    kept_B = valid_B & (row_B < end_B)
    inside_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) < num_assignments
    tl.store(place_ptr + assignment_B, tl.where(kept_B, row_B, -1), mask=inside_B)
    tl.store(source_ptr + row_B, assignment_B.to(tl.int32), mask=kept_B)


def default_config(num_experts: int) -> dict[str, int]:
    """Return the stretch of a program: as many assignments as give each thread 64 entries of the table."""
    block_x = next_power_of_2(num_experts)
    block = max(8, min(512, 8192 // block_x))
    return {"BLOCK": block, "num_warps": min(max(block * block_x // 2048, 4), 16)}


@torch.library.custom_op("danaus::moe_sort", mutates_args=())
def _sort_op(
    experts_TK: torch.Tensor, num_experts: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source_M, place_TK, offsets_X1 = _sort_fake(experts_TK, num_experts, capacity)
    source_M.fill_(-1)
    num_assignments = place_TK.numel()
    if not num_assignments:
        return source_M, place_TK, offsets_X1.zero_()
    num_tokens, k = place_TK.shape
    experts = experts_TK.contiguous()
    block_x = next_power_of_2(num_experts)
    config = config_for("moe_sort", f"X{num_experts}", default_config(num_experts))
    blocks = cdiv(num_assignments, config["BLOCK"])
    sizes = (num_tokens, num_assignments, num_experts)
    counts = torch.empty((blocks, num_experts), dtype=torch.int32, device=experts.device)
    _count_kernel[(blocks,)](experts, counts, *sizes, K=k, BLOCK_X=block_x, **config)
    upto = counts.cumsum(0, dtype=torch.int32)
    totals_X = upto[-1] if capacity is None else upto[-1].clamp(max=min(capacity, num_assignments))
    offsets_X1[:1].zero_()
    torch.cumsum(totals_X, 0, dtype=torch.int32, out=offsets_X1[1:])
    before = upto.sub_(counts)
    _place_kernel[(blocks,)](experts, before, offsets_X1, source_M, place_TK, *sizes, K=k, BLOCK_X=block_x, **config)
    return source_M, place_TK, offsets_X1


@_sort_op.register_fake
def _sort_fake(
    experts_TK: torch.Tensor, num_experts: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = _num_rows(experts_TK, num_experts, capacity)
    shapes = ((rows,), tuple(experts_TK.shape), (num_experts + 1,))
    source_M, place_TK, offsets_X1 = (
        torch.empty(shape, dtype=torch.int32, device=experts_TK.device) for shape in shapes
    )
    return source_M, place_TK, offsets_X1


def sort_by_expert(
    experts_TK: torch.Tensor, num_experts: int, *, capacity: int | None = None, impl: Impl = "triton"
) -> Order:
    """Give each choice a row of its expert; same result as :func:`sort_by_expert_reference`.

    Args:
        experts_TK: ``[T, K]`` int32 or int64. Values outside of 0..X-1 are dropped; no expert twice for one token is
            assumed nowhere.
        num_experts: X, up to 4096.
        capacity: Rows that an expert takes at most; None keeps everything (dropless).
        impl: Who computes it; "torch" is the reference, a stable ``torch.sort``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    check_device("sort_by_expert", impl, experts_TK)
    if experts_TK.ndim != 2 or experts_TK.dtype not in {torch.int32, torch.int64}:
        raise ValueError(
            f"sort_by_expert: expected experts [T, K] of int32 or int64, got {list(experts_TK.shape)} "
            f"{experts_TK.dtype}"
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"sort_by_expert: {num_experts} experts, it takes 1 to {MAX_EXPERTS}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"sort_by_expert: capacity {capacity} drops everything: 1 or more, or None to drop nothing")
    if experts_TK.numel() > LAUNCH_MAX:
        raise ValueError(f"sort_by_expert: {experts_TK.numel()} assignments, it takes {LAUNCH_MAX}: split the tokens")
    if impl != "triton":
        return sort_by_expert_reference(experts_TK, num_experts, capacity=capacity)
    return Order(*_sort_op(experts_TK, num_experts, capacity))
