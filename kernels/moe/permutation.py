"""Bring tokens into the rows of their experts, and the experts' results back to the tokens, weighted.

Shapes:  T = tokens, K = choices of a token, M = rows (see order.py), D = features.
Math:    permute:   xs[m] = x[source[m] // K], zero in unused rows; its backward is unpermute without weights.
         unpermute: y[t] = sum over k of weight[t, k] * ys[place[t, k]], in fp32, without what was dropped.
         Its backward: dys[m] = weight[source[m]] * dy[source[m] // K], dweight[t, k] = <dy[t], ys[place[t, k]]>.
Cost:    memory bound: rows are read and written once. No atomics: every sum is taken by one program in the order of k,
         so the same bits come out in every run.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..launch import LAUNCH_MAX, Impl, cdiv, check_device, next_power_of_2, tl, triton
from ..rows import as_rows, check_floats
from ..tuning import config_for

if TYPE_CHECKING:
    from .order import Order

MAX_BLOCK = 2048
"""Features that a program takes at a time: 16 a thread at 4 warps, two loads of 16 bytes in bf16."""


def permute_reference(x_TD: torch.Tensor, order: Order) -> torch.Tensor:
    """Define the result: plain torch, any device and float dtype, differentiable."""
    source_M = order.source.long()
    used_M1 = (source_M >= 0)[:, None]
    num_choices = order.place.shape[1]
    rows_MD = x_TD.index_select(0, source_M.clamp(min=0) // num_choices)
    return torch.where(used_M1, rows_MD, 0)


def unpermute_reference(ys_MD: torch.Tensor, order: Order, weights_TK: torch.Tensor | None = None) -> torch.Tensor:
    """Define the result: plain torch, any device and float dtype, differentiable."""
    num_tokens, num_choices = order.place.shape
    wide = torch.promote_types(ys_MD.dtype, torch.float32)
    kept_TK1 = (order.place >= 0)[..., None]
    place = order.place.long().clamp(min=0).view(-1)
    rows_TKD = ys_MD.index_select(0, place).view(num_tokens, num_choices, ys_MD.shape[1]).to(wide)
    rows_TKD = torch.where(kept_TK1, rows_TKD, 0)
    if weights_TK is not None:
        rows_TKD = rows_TKD * weights_TK.to(wide)[..., None]
    return rows_TKD.sum(1).to(ys_MD.dtype)


@triton.jit
def _permute_kernel(
    x_ptr,
    weights_ptr,
    source_ptr,
    out_ptr,
    x_stride,
    num_cols,
    blocks_per_row,
    K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    col_D = (tl.program_id(0) % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_ptr + row).to(tl.int64)
    mask_D = (col_D < num_cols) & (source >= 0)
    x_D = tl.load(x_ptr + source // K * x_stride + col_D, mask=mask_D, other=0.0).to(tl.float32)
    if HAS_WEIGHTS:
        x_D = x_D * tl.load(weights_ptr + source, mask=source >= 0, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * num_cols + col_D, x_D.to(out_ptr.dtype.element_ty), mask=col_D < num_cols)


@triton.jit
def _unpermute_kernel(
    ys_ptr,
    weights_ptr,
    place_ptr,
    out_ptr,
    ys_stride,
    num_cols,
    blocks_per_row,
    K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    col_D = (tl.program_id(0) % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    sum_D = tl.zeros((BLOCK,), dtype=tl.float32)
    # Unrolled: the rows lie apart, so their loads should be under way together.
    for choice in tl.static_range(K):
        place = tl.load(place_ptr + token * K + choice).to(tl.int64)
        mask_D = (col_D < num_cols) & (place >= 0)
        y_D = tl.load(ys_ptr + place * ys_stride + col_D, mask=mask_D, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            y_D = y_D * tl.load(weights_ptr + token * K + choice).to(tl.float32)
        # A weight that is not finite does not reach what was dropped.
        sum_D += tl.where(place >= 0, y_D, 0.0)
    tl.store(out_ptr + token * num_cols + col_D, sum_D.to(out_ptr.dtype.element_ty), mask=col_D < num_cols)


@triton.jit
def _weight_grad_kernel(
    dy_ptr,
    ys_ptr,
    place_ptr,
    dweights_ptr,
    dy_stride,
    ys_stride,
    num_cols,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    assignment = tl.program_id(0).to(tl.int64)
    place = tl.load(place_ptr + assignment).to(tl.int64)
    sum_D = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, num_cols, BLOCK):
        col_D = first + tl.arange(0, BLOCK)
        mask_D = (col_D < num_cols) & (place >= 0)
        dy_D = tl.load(dy_ptr + assignment // K * dy_stride + col_D, mask=mask_D, other=0.0).to(tl.float32)
        ys_D = tl.load(ys_ptr + place * ys_stride + col_D, mask=mask_D, other=0.0).to(tl.float32)
        sum_D += dy_D * ys_D
    tl.store(dweights_ptr + assignment, tl.sum(sum_D, axis=0).to(dweights_ptr.dtype.element_ty))


def row_blocks(op: str, num_rows: int, num_cols: int) -> tuple[tuple[int], int, dict[str, int]]:
    """Return grid, blocks per row and launch options of a kernel with a program for each block of each row."""
    block = min(next_power_of_2(num_cols), MAX_BLOCK)
    config = config_for(op, f"D{num_cols}", {"BLOCK": block, "num_warps": 4 if block >= 512 else 1})
    blocks_per_row = cdiv(num_cols, config["BLOCK"])
    if num_rows * blocks_per_row > LAUNCH_MAX:
        raise ValueError(f"{op}: {num_rows} rows of {blocks_per_row} blocks, a launch takes {LAUNCH_MAX}: split them")
    return (num_rows * blocks_per_row,), blocks_per_row, config


def launch_permute(
    x: torch.Tensor, source_M: torch.Tensor, num_choices: int, weights_TK: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``weight[source] * x[source // K]`` by rows; what permute and the backward of unpermute are made of."""
    x_TD = as_rows(x)
    num_rows, num_cols = source_M.shape[0], x_TD.shape[1]
    out_MD = torch.empty((num_rows, num_cols), dtype=x.dtype, device=x.device)
    if out_MD.numel():
        grid, blocks_per_row, config = row_blocks("moe_permute", num_rows, num_cols)
        _permute_kernel[grid](
            x_TD,
            weights_TK,
            source_M,
            out_MD,
            x_TD.stride(0),
            num_cols,
            blocks_per_row,
            K=num_choices,
            HAS_WEIGHTS=weights_TK is not None,
            **config,
        )
    return out_MD


