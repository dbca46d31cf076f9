"""Grouped matrix product: each expert's rows times its own matrix, in one launch whatever the counts are.

Shapes:  M = rows, sorted by expert; X = experts; D = features in, F = features out.
Math:    y[m] = x[m] @ w[e] for offsets[e] <= m < offsets[e + 1]; rows from offsets[X] on are zero.
         Backward: dx[m] = dy[m] @ w[e].T, the same kernel; dw[e] = x[rows of e].T @ dy[rows of e], its own kernel.
         Sums in fp32, rounded once.
Cost:    2 * M * D * F flop each. Every tile of a row is read from HBM about once; an expert with fewer rows than a tile
         pays for a whole one, and the gradient of the weights writes X * D * F values however few the rows are.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

from ..launch import Impl, cdiv, check_device, is_interpreting, next_power_of_2, num_sms
from ..rows import as_rows, check_floats
from ..tuning import config_for
from ._grouped import _grouped_kernel, _grouped_weight_grad_kernel

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # without triton, or with one that has none
    TensorDescriptor = None

FEW_ROWS = 64
"""Rows per expert up to which a row tile of 128 would be mostly padding."""


def grouped_mm_reference(x_MD: torch.Tensor, w_XDF: torch.Tensor, offsets_X1: torch.Tensor) -> torch.Tensor:
    """Define the result: a loop over the experts in plain torch, any device and float dtype, differentiable."""
    wide = torch.promote_types(x_MD.dtype, torch.float32)
    bounds: list[int] = offsets_X1.tolist()
    parts = [
        (x_MD[first:end].to(wide) @ w_XDF[expert].to(wide)).to(x_MD.dtype)
        for expert, (first, end) in enumerate(pairwise(bounds))
    ]
    return torch.cat([*parts, x_MD.new_zeros((x_MD.shape[0] - bounds[-1], w_XDF.shape[2]))])


def default_config(dtype: torch.dtype, rows_per_expert: int, *, weight_grad: bool = False) -> dict[str, int]:
    """Return the tiles: 128 x 256 keeps Hopper's matrix units busy from shared memory, if there are rows to fill it.

    fp32 takes three products of tf32, and for their parts twice the registers.
    """
    small = {"GROUP": 8, "FLATTEN": 0, "PER_SM": 2, "TMA": 0, "num_warps": 4, "num_stages": 3}
    if dtype is torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, **small}
    if rows_per_expert <= FEW_ROWS and not weight_grad:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, **small, "TMA": 1}
    large = {"GROUP": 8, "FLATTEN": 0, "PER_SM": 1, "TMA": 1, "num_warps": 8, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, **large}


def config_key(dtype: torch.dtype, rows_per_expert: int, num_in: int, num_out: int) -> str:
    """Return what the best tiles depend on; rows are an average, as a power of two, since nobody knows the counts."""
    return f"{str(dtype).removeprefix('torch.')},m{next_power_of_2(rows_per_expert)},d{num_in},f{num_out}"


def launch_grouped(
    x: torch.Tensor, w_XDF: torch.Tensor, offsets_X1: torch.Tensor, add_MF: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``add + x @ w`` by experts; what the product, its gradient in x and moe_mlp are made of."""
    x_MD = as_rows(x)
    num_rows, num_in = x_MD.shape
    num_experts, _, num_out = w_XDF.shape
    out_MF = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    if not out_MF.numel():
        return out_MF
    rows_per_expert = cdiv(num_rows, num_experts)
    key = config_key(x.dtype, rows_per_expert, num_in, num_out)
    config = config_for("grouped_mm", key, default_config(x.dtype, rows_per_expert))
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    in_last = w_XDF.stride(1) == 1
    w_rows = w_XDF.transpose(1, 2) if in_last else w_XDF
    tma = config.pop("TMA") and num_in % block_k == 0 and _has_descriptors(x_MD, w_rows)
    w_block = [block_n, block_k] if in_last else [block_k, block_n]
    tiles = (cdiv(num_rows, block_m) + min(num_experts, num_rows)) * cdiv(num_out, block_n)
    _grouped_kernel[_programs(tiles, config.pop("PER_SM"), x.device)](
        x_MD,
        w_XDF,
        add_MF,
        out_MF,
        _descriptor(x_MD, [block_m, block_k]) if tma else None,
        _descriptor(w_rows.reshape(-1, w_rows.shape[2]), w_block) if tma else None,
        offsets_X1,
        num_rows,
        num_in,
        num_out,
        num_experts,
        x_MD.stride(0),
        *w_XDF.stride(),
        GROUPS=next_power_of_2(num_experts + 1),
        HAS_ADD=add_MF is not None,
        TMA=bool(tma),
        IN_LAST=in_last,
        PRECISION="tf32x3",
        UPCAST=is_interpreting(),
        **config,
    )
    return out_MF


