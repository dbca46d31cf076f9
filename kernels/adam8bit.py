"""AdamW with 8-bit states: block-wise, in the dynamic quantization of Dettmers et al. (arXiv 2110.02861).

Shapes:  a state of n elements is n codes (uint8) and one fp32 scale for each BLOCK_SIZE of them.
Math:    state = map[code] * scale, scale = max|state| of the block, code = the nearest entry of a sorted map of 256.
         The map's exponents are decimal: for each power of ten from 1e-6 to 1 a linear fraction, twice as fine at each
         step, so that small and large values of a block keep about the same relative precision. First moments use a
         map with both signs, second ones a map of positive numbers, twice as fine, in which what is positive never
         becomes 0 (unlike in the paper): an element with m but no v would jump by lr * m / eps.
         A step widens both moments, updates them and the parameter as AdamW does (see adamw.py) in fp32, with the
         moments not yet rounded, and stores them again.
Cost:    memory bound: reads p, g and 2 bytes of state and writes p and 2 bytes: 16 bytes an element in fp32, 10 in
         bf16. The state takes 2.03 bytes an element in place of 8.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import math
from collections import defaultdict
from functools import cache
from typing import Any

import torch

from .launch import Impl, cdiv, check_device, tl, triton
from .multi_tensor import CHUNK, TL_DTYPES, is_aligned, is_dense, laid_out_like, pointer_at, table_of
from .rows import check_floats
from .tuning import config_for

BLOCK_SIZE = 256
"""Elements that share a scale: one outlier spoils no more than these."""

_EXPONENTS = 7

# 8 blocks of 256 at once, 16 elements a thread.
_CONFIG = {"BLOCKS": 8, "num_warps": 4}

State = tuple[torch.Tensor, torch.Tensor]
"""Codes and scales."""


def dynamic_map(*, signed: bool) -> torch.Tensor:
    """Return the 256 values of the map, sorted, fp32, from -1 (signed) or 0 to 1."""
    values = [0.0, 1.0]
    for exponent in range(_EXPONENTS):
        # Each bit that the exponent does not need goes to the fraction; without a sign there is one more.
        num_fractions = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1.0, num_fractions + 1, dtype=torch.float64)
        fractions = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - _EXPONENTS + 1)).tolist()
        values += fractions
        if signed:
            values += [-value for value in fractions]
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _map_and_edges(signed: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The map, and the midpoints between neighbours with an infinity behind them."""
    values = dynamic_map(signed=signed)
    edges = torch.cat(((values[1:] + values[:-1]) / 2, torch.tensor([float("inf")])))
    return values.to(device), edges.to(device)


def quantize_reference(x: torch.Tensor, *, signed: bool) -> State:
    """Define the codes ``[n]`` and scales ``[ceil(n / BLOCK_SIZE)]`` of the elements of ``x`` in their order."""
    flat = x.flatten().float()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    scales = blocks.abs().amax(1)
    _, edges = _map_and_edges(signed, x.device)
    ratios = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    codes = torch.searchsorted(edges, ratios)
    if not signed:
        codes = torch.where(ratios > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8).flatten()[: len(flat)], scales


def dequantize_reference(state: State, *, signed: bool) -> torch.Tensor:
    """Return the fp32 elements ``[n]`` of a state."""
    codes, scales = state
    values, _ = _map_and_edges(signed, codes.device)
    return values[codes.long()] * scales.repeat_interleave(BLOCK_SIZE)[: len(codes)]


def new_state(param: torch.Tensor, *, signed: bool) -> State:
    """Return the state of zeros for ``param``."""
    values, _ = _map_and_edges(signed, param.device)
    codes = torch.full((param.numel(),), int((values == 0).nonzero().item()), dtype=torch.uint8, device=param.device)
    return codes, torch.zeros(cdiv(param.numel(), BLOCK_SIZE), device=param.device)


