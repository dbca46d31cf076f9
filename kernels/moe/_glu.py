"""The step between the two products of an expert: ``weight * silu(gate) * up``, forward and backward.

The routing weight is applied here, to F features, and not to the result: so the result of the second product is not
needed in the backward, and the gradient of the weight falls off while its row is read anyway.
"""
# pyright: reportArgumentType=false

from __future__ import annotations

import torch

from ..launch import tl, triton
from .permutation import row_blocks


@triton.jit
def _weighted_swiglu_kernel(
    gate_ptr,
    up_ptr,
    weights_ptr,
    source_ptr,
    act_ptr,
    num_cols,
    blocks_per_row,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    col_F = (tl.program_id(0) % blocks_per_row) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_ptr + row)
    weight = tl.load(weights_ptr + source, mask=source >= 0, other=0.0).to(tl.float32)
    mask_F = (col_F < num_cols) & (source >= 0)
    at_F = row * num_cols + col_F
    gate_F = tl.load(gate_ptr + at_F, mask=mask_F, other=0.0).to(tl.float32)
    up_F = tl.load(up_ptr + at_F, mask=mask_F, other=0.0).to(tl.float32)
    act_F = gate_F * tl.sigmoid(gate_F) * up_F * weight
    tl.store(act_ptr + at_F, act_F.to(act_ptr.dtype.element_ty), mask=col_F < num_cols)


@triton.jit
def _weighted_swiglu_backward_kernel(
    dact_ptr,
    gate_ptr,
    up_ptr,
    weights_ptr,
    source_ptr,
    act_ptr,
    dgate_ptr,
    dup_ptr,
    dweights_ptr,
    num_cols,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(source_ptr + row)
    weight = tl.load(weights_ptr + source, mask=source >= 0, other=0.0).to(tl.float32)
    dweight_F = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, num_cols, BLOCK):
        col_F = first + tl.arange(0, BLOCK)
        mask_F = (col_F < num_cols) & (source >= 0)
        at_F = row * num_cols + col_F
        gate_F = tl.load(gate_ptr + at_F, mask=mask_F, other=0.0).to(tl.float32)
        up_F = tl.load(up_ptr + at_F, mask=mask_F, other=0.0).to(tl.float32)
        dact_F = tl.load(dact_ptr + at_F, mask=mask_F, other=0.0).to(tl.float32)
        sigmoid_F = tl.sigmoid(gate_F)
        silu_F = gate_F * sigmoid_F
        dweight_F += dact_F * silu_F * up_F
        dact_F = dact_F * weight
        dgate_F = dact_F * up_F * (sigmoid_F + silu_F * (1.0 - sigmoid_F))
        inside_F = col_F < num_cols
        tl.store(act_ptr + at_F, (silu_F * up_F * weight).to(act_ptr.dtype.element_ty), mask=inside_F)
        tl.store(dgate_ptr + at_F, dgate_F.to(dgate_ptr.dtype.element_ty), mask=inside_F)
        tl.store(dup_ptr + at_F, (dact_F * silu_F).to(dup_ptr.dtype.element_ty), mask=inside_F)
    dweight = tl.sum(dweight_F, axis=0).to(dweights_ptr.dtype.element_ty)
    tl.store(dweights_ptr + source, dweight, mask=source >= 0)


def launch_weighted_swiglu(
    gate_MF: torch.Tensor, up_MF: torch.Tensor, weights_TK: torch.Tensor, source_M: torch.Tensor
) -> torch.Tensor:
    """Return ``weight * silu(gate) * up`` for contiguous tensors; zero in unused rows."""
    act_MF = torch.empty(gate_MF.shape, dtype=gate_MF.dtype, device=gate_MF.device)
    if act_MF.numel():
        grid, blocks_per_row, config = row_blocks("moe_swiglu", *gate_MF.shape)
        _weighted_swiglu_kernel[grid](
            gate_MF, up_MF, weights_TK, source_M, act_MF, gate_MF.shape[1], blocks_per_row, **config
        )
    return act_MF


def launch_weighted_swiglu_backward(
    dact_MF: torch.Tensor,
    gate_MF: torch.Tensor,
    up_MF: torch.Tensor,
    weights_TK: torch.Tensor,
    source_M: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the forward did, and the gradients of gate, up and weights (zero for what was dropped)."""
    act_MF, dgate_MF, dup_MF = (
        torch.empty(gate_MF.shape, dtype=gate_MF.dtype, device=gate_MF.device) for _ in range(3)
    )
    dweights_TK = torch.zeros(weights_TK.shape, dtype=weights_TK.dtype, device=weights_TK.device)
    num_rows, num_cols = gate_MF.shape
    if num_rows:
        _, _, config = row_blocks("moe_swiglu_backward", 1, num_cols)
        _weighted_swiglu_backward_kernel[(num_rows,)](
            dact_MF,
            gate_MF,
            up_MF,
            weights_TK,
            source_M,
            act_MF,
            dgate_MF,
            dup_MF,
            dweights_TK,
            num_cols,
            **config,
        )
    return act_MF, dgate_MF, dup_MF, dweights_TK