def launch_weight_grad(a: torch.Tensor, b: torch.Tensor, offsets_X1: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``a.T @ b`` by experts, ``[X, A, B]`` for a ``[M, A]`` and b ``[M, B]``."""
    a_MA, b_MB = as_rows(a), as_rows(b)
    num_rows, num_a = a_MA.shape
    num_b = b_MB.shape[1]
    num_experts = offsets_X1.shape[0] - 1
    out_XAB = torch.empty((num_experts, num_a, num_b), dtype=dtype, device=a.device)
    if not num_rows:
        return out_XAB.zero_()
    rows_per_expert = cdiv(num_rows, num_experts)
    key = config_key(a.dtype, rows_per_expert, num_a, num_b)
    default = default_config(a.dtype, rows_per_expert, weight_grad=True)
    config = config_for("grouped_mm_weight_grad", key, default)
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    tma = config.pop("TMA") and _has_descriptors(a_MA, b_MB)
    tiles = num_experts * cdiv(num_a, block_m) * cdiv(num_b, block_n)
    _grouped_weight_grad_kernel[_programs(tiles, config.pop("PER_SM"), a.device)](
        a_MA,
        b_MB,
        out_XAB,
        _descriptor(a_MA, [block_k, block_m]) if tma else None,
        _descriptor(b_MB, [block_k, block_n]) if tma else None,
        offsets_X1,
        num_rows,
        num_a,
        num_b,
        num_experts,
        a_MA.stride(0),
        b_MB.stride(0),
        TMA=bool(tma),
        PRECISION="tf32x3",
        UPCAST=is_interpreting(),
        **config,
    )
    return out_XAB


def _programs(tiles: int, per_sm: int, device: torch.device) -> tuple[int]:
    return (min(tiles, per_sm * num_sms(device)),)


def _has_descriptors(*tensors: torch.Tensor) -> bool:
    """Whether the memory engine of Hopper can read these: aligned to 16 bytes, and expert behind expert."""
    if TensorDescriptor is None or not (is_interpreting() or _is_hopper_or_newer(tensors[0].device)):
        return False
    return all(_is_regular(tensor) for tensor in tensors)


def _is_regular(x: torch.Tensor) -> bool:
    stride = x.stride(-2)
    packed = x.ndim == 2 or x.shape[0] == 1 or x.stride(0) == x.shape[1] * stride
    return packed and x.stride(-1) == 1 and stride * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def _is_hopper_or_newer(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9


def _descriptor(x: torch.Tensor, block: list[int]) -> Any:
    assert TensorDescriptor is not None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


@torch.library.custom_op("danaus::grouped_mm", mutates_args=())
def _grouped_op(x_MD: torch.Tensor, w_XDF: torch.Tensor, offsets_X1: torch.Tensor) -> torch.Tensor:
    return launch_grouped(x_MD, w_XDF, offsets_X1)


@_grouped_op.register_fake
def _grouped_fake(x_MD: torch.Tensor, w_XDF: torch.Tensor, offsets_X1: torch.Tensor) -> torch.Tensor:
    del offsets_X1
    return torch.empty((x_MD.shape[0], w_XDF.shape[2]), dtype=x_MD.dtype, device=x_MD.device)


@torch.library.custom_op("danaus::grouped_mm_weight_grad", mutates_args=())
def _weight_grad_op(a_MA: torch.Tensor, b_MB: torch.Tensor, offsets_X1: torch.Tensor) -> torch.Tensor:
    return launch_weight_grad(a_MA, b_MB, offsets_X1, a_MA.dtype)


@_weight_grad_op.register_fake
def _weight_grad_fake(a_MA: torch.Tensor, b_MB: torch.Tensor, offsets_X1: torch.Tensor) -> torch.Tensor:
    shape = (offsets_X1.shape[0] - 1, a_MA.shape[1], b_MB.shape[1])
    return torch.empty(shape, dtype=a_MA.dtype, device=a_MA.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy_MF: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    x_MD, w_XDF, offsets_X1 = ctx.saved_tensors
    dx_MD = dw_XDF = None
    if ctx.needs_input_grad[0]:
        dx_MD = _grouped_op(dy_MF, w_XDF.transpose(1, 2), offsets_X1)
    if ctx.needs_input_grad[1]:
        # Laid out as the weights are, so that no later step has to transpose it.
        if w_XDF.stride(1) == 1:
            dw_XDF = _weight_grad_op(dy_MF, x_MD, offsets_X1).transpose(1, 2)
        else:
            dw_XDF = _weight_grad_op(x_MD, dy_MF, offsets_X1)
    return dx_MD, dw_XDF, None


_grouped_op.register_autograd(_backward, setup_context=_setup_context)


def grouped_mm(
    x_MD: torch.Tensor, w_XDF: torch.Tensor, offsets_X1: torch.Tensor, *, impl: Impl = "triton"
) -> torch.Tensor:
    """Multiply each expert's rows by its matrix; same result as :func:`grouped_mm_reference`.

    Args:
        x_MD: ``[M, D]`` fp32, bf16 or fp16, rows sorted by expert; they may lie apart.
        w_XDF: ``[X, D, F]`` of the same dtype, any strides: pass ``w.transpose(1, 2)`` of weights ``[X, F, D]``.
            Quickest if one of the last two dims is contiguous and D (for the gradient in x: F) a multiple of 64.
        offsets_X1: ``[X + 1]`` int32 on the same device, never decreasing: expert e has the rows from
            ``offsets_X1[e]`` to ``offsets_X1[e + 1]``, perhaps none. The host does not read it.
        impl: Who computes it; "torch" is ``F.grouped_mm``, with its demands on dtype and alignment.

    Returns:
        ``[M, F]``, contiguous; zero in rows from ``offsets_X1[X]`` on.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    check_device("grouped_mm", impl, x_MD, w_XDF, offsets_X1)
    _check("grouped_mm", x_MD, w_XDF, offsets_X1)
    if impl == "reference":
        return grouped_mm_reference(x_MD, w_XDF, offsets_X1)
    if impl == "torch":
        return _grouped_torch(x_MD, w_XDF, offsets_X1)
    check_floats("grouped_mm", x=x_MD, w=w_XDF)
    return _grouped_op(x_MD, w_XDF, offsets_X1.contiguous())


def _grouped_torch(x_MD: torch.Tensor, w_XDF: torch.Tensor, offsets_X1: torch.Tensor) -> torch.Tensor:
    # It writes no rows from the last offset on, neither results nor gradients; `where` keeps out NaN, both ways.
    used_M1 = (torch.arange(x_MD.shape[0], device=x_MD.device) < offsets_X1[-1])[:, None]
    y_MF = functional.grouped_mm(torch.where(used_M1, x_MD, 0), w_XDF, offs=offsets_X1[1:])
    return torch.where(used_M1, y_MF, 0)


def _check(op: str, x_MD: torch.Tensor, w_XDF: torch.Tensor, offsets_X1: torch.Tensor) -> None:
    if x_MD.ndim != 2 or w_XDF.ndim != 3 or x_MD.shape[1] != w_XDF.shape[1] or 0 in w_XDF.shape:
        raise ValueError(f"{op}: expected x [M, D] and w [X, D, F], got {list(x_MD.shape)} and {list(w_XDF.shape)}")
    if offsets_X1.shape != (w_XDF.shape[0] + 1,) or offsets_X1.dtype is not torch.int32:
        raise ValueError(
            f"{op}: expected offsets [{w_XDF.shape[0] + 1}] of int32, got {list(offsets_X1.shape)} {offsets_X1.dtype}"
        )
    if x_MD.dtype != w_XDF.dtype:
        raise ValueError(f"{op}: x is {x_MD.dtype}, w {w_XDF.dtype}: cast one of them")