def launch_unpermute(ys: torch.Tensor, place_TK: torch.Tensor, weights_TK: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum of each token's rows; what unpermute and the backward of permute are made of."""
    ys_MD = as_rows(ys)
    num_tokens, num_choices = place_TK.shape
    num_cols = ys_MD.shape[1]
    out_TD = torch.empty((num_tokens, num_cols), dtype=ys.dtype, device=ys.device)
    if out_TD.numel():
        grid, blocks_per_row, config = row_blocks("moe_unpermute", num_tokens, num_cols)
        _unpermute_kernel[grid](
            ys_MD,
            weights_TK,
            place_TK,
            out_TD,
            ys_MD.stride(0),
            num_cols,
            blocks_per_row,
            K=num_choices,
            HAS_WEIGHTS=weights_TK is not None,
            **config,
        )
    return out_TD


def _launch_weight_grad(
    dy: torch.Tensor, ys: torch.Tensor, place_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    dy_TD, ys_MD = as_rows(dy), as_rows(ys)
    dweights_TK = torch.empty(place_TK.shape, dtype=weights_TK.dtype, device=weights_TK.device)
    if place_TK.numel():
        _, _, config = row_blocks("moe_weight_grad", 1, dy_TD.shape[1])
        _weight_grad_kernel[(place_TK.numel(),)](
            dy_TD,
            ys_MD,
            place_TK,
            dweights_TK,
            dy_TD.stride(0),
            ys_MD.stride(0),
            dy_TD.shape[1],
            K=place_TK.shape[1],
            **config,
        )
    return dweights_TK


@torch.library.custom_op("danaus::moe_permute", mutates_args=())
def _permute_op(x_TD: torch.Tensor, source_M: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    return launch_permute(x_TD, source_M, place_TK.shape[1])


@_permute_op.register_fake
def _permute_fake(x_TD: torch.Tensor, source_M: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    del place_TK
    return torch.empty((source_M.shape[0], x_TD.shape[1]), dtype=x_TD.dtype, device=x_TD.device)


@torch.library.custom_op("danaus::moe_unpermute", mutates_args=())
def _unpermute_op(
    ys_MD: torch.Tensor, source_M: torch.Tensor, place_TK: torch.Tensor, weights_TK: torch.Tensor | None
) -> torch.Tensor:
    del source_M
    return launch_unpermute(ys_MD, place_TK, None if weights_TK is None else weights_TK.contiguous())


@_unpermute_op.register_fake
def _unpermute_fake(
    ys_MD: torch.Tensor, source_M: torch.Tensor, place_TK: torch.Tensor, weights_TK: torch.Tensor | None
) -> torch.Tensor:
    del source_M, weights_TK
    return torch.empty((place_TK.shape[0], ys_MD.shape[1]), dtype=ys_MD.dtype, device=ys_MD.device)


@torch.library.custom_op("danaus::moe_unpermute_backward", mutates_args=())
def _unpermute_backward_op(
    dy_TD: torch.Tensor,
    ys_MD: torch.Tensor,
    source_M: torch.Tensor,
    place_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    dys_MD = launch_permute(dy_TD, source_M, place_TK.shape[1], weights_TK.contiguous())
    return dys_MD, _launch_weight_grad(dy_TD, ys_MD, place_TK, weights_TK)


@_unpermute_backward_op.register_fake
def _unpermute_backward_fake(
    dy_TD: torch.Tensor,
    ys_MD: torch.Tensor,
    source_M: torch.Tensor,
    place_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    del dy_TD, source_M
    dys_MD = torch.empty(ys_MD.shape, dtype=ys_MD.dtype, device=ys_MD.device)
    return dys_MD, torch.empty(place_TK.shape, dtype=weights_TK.dtype, device=weights_TK.device)


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[1:])


def _permute_backward(ctx: Any, dxs_MD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    source_M, place_TK = ctx.saved_tensors
    return _unpermute_op(dxs_MD, source_M, place_TK, None), None, None


def _unpermute_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    ys_MD, source_M, place_TK, weights_TK = inputs
    # Without weights the values are not needed.
    ctx.save_for_backward(None if weights_TK is None else ys_MD, source_M, place_TK, weights_TK)


def _unpermute_backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[torch.Tensor, None, None, torch.Tensor | None]:
    ys_MD, source_M, place_TK, weights_TK = ctx.saved_tensors
    if weights_TK is None:
        return _permute_op(dy_TD, source_M, place_TK), None, None, None
    dys_MD, dweights_TK = _unpermute_backward_op(dy_TD, ys_MD, source_M, place_TK, weights_TK)
    return dys_MD, None, None, dweights_TK


_permute_op.register_autograd(_permute_backward, setup_context=_permute_setup)
_unpermute_op.register_autograd(_unpermute_backward, setup_context=_unpermute_setup)


def permute(x_TD: torch.Tensor, order: Order, *, impl: Impl = "triton") -> torch.Tensor:
    """Return the tokens in the rows of their experts; same result as :func:`permute_reference`.

    Args:
        x_TD: ``[T, D]`` fp32, bf16 or fp16; rows may lie apart.
        order: Of the same tokens, from :func:`~danaus.kernels.moe.sort_by_expert`.
        impl: Who computes it; "torch" is the reference, ``index_select``.

    Returns:
        ``[M, D]``, zero in the rows that no expert uses.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    check_device("permute", impl, x_TD, *order)
    if x_TD.ndim != 2 or x_TD.shape[0] != order.place.shape[0]:
        raise ValueError(
            f"permute: expected x [T, D] with T = {order.place.shape[0]} as in the order, got {list(x_TD.shape)}"
        )
    if impl != "triton":
        return permute_reference(x_TD, order)
    check_floats("permute", x=x_TD)
    return _permute_op(x_TD, order.source, order.place)


def unpermute(
    ys_MD: torch.Tensor, order: Order, weights_TK: torch.Tensor | None = None, *, impl: Impl = "triton"
) -> torch.Tensor:
    """Return each token's rows added up, times its weights; same result as :func:`unpermute_reference`.

    Args:
        ys_MD: ``[M, D]`` fp32, bf16 or fp16; rows may lie apart.
        order: From :func:`~danaus.kernels.moe.sort_by_expert`.
        weights_TK: ``[T, K]``, of any of these dtypes; None means 1.
        impl: Who computes it; "torch" is the reference.

    Returns:
        ``[T, D]`` in the dtype of ``ys_MD``: zero for a token of which everything was dropped, so that only its
        residual stays.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    check_device("unpermute", impl, ys_MD, weights_TK, *order)
    if ys_MD.ndim != 2 or ys_MD.shape[0] != order.source.shape[0]:
        raise ValueError(
            f"unpermute: expected ys [M, D] with M = {order.source.shape[0]} as in the order, got {list(ys_MD.shape)}"
        )
    if weights_TK is not None and weights_TK.shape != order.place.shape:
        raise ValueError(
            f"unpermute: weights are {list(weights_TK.shape)}, the order has {list(order.place.shape)}: make them alike"
        )
    if impl != "triton":
        return unpermute_reference(ys_MD, order, weights_TK)
    check_floats("unpermute", ys=ys_MD, weights=weights_TK)
    return _unpermute_op(ys_MD, order.source, order.place, weights_TK)
