"""AdamW over any number of tensors, in one launch per combination of dtypes and alignment.

Math:    as ``torch.optim.AdamW``, for each element, in fp32 whatever the dtypes (g is multiplied by grad_scale first):
         p <- p (1 - lr wd);  m <- m + (1 - b1)(g - m);  v <- b2 v + (1 - b2) g**2
         p <- p - lr / (1 - b1**step) * m / (sqrt(v) / sqrt(1 - b2**step) + eps)
Cost:    memory bound: reads p, g, m, v and writes p, m, v once: 28 bytes an element in fp32.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

from .launch import Impl, check_device, tl, triton
from .multi_tensor import CHUNK, TL_DTYPES, is_aligned, is_dense, laid_out_like, pointer_at, table_of
from .rows import check_floats
from .tuning import config_for

# 8 elements of four tensors a thread.
_CONFIG = {"BLOCK": 1024, "num_warps": 4}


def adamw_reference(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_scale: torch.Tensor | None = None,
) -> None:
    """Define the result: plain torch, any device and float dtype, in place."""
    beta1, beta2 = betas
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        wide = torch.promote_types(p.dtype, torch.float32)
        g_wide = g.to(wide) if grad_scale is None else g.to(wide) * grad_scale.to(wide)
        m_wide = m.to(wide).lerp(g_wide, 1 - beta1)
        v_wide = v.to(wide) * beta2 + (1 - beta2) * g_wide.square()
        denominator = v_wide.sqrt() / math.sqrt(1 - beta2**step) + eps
        p.copy_(p.to(wide) * (1 - lr * weight_decay) - lr / (1 - beta1**step) * m_wide / denominator)
        m.copy_(m_wide)
        v.copy_(v_wide)


@triton.jit
def _adamw_kernel(
    addresses_ptr,
    sizes_ptr,
    first_programs_ptr,
    tensor_of_ptr,
    scale_ptr,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    root_correction2,
    eps,
    HAS_SCALE: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(tensor_of_ptr + program)
    size = tl.load(sizes_ptr + tensor)
    start = (program - tl.load(first_programs_ptr + tensor)).to(tl.int64) * CHUNK
    row_ptr = addresses_ptr + tensor * 4
    p_ptr = pointer_at(row_ptr, 0, P, ALIGNED) + start
    g_ptr = pointer_at(row_ptr, 1, G, ALIGNED) + start
    m_ptr = pointer_at(row_ptr, 2, M, ALIGNED) + start
    v_ptr = pointer_at(row_ptr, 3, M, ALIGNED) + start
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    left = tl.minimum(size - start, CHUNK)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    for first in range(0, CHUNK, BLOCK):
        at = first + tl.arange(0, BLOCK)
        mask = at < left
        p = tl.load(p_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_SCALE:
            g = g * scale
        m = m + one_minus_beta1 * (g - m)
        v = v * beta2 + one_minus_beta2 * g * g
        p = p * decay - step_size * m / (tl.sqrt_rn(v) / root_correction2 + eps)
        tl.store(p_ptr + at, p.to(P), mask=mask)
        tl.store(m_ptr + at, m.to(M), mask=mask)
        tl.store(v_ptr + at, v.to(M), mask=mask)


@torch.library.custom_op("danaus::adamw_", mutates_args={"params", "exp_avgs", "exp_avg_sqs"})
def _adamw_op(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    grad_scale: torch.Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    groups: defaultdict[tuple[Any, ...], list[tuple[torch.Tensor, ...]]] = defaultdict(list)
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        row = (p, laid_out_like(g, p), m, v)
        if p.numel():
            groups[is_aligned(row), p.dtype, g.dtype, m.dtype].append(row)
    config = config_for("adamw", "any", _CONFIG)
    for (aligned, *dtypes), rows in groups.items():
        table = table_of(rows)
        p_type, g_type, m_type = (TL_DTYPES[dtype] for dtype in dtypes)
        _adamw_kernel[(table.num_programs,)](
            table.addresses,
            table.sizes,
            table.first_programs,
            table.tensor_of,
            grad_scale,
            1 - lr * weight_decay,
            1 - beta1,
            beta2,
            1 - beta2,
            lr / (1 - beta1**step),
            math.sqrt(1 - beta2**step),
            eps,
            HAS_SCALE=grad_scale is not None,
            P=p_type,
            G=g_type,
            M=m_type,
            ALIGNED=aligned,
            CHUNK=CHUNK,
            **config,
        )


@_adamw_op.register_fake
def _adamw_fake(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    grad_scale: torch.Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    del params, grads, exp_avgs, exp_avg_sqs, grad_scale, step, lr, beta1, beta2, eps, weight_decay


@torch.no_grad()
def adamw_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_scale: torch.Tensor | None = None,
    impl: Impl = "triton",
) -> None:
    """Take one step of AdamW with many tensors, in place; same result as :func:`adamw_reference`.

    Args:
        params: fp32, bf16 or fp16, dense in memory, all on one device. Dtypes may differ from tensor to tensor.
        grads: One for each, of its shape; copied where its strides differ.
        exp_avgs: First moments: strides of the parameter, any of the three dtypes.
        exp_avg_sqs: Second moments, in the dtype and strides of the first.
        step: Number of this step, from 1.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Part of the parameter, times lr, that is taken off each step.
        grad_scale: One element on the same device, multiplied with every gradient (clipping, loss scaling).
        impl: Who computes it; "torch" is torch's own fused AdamW, without ``grad_scale``.

    Raises:
        ValueError: Lists, shapes, dtypes or devices do not fit; the message says what would.
    """
    check_device("adamw", impl, *params, *grads, *exp_avgs, *exp_avg_sqs, grad_scale)
    _check(params, grads, exp_avgs, exp_avg_sqs, step)
    if impl == "triton":
        for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
            check_floats("adamw", param=p, grad=g, exp_avg=m, exp_avg_sq=v)
            if not is_dense(p) or m.stride() != p.stride() or v.stride() != p.stride() or m.dtype != v.dtype:
                raise ValueError(
                    f"adamw: param {list(p.shape)} has strides {p.stride()}, its state {m.stride()} {m.dtype} and "
                    f"{v.stride()} {v.dtype}: all have to be dense and alike, as torch.zeros_like(param) makes them"
                )
        _adamw_op(params, grads, exp_avgs, exp_avg_sqs, grad_scale, step, lr, *betas, eps, weight_decay)
    elif impl == "reference":
        adamw_reference(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            step=step,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            grad_scale=grad_scale,
        )
    else:
        if grad_scale is not None:
            raise ValueError('adamw: impl="torch" has no grad_scale, scale the gradients or use "triton"')
        from torch.optim.adamw import adamw as function

        steps = [torch.tensor(float(step - 1), device=p.device) for p in params]
        function(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )


def _check(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    step: int,
) -> None:
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        lengths = [len(params), len(grads), len(exp_avgs), len(exp_avg_sqs)]
        raise ValueError(
            f"adamw: params, grads, exp_avgs and exp_avg_sqs have lengths {lengths}: one of each is needed"
        )
    for p, *others in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if any(other.shape != p.shape for other in others):
            shapes = [list(other.shape) for other in others]
            raise ValueError(f"adamw: param is {list(p.shape)}, its gradient and state {shapes}: make them alike")
    if step < 1:
        raise ValueError(f"adamw: step={step}, the first one is 1")
