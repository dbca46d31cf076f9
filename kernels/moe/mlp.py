"""The experts of a layer, SwiGLU each, applied to the tokens that were routed to them.

Shapes:  T = tokens, K = choices of a token, X = experts, M = rows sorted by expert, D = model, F = hidden features.
Math:    y[t] = sum over k of weight[t, k] * down[e] (silu(gate[e] x[t]) * up[e] x[t]), e = expert[t, k], without the
         choices that an expert had no room for: a token that lost all of them gets 0, and passes by its residual.
Cost:    6 * M * D * F flop forward, twice that backward. Kept for the backward are gate and up, [M, F] each: the rows
         of x are gathered again and silu(gate) * up made again, for less than a tenth of the time of the products. The
         sort runs on the device and M is known beforehand, so nothing waits for the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ..launch import Impl, check_device
from ..rows import check_floats
from ._glu import launch_weighted_swiglu, launch_weighted_swiglu_backward
from .grouped import grouped_mm, launch_grouped, launch_weight_grad
from .order import sort_by_expert, sort_by_expert_reference
from .permutation import launch_permute, launch_unpermute, permute, unpermute


def moe_mlp_reference(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    w_gate_XFD: torch.Tensor,
    w_up_XFD: torch.Tensor,
    w_down_XDF: torch.Tensor,
    *,
    capacity: int | None = None,
) -> torch.Tensor:
    """Define the result: a loop over the experts in plain torch, any device and float dtype, differentiable."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    num_experts = w_gate_XFD.shape[0]
    kept_TK = sort_by_expert_reference(experts_TK, num_experts, capacity=capacity).place >= 0
    y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
    for expert in range(num_experts):
        token, choice = torch.nonzero((experts_TK == expert) & kept_TK, as_tuple=True)
        rows = x_TD[token]
        hidden = functional.silu(rows @ w_gate_XFD[expert].t()) * (rows @ w_up_XFD[expert].t())
        result = (hidden @ w_down_XDF[expert].t()).to(wide) * weights_TK[token, choice, None].to(wide)
        y_TD = y_TD.index_add(0, token, result)
    return y_TD.to(x_TD.dtype)


