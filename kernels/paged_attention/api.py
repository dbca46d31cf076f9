"""The checked entry to attention over a paged cache, its registration with torch, and the block sizes.

Shapes:  T = new tokens of all sequences, H = query heads, K = key/value heads (H a multiple of K), E = head width,
         P = pages of the cache, B = sequences, M = pages that a sequence may have.
Math:    as in :mod:`danaus.kernels.attention`, causal from the bottom right: the last new token stands at the last key.
         A quantized key is ``k * k_scale``, so its score is scaled; a value's scale goes into its probability.
Cost:    bound by one read of the cache's keys and values; scratch is B H splits E in fp32, whatever T is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..attention.api import PRECISION
from ..launch import Impl, cdiv, check_device, is_interpreting, next_power_of_2, num_sms
from ..tuning import config_for
from ._triton import _merge_kernel, _paged_kernel
from .reference import paged_attention_reference

MAX_WIDTH = 256
# A row's splits are merged as one tile; more than this would not fit into the registers.
MAX_SPLITS = 128
# 128 splits of width 256 are then 128 registers a thread.
MERGE_WARPS = 8
_QUANTIZED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def paged_attention(
    q_THE: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    query_starts: Tensor | None = None,
    window_left: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int | None = None,
    impl: Impl = "triton",
) -> Tensor:
    """Attend from new tokens, whose keys and values are in the cache already, to their whole sequences.

    The launch depends on shapes only, so a CUDA graph that holds it may be replayed with other lengths and pages.

    Args:
        q_THE: ``[T, H, E]`` fp16, bf16 or fp32, any strides, E <= 256. In decode T = B.
        k_cache: ``[P, page, K, E]``, any strides, of q's dtype, or int8 or fp8 with scales.
        v_cache: As ``k_cache``.
        block_table: int32 ``[B, M]``: a sequence's pages in order; what lies past its last page is not read.
        seq_lens: int32 ``[B]``: tokens of each sequence, the new ones included. 0 gives an output of 0.
        query_starts: int32 ``[B + 1]``, rising from 0: where each sequence's new tokens begin in q, and the end. None
            for decode: one new token each. A sequence may have none; tokens behind the end give 0.
        window_left: How many keys before its own position a token sees; None for all.
        softcap: Bound of the scores before the softmax, 0 for none.
        scale: Factor of the scores, positive; E ** -0.5 where None.
        k_scale: fp32, broadcasts to ``[P, page, K]``: one number, one per head ``[K]``, or one per token and head (see
            :func:`quantize_kv`). Needed with an int8 or fp8 cache, else refused.
        v_scale: The same for values.
        num_splits: Into how many stretches a sequence's keys are cut where its new tokens fit into one tile, at most
            128; None for enough to fill the GPU.
        impl: "triton" or "reference".

    Raises:
        ValueError: Shapes, dtypes or options do not fit; the message names them.
    """
    tensors = (q_THE, k_cache, v_cache, block_table, seq_lens, query_starts, k_scale, v_scale)
    check_device("paged_attention", impl, *tensors, choices=("reference", "triton"))
    _check_shapes(q_THE, k_cache, v_cache, block_table, seq_lens, query_starts)
    _check_scales(q_THE, k_cache, v_cache, k_scale, v_scale)
    scale = float(q_THE.shape[-1] ** -0.5 if scale is None else scale)
    if not (scale > 0 and math.isfinite(scale) and softcap >= 0 and math.isfinite(softcap)):
        raise ValueError(f"paged_attention: scale {scale} must be positive, softcap {softcap} must not be negative")
    if window_left is not None and window_left < 0:
        raise ValueError(f"paged_attention: window_left {window_left} must not be negative; None means no limit")
    if num_splits is not None and not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"paged_attention: num_splits {num_splits} is outside of 1..{MAX_SPLITS}")
    left = -1 if window_left is None else min(window_left, 1 << 29)
    if impl == "reference":
        return paged_attention_reference(
            q_THE, k_cache, v_cache, block_table, seq_lens, query_starts, k_scale, v_scale,
            left=left, softcap=softcap, scale=scale,
        )  # fmt: skip
    if q_THE.dtype not in _FLOATS:
        raise ValueError(f'paged_attention: the kernel takes fp16, bf16 and fp32, not {q_THE.dtype}; use "reference"')
    return _paged_attention(
        q_THE, k_cache, v_cache, block_table, seq_lens, query_starts, k_scale, v_scale,
        left, softcap, scale, num_splits or 0,
    )  # fmt: skip


def _check_shapes(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lens: Tensor, starts: Tensor | None
) -> None:
    shapes = f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}"
    if q.ndim != 3 or k_cache.ndim != 4 or k_cache.shape != v_cache.shape or q.shape[-1] != k_cache.shape[-1]:
        raise ValueError(f"paged_attention: expected q [T, H, E], caches [P, page, K, E], got {shapes}")
    if not 1 <= q.shape[-1] <= MAX_WIDTH or k_cache.shape[1] < 1:
        raise ValueError(f"paged_attention: head width 1..{MAX_WIDTH} and pages that hold tokens, got {shapes}")
    if k_cache.shape[2] == 0 or q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"paged_attention: query heads must be a multiple of key heads, got {shapes}")
    for name, x, num_dims in (("block_table", table, 2), ("seq_lens", lens, 1), ("query_starts", starts, 1)):
        if x is not None and (x.dtype is not torch.int32 or x.ndim != num_dims):
            raise ValueError(f"paged_attention: {name} must be int32 with {num_dims} dims, is {x.dtype} {x.ndim}")
    num_sequences = lens.shape[0]
    expected = q.shape[0] if starts is None else starts.shape[0] - 1
    if table.shape[0] != num_sequences or expected != num_sequences:
        raise ValueError(
            f"paged_attention: {num_sequences} seq_lens, {table.shape[0]} rows in block_table, {expected} sequences "
            f"by {'the tokens of q (pass query_starts unless each has one)' if starts is None else 'query_starts'}"
        )


def _check_scales(q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    quantized = k_cache.dtype in _QUANTIZED
    if k_cache.dtype is not v_cache.dtype or (not quantized and k_cache.dtype is not q.dtype):
        raise ValueError(
            f"paged_attention: caches of {k_cache.dtype} and {v_cache.dtype} for q of {q.dtype}; both must be of q's "
            "dtype, int8 or fp8"
        )
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (x is not None) is not quantized:
            raise ValueError(f"paged_attention: {name} goes with an int8 or fp8 cache, this one is {k_cache.dtype}")
        if x is not None and x.dtype is not torch.float32:
            raise ValueError(f"paged_attention: {name} must be fp32, is {x.dtype}")


@torch.library.custom_op("danaus::paged_attention", mutates_args=())
def _paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lens: Tensor,
    starts: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    left: int,
    softcap: float,
    scale: float,
    num_splits: int,
) -> Tensor:
    # Without query_starts every row of the output is written.
    out = torch.empty_like(q) if starts is None else torch.zeros_like(q)
    num_tokens, num_heads, width = q.shape
    num_sequences, page_size, num_kv_heads = lens.shape[0], k_cache.shape[1], k_cache.shape[2]
    if out.numel() == 0 or num_sequences == 0:
        return out
    decode = starts is None
    group = num_heads // num_kv_heads
    config = config_for("paged_attention", _key(q, k_cache, decode=decode), _default(k_cache, decode=decode))
    programs_per_sm = config.pop("PROGRAMS_PER_SM")
    config["BLOCK_M"] = block_m = max(config["BLOCK_M"], next_power_of_2(group))
    block_q = 1 if decode else block_m // group
    num_blocks = num_sequences if decode else num_tokens // block_q + num_sequences
    if not num_splits:
        most = max(1, min(MAX_SPLITS, cdiv(table.shape[1] * page_size, config["BLOCK_N"])))
        # Rounded down: programs that do not fit into the last wave would run alone.
        num_splits = max(1, min(most, programs_per_sm * num_sms(q.device) // (num_sequences * num_kv_heads)))
    # The interpreter would compute with the bit patterns of bf16.
    widen = q.dtype is torch.bfloat16 and is_interpreting() and q.device.type == "cpu"
    work_q, work_out = (q.float(), out.float()) if widen else (q, out)
    work_k, work_v = (x.float() if widen and x.dtype is q.dtype else x for x in (k_cache, v_cache))
    k_scales, v_scales = (None if x is None else x.expand(k_cache.shape[:3]) for x in (k_scale, v_scale))
    strides = [(0, 0, 0) if x is None else x.stride() for x in (k_scales, v_scales)]
    parts = lses = None
    if num_splits > 1:
        rows = num_sequences * num_kv_heads * block_m * num_splits
        parts, lses = (torch.empty(size, dtype=torch.float32, device=q.device) for size in (rows * width, rows))
    shape = {
        "GROUP": group, "WIDTH": width, "BLOCK_D": max(16, next_power_of_2(width)), "BLOCK_Q": block_q,
        "NUM_SPLITS": num_splits, "DECODE": decode, "HAS_LEFT": left >= 0,
    }  # fmt: skip
    _paged_kernel[(num_blocks, num_kv_heads, num_splits)](
        work_q, work_k, work_v, k_scales, v_scales, table, lens, starts, work_out, parts, lses,
        *work_q.stride(), *work_k.stride(), *work_v.stride(), *strides[0], *strides[1],
        table.stride(0), *work_out.stride(), num_sequences, left, scale, softcap,
        **shape, PAGE=page_size, HAS_SOFTCAP=softcap > 0, HAS_SCALES=k_scale is not None, PRECISION=PRECISION,
        **config,
    )  # fmt: skip
    if num_splits > 1:
        _merge_kernel[(num_sequences, num_heads, block_q)](
            parts, lses, lens, starts, work_out, *work_out.stride(), left, **shape,
            BLOCK_M=block_m, BLOCK_N=config["BLOCK_N"], BLOCK_S=next_power_of_2(num_splits),
            num_warps=MERGE_WARPS,
        )  # fmt: skip
    if widen:
        out.copy_(work_out)
    return out


@_paged_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q)


def _key(q: Tensor, k_cache: Tensor, *, decode: bool) -> str:
    return f"d{q.shape[-1]},{8 * k_cache.element_size()} bit,{'decode' if decode else 'mixed'}"


def _default(k_cache: Tensor, *, decode: bool) -> dict[str, int]:
    """Decode is bound by memory, so what counts is how many bytes are on their way.

    A tile of keys has 16 KiB. Of 5 stages the table's entries take some, so that two tiles of K and of V are under way
    in each of the 3 programs that fit on a multiprocessor; 6 programs for each are two full waves. 16 rows are the
    least that tensor cores take. Mixed batches multiply in earnest: 64 rows, what one warp group takes at a time; for
    widths above 128 two of them share the accumulator.
    """
    row_bytes = k_cache.shape[-1] * k_cache.element_size()
    if not decode:
        num_warps = 4 if k_cache.shape[-1] <= 128 else 8
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": num_warps, "num_stages": 2, "PROGRAMS_PER_SM": 6}
    block_n = 128 if row_bytes <= 64 else 64 if row_bytes <= 256 else 32
    return {"BLOCK_M": 16, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 5, "PROGRAMS_PER_SM": 6}
