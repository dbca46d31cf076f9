"""Top-k routing: which experts a token goes to and with what weights, and the losses that keep experts in balance.

Shapes:  T = tokens, X = experts, K = choices of a token.
Math:    softmax="before": p = softmax(logits); the K largest p are the weights, divided by their sum if normalised.
         softmax="after": softmax over the K largest logits alone (equal to "before" with normalised weights).
         Equal logits: the lowest expert first. All in fp32.
         Losses: alpha * X * sum_i f_i P_i (Switch), f_i = share of the choices that fell on expert i, P_i = mean
         probability of i: alpha where all is even, up to alpha * X. z-loss: c * mean(logsumexp(logits)**2).
Cost:    memory bound: logits are read once, in the backward once more; K passes over a row in registers.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from math import ceil
from typing import Any, Literal, get_args

import torch

from ..launch import LAUNCH_MAX, Impl, cdiv, check_device, next_power_of_2, tl, triton
from ..rows import as_rows, check_floats
from ..tuning import config_for

Softmax = Literal["before", "after"]

MAX_EXPERTS = 4096
"""Longest row of logits that a block keeps in registers, several times over."""


def route_reference(
    logits_TX: torch.Tensor, k: int, *, softmax: Softmax = "before", normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Define the result: plain torch, any device and float dtype, differentiable."""
    wide_TX = logits_TX.to(torch.promote_types(logits_TX.dtype, torch.float32))
    # A stable sort puts the lowest of equal experts first; topk promises nothing.
    experts_TK = wide_TX.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return _weights_of(wide_TX, experts_TK, softmax, normalize), experts_TK


def _weights_of(wide_TX: torch.Tensor, experts_TK: torch.Tensor, softmax: Softmax, normalize: bool) -> torch.Tensor:
    if softmax == "after" or normalize:
        return wide_TX.gather(-1, experts_TK).softmax(-1)
    return wide_TX.softmax(-1).gather(-1, experts_TK)


def load_balancing_loss(logits_TX: torch.Tensor, experts_TK: torch.Tensor, alpha: float = 1e-2) -> torch.Tensor:
    """Return ``alpha * X * sum_i f_i P_i``, a scalar that is differentiable in the logits; no host sync.

    Args:
        logits_TX: ``[T, X]``, the router's; with T = 0 the loss is 0.
        experts_TK: ``[T, K]``, what :func:`route` chose.
        alpha: The loss where all experts get the same.
    """
    num_tokens, num_experts = logits_TX.shape
    flat = experts_TK.reshape(-1).long()
    ones = torch.ones(flat.shape, dtype=torch.int64, device=flat.device)
    count_X = torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, ones)
    wide = torch.promote_types(logits_TX.dtype, torch.float32)
    share_X = count_X.to(wide) / max(flat.numel(), 1)
    mean_X = logits_TX.to(wide).softmax(-1).sum(0) / max(num_tokens, 1)
    return alpha * num_experts * (share_X * mean_X).sum()


def router_z_loss(logits_TX: torch.Tensor, coefficient: float = 1e-3) -> torch.Tensor:
    """Return ``coefficient * mean(logsumexp(logits)**2)``, which keeps the logits small (ST-MoE)."""
    wide = torch.promote_types(logits_TX.dtype, torch.float32)
    return coefficient * logits_TX.to(wide).logsumexp(-1).square().sum() / max(logits_TX.shape[0], 1)


def expert_capacity(num_tokens: int, num_experts: int, k: int, factor: float) -> int:
    """Return how many tokens an expert takes if it may get ``factor`` times its even share; at least 1."""
    if factor <= 0:
        raise ValueError(f"expert_capacity: factor {factor:g} leaves no room, 1.0 is an even share: take 1.0 to 2.0")
    return max(1, ceil(factor * num_tokens * k / num_experts))