@torch.library.custom_op("danaus::moe_mlp", mutates_args=())
def _mlp_op(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    source_M: torch.Tensor,
    place_TK: torch.Tensor,
    offsets_X1: torch.Tensor,
    w_gate_XFD: torch.Tensor,
    w_up_XFD: torch.Tensor,
    w_down_XDF: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    xs_MD = launch_permute(x_TD, source_M, place_TK.shape[1])
    gate_MF = launch_grouped(xs_MD, w_gate_XFD.transpose(1, 2), offsets_X1)
    up_MF = launch_grouped(xs_MD, w_up_XFD.transpose(1, 2), offsets_X1)
    del xs_MD
    act_MF = launch_weighted_swiglu(gate_MF, up_MF, weights_TK.contiguous(), source_M)
    ys_MD = launch_grouped(act_MF, w_down_XDF.transpose(1, 2), offsets_X1)
    return launch_unpermute(ys_MD, place_TK), gate_MF, up_MF


@_mlp_op.register_fake
def _mlp_fake(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    source_M: torch.Tensor,
    place_TK: torch.Tensor,
    offsets_X1: torch.Tensor,
    w_gate_XFD: torch.Tensor,
    w_up_XFD: torch.Tensor,
    w_down_XDF: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del weights_TK, place_TK, offsets_X1, w_up_XFD, w_down_XDF
    hidden = (source_M.shape[0], w_gate_XFD.shape[1])
    y_TD, gate_MF, up_MF = (
        torch.empty(shape, dtype=x_TD.dtype, device=x_TD.device) for shape in (x_TD.shape, hidden, hidden)
    )
    return y_TD, gate_MF, up_MF


@torch.library.custom_op("danaus::moe_mlp_backward", mutates_args=())
def _mlp_backward_op(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    source_M: torch.Tensor,
    place_TK: torch.Tensor,
    offsets_X1: torch.Tensor,
    w_gate_XFD: torch.Tensor,
    w_up_XFD: torch.Tensor,
    w_down_XDF: torch.Tensor,
    gate_MF: torch.Tensor,
    up_MF: torch.Tensor,
    trains_experts: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_choices = place_TK.shape[1]
    dys_MD = launch_permute(dy_TD, source_M, num_choices)
    dact_MF = launch_grouped(dys_MD, w_down_XDF, offsets_X1)
    act_MF, dgate_MF, dup_MF, dweights_TK = launch_weighted_swiglu_backward(
        dact_MF, gate_MF, up_MF, weights_TK.contiguous(), source_M
    )
    del dact_MF
    dw_gate_XFD, dw_up_XFD, dw_down_XDF = (dy_TD.new_empty(0) for _ in range(3))
    if trains_experts:
        dw_down_XDF = launch_weight_grad(dys_MD, act_MF, offsets_X1, w_down_XDF.dtype)
        xs_MD = launch_permute(x_TD, source_M, num_choices)
        dw_gate_XFD = launch_weight_grad(dgate_MF, xs_MD, offsets_X1, w_gate_XFD.dtype)
        dw_up_XFD = launch_weight_grad(dup_MF, xs_MD, offsets_X1, w_up_XFD.dtype)
        del xs_MD
    del act_MF, dys_MD
    dxs_MD = launch_grouped(dgate_MF, w_gate_XFD, offsets_X1)
    dxs_MD = launch_grouped(dup_MF, w_up_XFD, offsets_X1, dxs_MD)
    return launch_unpermute(dxs_MD, place_TK), dweights_TK, dw_gate_XFD, dw_up_XFD, dw_down_XDF


@_mlp_backward_op.register_fake
def _mlp_backward_fake(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    source_M: torch.Tensor,
    place_TK: torch.Tensor,
    offsets_X1: torch.Tensor,
    w_gate_XFD: torch.Tensor,
    w_up_XFD: torch.Tensor,
    w_down_XDF: torch.Tensor,
    gate_MF: torch.Tensor,
    up_MF: torch.Tensor,
    trains_experts: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    del source_M, place_TK, offsets_X1, gate_MF, up_MF
    dx_TD = torch.empty(x_TD.shape, dtype=dy_TD.dtype, device=x_TD.device)
    dweights_TK = torch.empty(weights_TK.shape, dtype=weights_TK.dtype, device=x_TD.device)
    if not trains_experts:
        return dx_TD, dweights_TK, dy_TD.new_empty(0), dy_TD.new_empty(0), dy_TD.new_empty(0)
    dw_gate_XFD, dw_up_XFD, dw_down_XDF = (
        torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in (w_gate_XFD, w_up_XFD, w_down_XDF)
    )
    return dx_TD, dweights_TK, dw_gate_XFD, dw_up_XFD, dw_down_XDF


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, gate_MF, up_MF = output
    ctx.mark_non_differentiable(gate_MF, up_MF)
    ctx.save_for_backward(*inputs, gate_MF, up_MF)


def _backward(ctx: Any, dy_TD: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
    trains_experts = any(ctx.needs_input_grad[5:])
    dx_TD, dweights_TK, *dws = _mlp_backward_op(dy_TD, *ctx.saved_tensors, trains_experts)
    experts = dws if trains_experts else (None, None, None)
    return dx_TD, dweights_TK, None, None, None, *experts


_mlp_op.register_autograd(_backward, setup_context=_setup_context)


def moe_mlp(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    w_gate_XFD: torch.Tensor,
    w_up_XFD: torch.Tensor,
    w_down_XDF: torch.Tensor,
    *,
    capacity: int | None = None,
    impl: Impl = "triton",
) -> torch.Tensor:
    """Apply to each token the experts it was routed to; same result as :func:`moe_mlp_reference`.

    Args:
        x_TD: ``[T, D]`` fp32, bf16 or fp16.
        weights_TK: ``[T, K]``, any of these dtypes, from :func:`~danaus.kernels.moe.route`.
        experts_TK: ``[T, K]`` int32 or int64, from there too. What is none of 0..X-1 is skipped: an expert of another
            rank, for example.
        w_gate_XFD: ``[X, F, D]`` in the dtype of ``x_TD``, as ``nn.Linear`` lays out its weight.
        w_up_XFD: ``[X, F, D]``.
        w_down_XDF: ``[X, D, F]``.
        capacity: Rows that an expert takes at most, see ``expert_capacity``; None drops nothing.
        impl: Who computes it; "torch" is made of ``torch.sort``, ``index_select`` and ``F.grouped_mm``.

    Returns:
        ``[T, D]`` in the dtype of ``x_TD``, differentiable in x and all weights; 0 for what was dropped, so that
        ``x + moe_mlp(...)`` passes it by.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    tensors = {"w_gate": w_gate_XFD, "w_up": w_up_XFD, "w_down": w_down_XDF}
    check_device("moe_mlp", impl, x_TD, weights_TK, experts_TK, *tensors.values())
    _check_shapes(x_TD, weights_TK, experts_TK, **tensors)
    if impl == "reference":
        return moe_mlp_reference(x_TD, weights_TK, experts_TK, *tensors.values(), capacity=capacity)
    order = sort_by_expert(experts_TK, w_gate_XFD.shape[0], capacity=capacity, impl=impl)
    if impl == "torch":
        xs_MD = permute(x_TD, order, impl="torch")
        gate_MF = grouped_mm(xs_MD, w_gate_XFD.transpose(1, 2), order.offsets, impl="torch")
        up_MF = grouped_mm(xs_MD, w_up_XFD.transpose(1, 2), order.offsets, impl="torch")
        act_MF = functional.silu(gate_MF) * up_MF
        ys_MD = grouped_mm(act_MF, w_down_XDF.transpose(1, 2), order.offsets, impl="torch")
        return unpermute(ys_MD, order, weights_TK, impl="torch")
    check_floats("moe_mlp", x=x_TD, weights=weights_TK, **tensors)
    y_TD, _, _ = _mlp_op(x_TD, weights_TK, *order, *tensors.values())
    return y_TD


def _check_shapes(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
) -> None:
    if x.ndim != 2 or weights.ndim != 2 or weights.shape[0] != x.shape[0] or weights.shape != experts.shape:
        raise ValueError(
            f"moe_mlp: expected x [T, D], weights [T, K] and experts [T, K], got {list(x.shape)}, "
            f"{list(weights.shape)} and {list(experts.shape)}"
        )
    num_experts, num_hidden, num_features = w_gate.shape if w_gate.ndim == 3 else (0, 0, 0)
    fits = num_features == x.shape[1] and w_gate.numel() and w_up.shape == w_gate.shape
    if not fits or w_down.shape != (num_experts, num_features, num_hidden):
        raise ValueError(
            f"moe_mlp: expected w_gate and w_up [X, F, D] and w_down [X, D, F] with D = {x.shape[1]}, got "
            f"{list(w_gate.shape)}, {list(w_up.shape)} and {list(w_down.shape)}"
        )
    dtypes = {x.dtype, w_gate.dtype, w_up.dtype, w_down.dtype}
    if len(dtypes) > 1:
        raise ValueError(f"moe_mlp: x and the experts are of {', '.join(sorted(map(str, dtypes)))}: cast to one dtype")