def adam8bit_reference(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[State],
    exp_avg_sqs: list[State],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> None:
    """Define the result: plain torch, any device, in place; parameters are contiguous."""
    beta1, beta2 = betas
    for p, g, m_state, v_state in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        g_wide = g.float().flatten()
        m = dequantize_reference(m_state, signed=True).lerp(g_wide, 1 - beta1)
        v = dequantize_reference(v_state, signed=False) * beta2 + (1 - beta2) * g_wide.square()
        denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
        update = (lr / (1 - beta1**step) * m / denominator).view(p.shape)
        p.copy_(p.float() * (1 - lr * weight_decay) - update)
        for state, wide, signed in ((m_state, m, True), (v_state, v, False)):
            for old, new in zip(state, quantize_reference(wide, signed=signed), strict=True):
                old.copy_(new)


@triton.jit
def _encode(x, edges_ptr, SIGNED: tl.constexpr):
    """Return how many of the 255 midpoints are below ``x``: the code of the nearest entry."""
    code = tl.zeros_like(x).to(tl.int32)
    for bit in tl.static_range(8):
        edge = tl.load(edges_ptr + code + ((128 >> bit) - 1))
        code += tl.where(x > edge, 128 >> bit, 0)
    if not SIGNED:
        code = tl.where(x > 0.0, tl.maximum(code, 1), code)
    return code


@triton.jit
def _store_state(x, codes_ptr, scales_ptr, at, block, mask, block_mask, edges_ptr, SIGNED: tl.constexpr):
    scale = tl.max(tl.where(mask, tl.abs(x), 0.0), axis=1)
    tl.store(scales_ptr + block, scale, mask=block_mask)
    ratio = tl.div_rn(x, tl.where(scale > 0.0, scale, 1.0)[:, None] + tl.zeros_like(x))
    tl.store(codes_ptr + at, _encode(ratio, edges_ptr, SIGNED).to(tl.uint8), mask=mask)


@triton.jit
def _adam8bit_kernel(
    addresses_ptr,
    sizes_ptr,
    first_programs_ptr,
    tensor_of_ptr,
    signed_ptr,
    signed_edges_ptr,
    unsigned_ptr,
    unsigned_edges_ptr,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    root_correction2,
    eps,
    P: tl.constexpr,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(tensor_of_ptr + program)
    start = (program - tl.load(first_programs_ptr + tensor)).to(tl.int64) * CHUNK
    row_ptr = addresses_ptr + tensor * 6
    p_ptr = pointer_at(row_ptr, 0, P, ALIGNED) + start
    g_ptr = pointer_at(row_ptr, 1, G, ALIGNED) + start
    m_ptr = pointer_at(row_ptr, 2, tl.uint8, ALIGNED) + start
    v_ptr = pointer_at(row_ptr, 3, tl.uint8, ALIGNED) + start
    m_scale_ptr = pointer_at(row_ptr, 4, tl.float32, ALIGNED) + start // SIZE
    v_scale_ptr = pointer_at(row_ptr, 5, tl.float32, ALIGNED) + start // SIZE
    left = tl.minimum(tl.load(sizes_ptr + tensor) - start, CHUNK)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    for first in range(0, CHUNK // SIZE, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        block_mask = block * SIZE < left
        at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        mask = at < left
        p = tl.load(p_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(signed_ptr + tl.load(m_ptr + at, mask=mask, other=0).to(tl.int32), mask=mask, other=0.0)
        v = tl.load(unsigned_ptr + tl.load(v_ptr + at, mask=mask, other=0).to(tl.int32), mask=mask, other=0.0)
        m = m * tl.load(m_scale_ptr + block, mask=block_mask, other=0.0)[:, None]
        v = v * tl.load(v_scale_ptr + block, mask=block_mask, other=0.0)[:, None]
        m = m + one_minus_beta1 * (g - m)
        v = v * beta2 + one_minus_beta2 * g * g
        p = p * decay - step_size * m / (tl.sqrt_rn(v) / root_correction2 + eps)
        tl.store(p_ptr + at, p.to(P), mask=mask)
        _store_state(m, m_ptr, m_scale_ptr, at, block, mask, block_mask, signed_edges_ptr, True)
        _store_state(v, v_ptr, v_scale_ptr, at, block, mask, block_mask, unsigned_edges_ptr, False)


@torch.library.custom_op("danaus::adam8bit_", mutates_args={"params", "m_codes", "v_codes", "m_scales", "v_scales"})
def _adam8bit_op(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    m_codes: list[torch.Tensor],
    v_codes: list[torch.Tensor],
    m_scales: list[torch.Tensor],
    v_scales: list[torch.Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    groups: defaultdict[tuple[Any, ...], list[tuple[torch.Tensor, ...]]] = defaultdict(list)
    for p, g, *state in zip(params, grads, m_codes, v_codes, m_scales, v_scales, strict=True):
        row = (p, laid_out_like(g, p), *state)
        if p.numel():
            groups[is_aligned(row), p.dtype, g.dtype].append(row)
    config = config_for("adam8bit", "any", _CONFIG)
    for (aligned, p_dtype, g_dtype), rows in groups.items():
        table = table_of(rows)
        device = rows[0][0].device
        _adam8bit_kernel[(table.num_programs,)](
            table.addresses,
            table.sizes,
            table.first_programs,
            table.tensor_of,
            *_map_and_edges(True, device),
            *_map_and_edges(False, device),
            1 - lr * weight_decay,
            1 - beta1,
            beta2,
            1 - beta2,
            lr / (1 - beta1**step),
            math.sqrt(1 - beta2**step),
            eps,
            P=TL_DTYPES[p_dtype],
            G=TL_DTYPES[g_dtype],
            ALIGNED=aligned,
            CHUNK=CHUNK,
            SIZE=BLOCK_SIZE,
            **config,
        )


@_adam8bit_op.register_fake
def _adam8bit_fake(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    m_codes: list[torch.Tensor],
    v_codes: list[torch.Tensor],
    m_scales: list[torch.Tensor],
    v_scales: list[torch.Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    del params, grads, m_codes, v_codes, m_scales, v_scales, step, lr, beta1, beta2, eps, weight_decay


@torch.no_grad()
def adam8bit_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[State],
    exp_avg_sqs: list[State],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    impl: Impl = "triton",
) -> None:
    """Take one step of AdamW with many tensors, in place; same result as :func:`adam8bit_reference`.

    Args:
        params: fp32, bf16 or fp16, dense in memory, all on one device.
        grads: One for each, of its shape; copied where its strides differ.
        exp_avgs: First moments, as :func:`new_state` makes them with ``signed=True``.
        exp_avg_sqs: Second moments, as :func:`new_state` makes them with ``signed=False``.
        step: Number of this step, from 1.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Part of the parameter, times lr, that is taken off each step.
        impl: Who computes it. torch has no such function of its own.

    Raises:
        ValueError: Lists, shapes, dtypes or devices do not fit; the message says what would.
    """
    states = [tensor for state in (*exp_avgs, *exp_avg_sqs) for tensor in state]
    check_device("adam8bit", impl, *params, *grads, *states, choices=("reference", "triton"))
    _check(params, grads, exp_avgs, exp_avg_sqs, step)
    if impl == "reference":
        adam8bit_reference(
            params, grads, exp_avgs, exp_avg_sqs, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        return
    for p, g in zip(params, grads, strict=True):
        check_floats("adam8bit", param=p, grad=g)
    parts = [[state[index] for state in moments] for index in (0, 1) for moments in (exp_avgs, exp_avg_sqs)]
    _adam8bit_op(params, grads, *parts, step, lr, *betas, eps, weight_decay)


def _check(
    params: list[torch.Tensor], grads: list[torch.Tensor], exp_avgs: list[State], exp_avg_sqs: list[State], step: int
) -> None:
    lengths = [len(params), len(grads), len(exp_avgs), len(exp_avg_sqs)]
    if len(set(lengths)) > 1:
        raise ValueError(f"adam8bit: params, grads and both moments have lengths {lengths}: one of each is needed")
    if step < 1:
        raise ValueError(f"adam8bit: step={step}, the first one is 1")
    for p, g, *states in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if g.shape != p.shape or not is_dense(p):
            raise ValueError(
                f"adam8bit: param is {list(p.shape)} with strides {p.stride()}, its gradient {list(g.shape)}: make "
                "them alike and dense"
            )
        for codes, scales in states:
            sizes, wanted = [codes.numel(), scales.numel()], [p.numel(), cdiv(p.numel(), BLOCK_SIZE)]
            if sizes != wanted or codes.dtype is not torch.uint8 or scales.dtype is not torch.float32:
                raise ValueError(
                    f"adam8bit: param {list(p.shape)} has a state of {sizes} {codes.dtype} codes and {scales.dtype} "
                    f"scales, expected {wanted} uint8 and float32: make it with new_state"
                )