@triton.jit
def _route_kernel(
    logits_ptr,
    weights_ptr,
    experts_ptr,
    logits_stride,
    num_tokens,
    num_experts,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert_X = tl.arange(0, BLOCK_X)
    mask_RX = (row_R < num_tokens)[:, None] & (expert_X < num_experts)[None, :]
    logits_RX = tl.load(
        logits_ptr + row_R[:, None] * logits_stride + expert_X[None, :], mask=mask_RX, other=float("-inf")
    ).to(tl.float32)
    index_RX = tl.broadcast_to(expert_X[None, :], (ROWS, BLOCK_X))
    free_RX = index_RX < num_experts
    choice_K = tl.arange(0, BLOCK_K)
    chosen_RK = tl.full((ROWS, BLOCK_K), float("-inf"), dtype=tl.float32)
    experts_RK = tl.zeros((ROWS, BLOCK_K), dtype=tl.int32)
    for choice in range(K):
        best_R = tl.max(tl.where(free_RX, logits_RX, float("-inf")), axis=1)
        hits_RX = free_RX & (logits_RX == best_R[:, None])
        # A row of NaN has no hit; its expert has to be one nevertheless, since addresses are made of it.
        index_R = tl.minimum(tl.min(tl.where(hits_RX, index_RX, num_experts), axis=1), num_experts - 1)
        free_RX = free_RX & (index_RX != index_R[:, None])
        here_RK = (choice_K == choice)[None, :]
        chosen_RK = tl.where(here_RK, best_R[:, None], chosen_RK)
        experts_RK = tl.where(here_RK, index_R[:, None], experts_RK)
    # Rows beyond the last one are all -inf, and would be -inf - -inf.
    top_R = tl.where(row_R < num_tokens, tl.max(chosen_RK, axis=1), 0.0)
    weights_RK = tl.exp(chosen_RK - top_R[:, None])
    if NORMALIZE:
        total_R = tl.sum(weights_RK, axis=1)
    else:
        total_R = tl.sum(tl.exp(logits_RX - top_R[:, None]), axis=1)
    weights_RK = weights_RK / tl.where(row_R < num_tokens, total_R, 1.0)[:, None]
    out_RK = row_R[:, None] * K + choice_K[None, :]
    mask_RK = (row_R < num_tokens)[:, None] & (choice_K < K)[None, :]
    tl.store(weights_ptr + out_RK, weights_RK, mask=mask_RK)
    tl.store(experts_ptr + out_RK, experts_RK.to(tl.int64), mask=mask_RK)


@triton.jit
def _route_backward_kernel(
    dweights_ptr,
    weights_ptr,
    experts_ptr,
    logits_ptr,
    dlogits_ptr,
    logits_stride,
    num_tokens,
    num_experts,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert_X = tl.arange(0, BLOCK_X)
    choice_K = tl.arange(0, BLOCK_K)
    mask_R = row_R < num_tokens
    mask_RX = mask_R[:, None] & (expert_X < num_experts)[None, :]
    mask_RK = mask_R[:, None] & (choice_K < K)[None, :]
    at_RK = row_R[:, None] * K + choice_K[None, :]
    weights_RK = tl.load(weights_ptr + at_RK, mask=mask_RK, other=0.0)
    dweights_RK = tl.load(dweights_ptr + at_RK, mask=mask_RK, other=0.0)
    mean_R = tl.sum(weights_RK * dweights_RK, axis=1)
    dlogits_RX = tl.zeros((ROWS, BLOCK_X), dtype=tl.float32)
    for choice in range(K):
        at_R = row_R * K + choice
        expert_R = tl.load(experts_ptr + at_R, mask=mask_R, other=0)
        weight_R = tl.load(weights_ptr + at_R, mask=mask_R, other=0.0)
        dweight_R = tl.load(dweights_ptr + at_R, mask=mask_R, other=0.0)
        if NORMALIZE:
            grad_R = weight_R * (dweight_R - mean_R)
        else:
            grad_R = weight_R * dweight_R
        dlogits_RX += tl.where(expert_X[None, :] == expert_R[:, None], grad_R[:, None], 0.0)
    if not NORMALIZE:
        logits_RX = tl.load(
            logits_ptr + row_R[:, None] * logits_stride + expert_X[None, :], mask=mask_RX, other=float("-inf")
        ).to(tl.float32)
        # A row beyond the last one would be -inf - -inf.
        top_R = tl.where(mask_R, tl.max(logits_RX, axis=1), 0.0)
        p_RX = tl.exp(logits_RX - top_R[:, None])
        total_R = tl.where(mask_R, tl.sum(p_RX, axis=1), 1.0)
        dlogits_RX -= p_RX / total_R[:, None] * mean_R[:, None]
    out_RX = row_R[:, None] * num_experts + expert_X[None, :]
    tl.store(dlogits_ptr + out_RX, dlogits_RX.to(dlogits_ptr.dtype.element_ty), mask=mask_RX)


def default_config(num_experts: int) -> dict[str, int]:
    """Return the tile: 1024 logits at least, as several rows if need be; 8 or 16 a thread."""
    block = next_power_of_2(num_experts)
    return {"ROWS": max(1, 1024 // block), "num_warps": min(max(block // 256, 4), 16)}


def _config(op: str, num_experts: int) -> dict[str, int]:
    return config_for(op, f"X{num_experts}", default_config(num_experts))


def _grid(op: str, num_tokens: int, rows: int) -> tuple[int]:
    if cdiv(num_tokens, rows) > LAUNCH_MAX:
        raise ValueError(
            f"{op}: {num_tokens} tokens in blocks of {rows}, a launch takes {LAUNCH_MAX} blocks: split them"
        )
    return (cdiv(num_tokens, rows),)


@torch.library.custom_op("danaus::moe_route", mutates_args=())
def _route_op(logits: torch.Tensor, k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    weights_TK, experts_TK = _route_fake(logits, k, normalize)
    logits_TX = as_rows(logits)
    num_tokens, num_experts = logits_TX.shape
    if num_tokens:
        config = _config("moe_route", num_experts)
        _route_kernel[_grid("route", num_tokens, config["ROWS"])](
            logits_TX,
            weights_TK,
            experts_TK,
            logits_TX.stride(0),
            num_tokens,
            num_experts,
            K=k,
            NORMALIZE=normalize,
            BLOCK_X=next_power_of_2(num_experts),
            BLOCK_K=next_power_of_2(k),
            **config,
        )
    return weights_TK, experts_TK


@_route_op.register_fake
def _route_fake(logits: torch.Tensor, k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    del normalize
    shape = (logits.shape[0], k)
    return (
        torch.empty(shape, dtype=torch.float32, device=logits.device),
        torch.empty(shape, dtype=torch.int64, device=logits.device),
    )


@torch.library.custom_op("danaus::moe_route_backward", mutates_args=())
def _route_backward_op(
    dweights_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    logits: torch.Tensor,
    normalize: bool,
) -> torch.Tensor:
    logits_TX = as_rows(logits)
    num_tokens, num_experts = logits_TX.shape
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if num_tokens:
        k = weights_TK.shape[1]
        config = _config("moe_route_backward", num_experts)
        _route_backward_kernel[_grid("route", num_tokens, config["ROWS"])](
            dweights_TK.contiguous(),
            weights_TK,
            experts_TK,
            logits_TX,
            dlogits,
            logits_TX.stride(0),
            num_tokens,
            num_experts,
            K=k,
            NORMALIZE=normalize,
            BLOCK_X=next_power_of_2(num_experts),
            BLOCK_K=next_power_of_2(k),
            **config,
        )
    return dlogits


@_route_backward_op.register_fake
def _route_backward_fake(
    dweights_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    logits: torch.Tensor,
    normalize: bool,
) -> torch.Tensor:
    del dweights_TK, weights_TK, experts_TK, normalize
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, _, ctx.normalize = inputs
    weights_TK, experts_TK = output
    ctx.mark_non_differentiable(experts_TK)
    ctx.save_for_backward(weights_TK, experts_TK, logits)


def _backward(ctx: Any, dweights_TK: torch.Tensor, _: object) -> tuple[torch.Tensor, None, None]:
    return _route_backward_op(dweights_TK, *ctx.saved_tensors, ctx.normalize), None, None


_route_op.register_autograd(_backward, setup_context=_setup_context)


def route(
    logits_TX: torch.Tensor, k: int, *, softmax: Softmax = "before", normalize: bool = True, impl: Impl = "triton"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose ``k`` experts for each token; same result as :func:`route_reference`.

    Args:
        logits_TX: ``[T, X]`` fp32, bf16 or fp16, X up to 4096. Masked experts may be -inf as long as one is not.
        k: Choices of a token, 1 to X.
        softmax: Over all experts, "before" the choice, or over the chosen ones, "after" it.
        normalize: Whether weights of "before" are divided by their sum; those of "after" sum to 1 anyway. For k = 1
            (Switch) pass False: a weight that is always 1 teaches the router nothing.
        impl: Who computes it; "torch" is ``torch.topk``, which may order equal logits differently.

    Returns:
        Weights ``[T, K]`` fp32 (fp64 of fp64 logits), largest first, differentiable in the logits; experts ``[T, K]``
        int64.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message says what would.
    """
    check_device("route", impl, logits_TX)
    if logits_TX.ndim != 2 or not 1 <= k <= logits_TX.shape[1]:
        raise ValueError(f"route: expected logits [T, X] and 1 <= k <= X, got {list(logits_TX.shape)} and k={k}")
    if softmax not in get_args(Softmax):
        raise ValueError(f'route: softmax={softmax!r} is not there, it is "before" or "after"')
    if impl == "reference":
        return route_reference(logits_TX, k, softmax=softmax, normalize=normalize)
    if impl == "torch":
        wide_TX = logits_TX.to(torch.promote_types(logits_TX.dtype, torch.float32))
        experts_TK = wide_TX.detach().topk(k, dim=-1).indices
        return _weights_of(wide_TX, experts_TK, softmax, normalize), experts_TK
    check_floats("route", logits=logits_TX)
    if logits_TX.shape[1] > MAX_EXPERTS:
        raise ValueError(
            f'route: {logits_TX.shape[1]} experts, the kernel takes {MAX_EXPERTS}: pass impl="reference" or "torch"'
        )
    weights_TK, experts_TK = _route_op(logits_TX, k, normalize or softmax == "after")
    return weights_TK, experts_TK
