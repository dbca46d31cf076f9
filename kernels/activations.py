"""Gated activations: ``act(gate) * up`` in one pass, with SiLU (SwiGLU) or GELU (GEGLU).

Shapes:  T = rows (all leading dims together), F = features.
Math:    swiglu: gate * sigmoid(gate) * up.
         geglu:  gate * Phi(gate) * up, with Phi exact (erf) or gate * sigmoid(2 u) for the "tanh" form, where
         u = sqrt(2/pi) * (gate + 0.044715 gate**3): 0.5 * (1 + tanh(u)) = sigmoid(2 u).
         All in fp32, rounded once.
Cost:    memory bound: forward 2 reads and 1 write, backward 3 reads and 2 writes. Nothing is saved but the two inputs.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch.nn import functional

from .launch import LAUNCH_MAX, Impl, cdiv, check_device, tl, triton
from .rows import as_rows, check_floats, contiguous_like
from .tuning import config_for

Approximate = Literal["none", "tanh"]

_SILU, _GELU, _GELU_TANH = 0, 1, 2

# 16 elements a thread of each operand: two loads of 16 bytes in bf16.
_CONFIG = {"BLOCK": 2048, "num_warps": 4}


def swiglu_reference(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """Define the result: plain torch, any device and float dtype, differentiable."""
    wide = torch.promote_types(gate_TF.dtype, torch.float32)
    return (functional.silu(gate_TF.to(wide)) * up_TF.to(wide)).to(gate_TF.dtype)


def geglu_reference(gate_TF: torch.Tensor, up_TF: torch.Tensor, *, approximate: Approximate = "none") -> torch.Tensor:
    """Define the result: plain torch, any device and float dtype, differentiable."""
    wide = torch.promote_types(gate_TF.dtype, torch.float32)
    return (functional.gelu(gate_TF.to(wide), approximate=approximate) * up_TF.to(wide)).to(gate_TF.dtype)


@triton.jit
def _sigmoids(x):
    """Return ``sigmoid(x)`` and ``sigmoid(-x)``, both to full relative precision and without overflow."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    small = small * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def _activate(x, ACT: tl.constexpr):
    """Return ``act(x)`` and its derivative, fp32."""
    if ACT == 1:
        phi = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * phi
        slope = phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == 2:
        gate, rest = _sigmoids(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * gate
        slope = gate + value * rest * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        gate, rest = _sigmoids(x)
        value = x * gate
        slope = gate + value * rest
    return value, slope


@triton.jit
def _gated_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_stride,
    up_stride,
    num_cols,
    blocks_per_row,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    col_F = (program % blocks_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask_F = col_F < num_cols
    gate_F = tl.load(gate_ptr + row * gate_stride + col_F, mask=mask_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + row * up_stride + col_F, mask=mask_F, other=0.0).to(tl.float32)
    value_F, _ = _activate(gate_F, ACT)
    tl.store(out_ptr + row * num_cols + col_F, (value_F * up_F).to(out_ptr.dtype.element_ty), mask=mask_F)


@triton.jit
def _gated_backward_kernel(
    dout_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    dout_stride,
    gate_stride,
    up_stride,
    num_cols,
    blocks_per_row,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    col_F = (program % blocks_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask_F = col_F < num_cols
    dout_F = tl.load(dout_ptr + row * dout_stride + col_F, mask=mask_F, other=0.0).to(tl.float32)
    gate_F = tl.load(gate_ptr + row * gate_stride + col_F, mask=mask_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + row * up_stride + col_F, mask=mask_F, other=0.0).to(tl.float32)
    value_F, slope_F = _activate(gate_F, ACT)
    out_F = row * num_cols + col_F
    tl.store(dgate_ptr + out_F, (dout_F * up_F * slope_F).to(dgate_ptr.dtype.element_ty), mask=mask_F)
    tl.store(dup_ptr + out_F, (dout_F * value_F).to(dup_ptr.dtype.element_ty), mask=mask_F)


def _flatten(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """View the tensors as rows; as a single long row where all of them are contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    return [as_rows(tensor) for tensor in tensors]


def _grid(rows: torch.Tensor, block: int) -> tuple[tuple[int], int]:
    blocks_per_row = cdiv(rows.shape[1], block)
    programs = rows.shape[0] * blocks_per_row
    if programs > LAUNCH_MAX:
        raise ValueError(f"gated activation: {programs} blocks of {block} elements, a launch takes {LAUNCH_MAX}")
    return (programs,), blocks_per_row


@torch.library.custom_op("danaus::gated_activation", mutates_args=())
def _gated_op(gate: torch.Tensor, up: torch.Tensor, act: int) -> torch.Tensor:
    out = contiguous_like(gate)
    if out.numel():
        gate_TF, up_TF = _flatten(gate, up)
        config = config_for("gated_activation", "forward", _CONFIG)
        grid, blocks_per_row = _grid(gate_TF, config["BLOCK"])
        _gated_kernel[grid](
            gate_TF,
            up_TF,
            out,
            gate_TF.stride(0),
            up_TF.stride(0),
            gate_TF.shape[1],
            blocks_per_row,
            ACT=act,
            **config,
        )
    return out


@_gated_op.register_fake
def _gated_fake(gate: torch.Tensor, up: torch.Tensor, act: int) -> torch.Tensor:
    del up, act
    return contiguous_like(gate)


@torch.library.custom_op("danaus::gated_activation_backward", mutates_args=())
def _gated_backward_op(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: int
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = contiguous_like(gate), contiguous_like(up)
    if dgate.numel():
        dout_TF, gate_TF, up_TF = _flatten(dout, gate, up)
        config = config_for("gated_activation", "backward", _CONFIG)
        grid, blocks_per_row = _grid(gate_TF, config["BLOCK"])
        _gated_backward_kernel[grid](
            dout_TF,
            gate_TF,
            up_TF,
            dgate,
            dup,
            dout_TF.stride(0),
            gate_TF.stride(0),
            up_TF.stride(0),
            gate_TF.shape[1],
            blocks_per_row,
            ACT=act,
            **config,
        )
    return dgate, dup


@_gated_backward_op.register_fake
def _gated_backward_fake(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: int
) -> tuple[torch.Tensor, torch.Tensor]:
    del dout, act
    return contiguous_like(gate), contiguous_like(up)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    gate, up, ctx.act = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    dgate, dup = _gated_backward_op(dout, *ctx.saved_tensors, ctx.act)
    return dgate, dup, None


_gated_op.register_autograd(_backward, setup_context=_setup_context)


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor, *, impl: Impl = "triton") -> torch.Tensor:
    """Return ``silu(gate_TF) * up_TF``; same result as :func:`swiglu_reference`.

    Args:
        gate_TF: ``[..., F]`` fp32, bf16 or fp16; rows may lie apart (the two may be halves of one tensor).
        up_TF: Of the same shape and dtype.
        impl: Who computes it; "torch" is ``F.silu(gate) * up``, two kernels outside of torch.compile.

    Returns:
        Shape and dtype of the inputs, contiguous.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    _check("swiglu", impl, gate_TF, up_TF)
    if impl == "triton":
        return _gated_op(gate_TF, up_TF, _SILU)
    return swiglu_reference(gate_TF, up_TF) if impl == "reference" else functional.silu(gate_TF) * up_TF


def geglu(
    gate_TF: torch.Tensor, up_TF: torch.Tensor, *, approximate: Approximate = "none", impl: Impl = "triton"
) -> torch.Tensor:
    """Return ``gelu(gate_TF) * up_TF``; same result as :func:`geglu_reference`.

    Args:
        gate_TF: ``[..., F]`` fp32, bf16 or fp16; rows may lie apart (the two may be halves of one tensor).
        up_TF: Of the same shape and dtype.
        approximate: "none" for the exact GELU, "tanh" for the one of Gemma and GPT-2.
        impl: Who computes it; "torch" is ``F.gelu(gate) * up``, two kernels outside of torch.compile.

    Returns:
        Shape and dtype of the inputs, contiguous.

    Raises:
        ValueError: Shapes, dtypes, devices or ``approximate`` do not fit; the message says what would.
    """
    _check("geglu", impl, gate_TF, up_TF)
    if approximate not in get_args(Approximate):
        raise ValueError(f'geglu: approximate={approximate!r} is not there, it is "none" or "tanh"')
    if impl == "triton":
        return _gated_op(gate_TF, up_TF, _GELU if approximate == "none" else _GELU_TANH)
    if impl == "reference":
        return geglu_reference(gate_TF, up_TF, approximate=approximate)
    return functional.gelu(gate_TF, approximate=approximate) * up_TF


def _check(op: str, impl: Impl, gate: torch.Tensor, up: torch.Tensor) -> None:
    check_device(op, impl, gate, up)
    if gate.ndim < 1 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"{op}: gate is {list(gate.shape)} {gate.dtype}, up {list(up.shape)} {up.dtype}: make them alike"
        )
    if impl == "triton":
        check_floats(op, gate=gate, up=up)
