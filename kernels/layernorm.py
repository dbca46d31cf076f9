"""Row-wise layer normalisation, with or without adding to the residual stream first.

Shapes:  T = rows (all leading dims together), D = features.
Math:    y[t] = (x[t] - mean(x[t])) / sqrt(var(x[t]) + eps) * w + b, computed in fp32 and rounded once; the variance is
         the mean of squared differences, taken in a second pass over registers.
         With a residual: h = x + residual, rounded to x's dtype; y is the norm of h; both are returned.
         Backward, with n the normalised row and g = dy * w:  dh = (g - mean(g) - n * mean(g * n)) / std(h) + what
         reached h itself,  dw = sum over t of dy * n,  db = sum over t of dy.
Cost:    memory bound. Forward reads x (and residual) and writes y (and h) once, and two fp32 numbers a row; backward
         reads h and dy and writes dx once. dw and db are summed in registers by a fixed number of programs, then over
         those: the same bits in every run on one device.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any, overload

import torch
from torch.nn import functional

from .launch import Impl, cdiv, check_device, next_power_of_2, tl, triton
from .rows import as_rows, check_features, check_floats, contiguous_like, num_programs, row_config
from .tuning import config_for


def layernorm_reference(
    x_TD: torch.Tensor, w_D: torch.Tensor, b_D: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Define the result: plain torch, any device and float dtype, differentiable."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    centred_TD = x_TD.to(wide) - x_TD.to(wide).mean(-1, keepdim=True)
    rstd_T1 = torch.rsqrt(centred_TD.square().mean(-1, keepdim=True) + eps)
    y_TD = centred_TD * rstd_T1 * w_D.to(wide)
    return (y_TD if b_D is None else y_TD + b_D.to(wide)).to(x_TD.dtype)


@triton.jit
def _layernorm_kernel(
    x_ptr,
    residual_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    num_rows,
    num_cols,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col_D = tl.arange(0, BLOCK)
    mask_RD = (row_R < num_rows)[:, None] & (col_D < num_cols)[None, :]
    out_RD = row_R[:, None] * num_cols + col_D[None, :]
    x_RD = tl.load(x_ptr + row_R[:, None] * x_stride + col_D[None, :], mask=mask_RD, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_RD = tl.load(residual_ptr + row_R[:, None] * residual_stride + col_D[None, :], mask=mask_RD, other=0.0)
        # Rounded before it is normalised: what the backward reads is what the forward used.
        h_RD = (x_RD + residual_RD.to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + out_RD, h_RD, mask=mask_RD)
        x_RD = h_RD.to(tl.float32)
    mean_R = tl.sum(x_RD, axis=1) / num_cols
    x_RD = tl.where(mask_RD, x_RD - mean_R[:, None], 0.0)
    rstd_R = 1.0 / tl.sqrt(tl.sum(x_RD * x_RD, axis=1) / num_cols + eps)
    w_D = tl.load(w_ptr + col_D, mask=col_D < num_cols, other=0.0).to(tl.float32)
    y_RD = x_RD * rstd_R[:, None] * w_D[None, :]
    if HAS_BIAS:
        y_RD += tl.load(b_ptr + col_D, mask=col_D < num_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + out_RD, y_RD.to(y_ptr.dtype.element_ty), mask=mask_RD)
    tl.store(mean_ptr + row_R, mean_R, mask=row_R < num_rows)
    tl.store(rstd_ptr + row_R, rstd_R, mask=row_R < num_rows)


@triton.jit
def _layernorm_backward_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    dy_stride,
    dh_stride,
    h_stride,
    num_rows,
    num_cols,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    col_D = tl.arange(0, BLOCK)
    dw_RD = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    db_RD = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row_R = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask_RD = (row_R < num_rows)[:, None] & (col_D < num_cols)[None, :]
        h_RD = tl.load(h_ptr + row_R[:, None] * h_stride + col_D[None, :], mask=mask_RD, other=0.0).to(tl.float32)
        dy_RD = tl.load(dy_ptr + row_R[:, None] * dy_stride + col_D[None, :], mask=mask_RD, other=0.0).to(tl.float32)
        mean_R = tl.load(mean_ptr + row_R, mask=row_R < num_rows, other=0.0)
        rstd_R = tl.load(rstd_ptr + row_R, mask=row_R < num_rows, other=0.0)
        # Read again for every row, from the cache: kept, it would take the registers of wide rows.
        w_D = tl.load(w_ptr + col_D, mask=col_D < num_cols, other=0.0).to(tl.float32)
        # Columns behind the last one have dy = 0, which keeps them out of every sum.
        n_RD = (h_RD - mean_R[:, None]) * rstd_R[:, None]
        g_RD = dy_RD * w_D[None, :]
        mean_g_R = tl.sum(g_RD, axis=1) / num_cols
        mean_gn_R = tl.sum(g_RD * n_RD, axis=1) / num_cols
        dx_RD = (g_RD - mean_g_R[:, None] - n_RD * mean_gn_R[:, None]) * rstd_R[:, None]
        if HAS_RESIDUAL:
            dh_RD = tl.load(dh_ptr + row_R[:, None] * dh_stride + col_D[None, :], mask=mask_RD, other=0.0)
            dx_RD += dh_RD.to(tl.float32)
        out_RD = row_R[:, None] * num_cols + col_D[None, :]
        tl.store(dx_ptr + out_RD, dx_RD.to(dx_ptr.dtype.element_ty), mask=mask_RD)
        dw_RD += dy_RD * n_RD
        if HAS_BIAS:
            db_RD += dy_RD
    out_D = program.to(tl.int64) * num_cols + col_D
    tl.store(dw_ptr + out_D, tl.sum(dw_RD, axis=0), mask=col_D < num_cols)
    if HAS_BIAS:
        tl.store(db_ptr + out_D, tl.sum(db_RD, axis=0), mask=col_D < num_cols)


@torch.library.custom_op("danaus::layernorm", mutates_args=())
def _layernorm_op(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x_TD = as_rows(x)
    num_rows, num_cols = x_TD.shape
    residual_TD = None if residual is None else as_rows(residual)
    y, h, mean_T, rstd_T = _layernorm_fake(x, residual, weight, bias, eps)
    if num_rows:
        config = config_for("layernorm", f"D{num_cols}", row_config(num_cols))
        _layernorm_kernel[(cdiv(num_rows, config["ROWS"]),)](
            x_TD,
            residual_TD,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            None if residual is None else h,
            mean_T,
            rstd_T,
            x_TD.stride(0),
            0 if residual_TD is None else residual_TD.stride(0),
            num_rows,
            num_cols,
            eps,
            HAS_RESIDUAL=residual is not None,
            HAS_BIAS=bias is not None,
            BLOCK=next_power_of_2(num_cols),
            **config,
        )
    return y, h, mean_T, rstd_T


@_layernorm_op.register_fake
def _layernorm_fake(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    del weight, bias, eps
    h = contiguous_like(x, (0,) if residual is None else None)
    mean_T = torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)
    return contiguous_like(x), h, mean_T, torch.empty_like(mean_T)


@torch.library.custom_op("danaus::layernorm_backward", mutates_args=())
def _layernorm_backward_op(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    mean_T: torch.Tensor,
    rstd_T: torch.Tensor,
    has_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h_TD, dy_TD = as_rows(h), as_rows(dy)
    dh_TD = None if dh is None else as_rows(dh)
    num_rows, num_cols = h_TD.shape
    dx = contiguous_like(h)
    if not num_rows:
        return dx, torch.zeros_like(weight), torch.zeros_like(weight[: weight.shape[0] if has_bias else 0])
    config = config_for("layernorm_backward", f"D{num_cols}", row_config(num_cols))
    programs = num_programs(num_rows, config["ROWS"], h.device)
    dw_PD = torch.empty((programs, num_cols), dtype=torch.float32, device=h.device)
    db_PD = torch.empty((programs, num_cols if has_bias else 0), dtype=torch.float32, device=h.device)
    _layernorm_backward_kernel[(programs,)](
        dy_TD,
        dh_TD,
        h_TD,
        weight.contiguous(),
        mean_T,
        rstd_T,
        dx,
        dw_PD,
        db_PD,
        dy_TD.stride(0),
        0 if dh_TD is None else dh_TD.stride(0),
        h_TD.stride(0),
        num_rows,
        num_cols,
        HAS_RESIDUAL=dh is not None,
        HAS_BIAS=has_bias,
        BLOCK=next_power_of_2(num_cols),
        **config,
    )
    return dx, dw_PD.sum(0).to(weight.dtype), db_PD.sum(0).to(weight.dtype)


@_layernorm_backward_op.register_fake
def _layernorm_backward_fake(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    mean_T: torch.Tensor,
    rstd_T: torch.Tensor,
    has_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del dy, dh, mean_T, rstd_T
    return contiguous_like(h), torch.empty_like(weight), contiguous_like(weight, (weight.shape[0] if has_bias else 0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, residual, weight, bias, _ = inputs
    _, h, mean_T, rstd_T = output
    ctx.has_residual, ctx.has_bias = residual is not None, bias is not None
    ctx.save_for_backward(x if residual is None else h, weight, mean_T, rstd_T)


def _backward(
    ctx: Any, dy: torch.Tensor, dh: torch.Tensor, *_: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None, None]:
    h, weight, mean_T, rstd_T = ctx.saved_tensors
    dx, dw_D, db_D = _layernorm_backward_op(
        dy, dh if ctx.has_residual else None, h, weight, mean_T, rstd_T, ctx.has_bias
    )
    return dx, dx if ctx.has_residual else None, dw_D, db_D if ctx.has_bias else None, None


_layernorm_op.register_autograd(_backward, setup_context=_setup_context)


@overload
def layernorm(
    x_TD: torch.Tensor,
    w_D: torch.Tensor,
    b_D: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    impl: Impl = "triton",
) -> torch.Tensor: ...
@overload
def layernorm(
    x_TD: torch.Tensor,
    w_D: torch.Tensor,
    b_D: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor,
    impl: Impl = "triton",
) -> tuple[torch.Tensor, torch.Tensor]: ...
def layernorm(
    x_TD: torch.Tensor,
    w_D: torch.Tensor,
    b_D: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    impl: Impl = "triton",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise each row of ``x_TD``; same result as :func:`layernorm_reference`.

    Args:
        x_TD: ``[..., D]`` fp32, bf16 or fp16, D up to 32768. Rows may lie apart; a last dim that is not contiguous is
            copied.
        w_D: ``[D]``, of any of these dtypes.
        b_D: ``[D]`` of ``w_D``'s dtype, or None.
        eps: Added to the variance before the root.
        residual: Added to ``x_TD`` first: of its shape and dtype.
        impl: Who computes it; "torch" is ``F.layer_norm``.

    Returns:
        ``y`` in the shape and dtype of ``x_TD``, contiguous; with ``residual``, ``(y, x_TD + residual)``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    check_device("layernorm", impl, x_TD, w_D, b_D, residual)
    _check_shapes(x_TD, w_D, b_D, residual)
    if impl == "triton":
        check_floats("layernorm", x=x_TD, w=w_D, b=b_D, residual=residual)
        check_features("layernorm", x_TD.shape[-1])
        y, h, _, _ = _layernorm_op(x_TD, residual, w_D, b_D, eps)
        return y if residual is None else (y, h)
    h = x_TD if residual is None else x_TD + residual
    y = layernorm_reference(h, w_D, b_D, eps) if impl == "reference" else _layernorm_torch(h, w_D, b_D, eps)
    return y if residual is None else (y, h)


def _layernorm_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return functional.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias, eps)


def _check_shapes(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> None:
    if x.ndim < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"layernorm: expected x [..., D] and w [D], got {list(x.shape)} and {list(weight.shape)}")
    if bias is not None and (bias.shape != weight.shape or bias.dtype != weight.dtype):
        raise ValueError(
            f"layernorm: b is {list(bias.shape)} {bias.dtype}, w {list(weight.shape)} {weight.dtype}: make them alike"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"layernorm: residual is {list(residual.shape)} {residual.dtype}, x {list(x.shape)} {x.dtype}: "
            "make them alike"
        )
