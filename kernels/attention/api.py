"""The checked entry to attention, its registration with torch, and the block sizes.

Shapes:  B = sequences, H = query heads, K = key/value heads (H a multiple of K), S = queries, S' = keys, E = head
         width; packed: T = queries of all sequences, T' = keys of all sequences.
Math:    out = softmax(mask(cap(scale q k^T))) v,  cap(x) = softcap tanh(x / softcap),  lse = log sum exp of each row.
Cost:    4 B H S S' E operations forward and 2.5 times that backward (3.5 as done here), half of it under a causal mask;
         memory O(B H S E).

Who sees what: query i stands at position i, or at i + S' - S with ``align="bottom_right"``, and sees keys from
``position - left`` to ``position + right``. ``causal`` is ``right = 0``. The default alignment is that of torch's
``scaled_dot_product_attention(is_causal=True)``; FlashAttention's own is the other one. They differ only where S != S'.
A query that sees no key gives 0 and a log-sum-exp of -inf, and takes no part in any gradient.

The backward never uses atomics, so it is deterministic always, not by request.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional

from ..launch import LAUNCH_MAX, Impl, cdiv, check_device, is_interpreting, next_power_of_2, num_sms
from ..tuning import config_for
from ._backward import _dkdv_kernel, _dq_kernel
from ._forward import _forward_kernel
from .reference import attention_mask, attention_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

Align = Literal["top_left", "bottom_right"]
Window = tuple[int | None, int | None]

MAX_WIDTH = 256
# Of fp32 products, others take no notice: three of tf32 give what fp32 promises, one would not. Where two accumulators
# are held, the registers do not suffice for the splitting.
PRECISION = "tf32x3"
DKDV_PRECISION = "ieee"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Half of Hopper's second-level cache, which two batches of programs share where sections meet.
_SECTION_BYTES = 24 << 20
# Windows as wide as this see everything; sums of two stay below 2**31.
_FAR = 1 << 29
# Rows or columns of the largest tile that a configuration has.
_MAX_TILE = 256


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    align: Align = ...,
    window: Window | None = ...,
    softcap: float = ...,
    scale: float | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: Literal[False] = ...,
    impl: Impl = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    align: Align = ...,
    window: Window | None = ...,
    softcap: float = ...,
    scale: float | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: Literal[True],
    impl: Impl = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    align: Align = "top_left",
    window: Window | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    impl: Impl = "triton",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each query to the keys that it sees; differentiable in q, k and v, through both results.

    Args:
        q: ``[B, H, S, E]`` fp16, bf16 or fp32 with any strides, E <= 256; ``[T, H, E]`` with ``cu_seqlens``.
        k: ``[B, K, S', E]`` or ``[T', K, E]``, K dividing H: query head h reads head h // (H / K).
        v: Shaped as ``k``.
        causal: Whether a query sees nothing behind its own position.
        align: Where positions are counted from; see above. Counts for ``causal`` and ``window``.
        window: (keys seen before the position, keys seen behind it), None for no limit.
        softcap: Bound of the scores before the softmax, 0 for none.
        scale: Factor of the scores, positive; E ** -0.5 where None.
        cu_seqlens_q: int32 ``[sequences + 1]``, rising from 0: where each packed sequence begins, and the end. Rows
            behind the end give 0.
        cu_seqlens_k: The same for keys; that of the queries where None.
        max_seqlen_q: Length of the longest packed sequence, not checked: rows beyond it would read 0. T where None,
            which is right but launches idle programs. No value is read back from the GPU.
        max_seqlen_k: The same for keys.
        return_lse: Whether to return (output, log-sum-exp): fp32 ``[B, H, S]`` or ``[H, T]``, natural logarithm.
        impl: "torch" is ``scaled_dot_product_attention``; it knows no packed sequences, softcap and log-sum-exp.

    Raises:
        ValueError: Shapes, dtypes or options do not fit; the message names them.
    """
    check_device("attention", impl, q, k, v, cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens_k is None and cu_seqlens_q is not None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q
    _check_shapes(q, k, v, cu_seqlens_q, cu_seqlens_k)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if not (scale > 0 and math.isfinite(scale) and softcap >= 0 and math.isfinite(softcap)):
        raise ValueError(f"attention: scale {scale} must be positive, softcap {softcap} must not be negative")
    if align not in {"top_left", "bottom_right"}:
        raise ValueError(f'attention: align={align!r}, use "top_left" or "bottom_right"')
    left, right = _limits(window, causal=causal)
    bottom_right = align == "bottom_right"
    if impl == "reference":
        out, lse = attention_reference(
            q, k, v, cu_seqlens_q, cu_seqlens_k,
            left=left, right=right, bottom_right=bottom_right, softcap=softcap, scale=scale,
        )  # fmt: skip
    elif impl == "torch":
        if cu_seqlens_q is not None or softcap or return_lse:
            raise ValueError(
                'attention: impl="torch" has no packed sequences, softcap or return_lse; use "triton" or "reference"'
            )
        return _torch_attention(q, k, v, left, right, bottom_right=bottom_right, scale=scale)
    else:
        if q.dtype not in _DTYPES:
            raise ValueError(f'attention: the kernel takes fp16, bf16 and fp32, not {q.dtype}; use impl="reference"')
        row_dim = 0 if cu_seqlens_q is not None else 2
        max_q = q.shape[row_dim] if max_seqlen_q is None else max_seqlen_q
        max_k = k.shape[row_dim] if max_seqlen_k is None else max_seqlen_k
        out, lse = _attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, left, right, bottom_right, softcap, scale
        )
    return (out, lse) if return_lse else out


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    num_dims = 4 if cu_q is None else 3
    if cu_q is None and cu_k is not None:
        raise ValueError("attention: cu_seqlens_k without cu_seqlens_q; pass both, or the one of the queries for both")
    if not q.ndim == k.ndim == v.ndim == num_dims or k.shape != v.shape:
        expected = "q [B, H, S, E], k and v [B, K, S', E]" if cu_q is None else "q [T, H, E], k and v [T', K, E]"
        raise ValueError(f"attention: expected {expected}, got {shapes}")
    head_dim = num_dims - 3 if cu_q is None else 1
    same_batch = cu_q is not None or q.shape[0] == k.shape[0]
    if not same_batch or q.shape[-1] != k.shape[-1] or not 1 <= q.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"attention: batch and head width must be equal, the width at most {MAX_WIDTH}, got {shapes}")
    if k.shape[head_dim] == 0 or q.shape[head_dim] % k.shape[head_dim]:
        raise ValueError(f"attention: query heads must be a multiple of key heads, got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: dtypes {q.dtype}, {k.dtype}, {v.dtype}; convert them to one")
    for name, edges in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if edges is not None and (edges.dtype is not torch.int32 or edges.ndim != 1 or edges.numel() < 1):
            raise ValueError(f"attention: {name} must be int32 [sequences + 1], got {edges.dtype} {tuple(edges.shape)}")
    if cu_q is not None and cu_k is not None and cu_q.shape != cu_k.shape:
        raise ValueError(f"attention: {cu_q.numel()} edges in cu_seqlens_q, {cu_k.numel()} in cu_seqlens_k")


def _limits(window: Window | None, *, causal: bool) -> tuple[int, int]:
    """Return how far a query sees to the left and to the right, -1 for no limit."""
    left, right = window or (None, None)
    if (left is not None and left < 0) or (right is not None and right < 0):
        raise ValueError(f"attention: window {window} must not be negative; None means no limit")
    if causal:
        right = 0
    return (
        -1 if left is None or left >= _FAR else left,
        -1 if right is None or right >= _FAR else right,
    )


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, *, bottom_right: bool, scale: float
) -> Tensor:
    """Call torch's own; without a mask wherever it knows the case by name."""
    len_q, len_k = q.shape[2], k.shape[2]
    is_causal = left < 0 and right == 0 and (len_q == len_k or not bottom_right)
    mask = None
    if not is_causal:
        mask = attention_mask(len_q, len_k, left, right, bottom_right=bottom_right, device=q.device)
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


@torch.library.custom_op("danaus::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    left: int,
    right: int,
    bottom_right: bool,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q) if cu_q is None else torch.zeros_like(q)
    lse = _new_lse(q, cu_q)
    work_q, work_k, work_v = _workable(q, k, v)
    work_out = out if work_q.dtype is out.dtype else out.to(work_q.dtype)
    q4, k4, v4, out4 = (_as_heads(x, cu_q) for x in (work_q, work_k, work_v, work_out))
    batch, num_heads = _num_sequences(q, cu_q), q4.shape[1]
    config = config_for("attention_forward", _key(q, right), _forward_default(q))
    num_programs = _num_programs("attention", max_q, config["BLOCK_M"], batch * num_heads)
    if num_programs:
        flags = _flags(
            (q4, k4, v4, out4), left, right, packed=cu_q is not None, bottom_right=bottom_right, softcap=softcap
        )
        _forward_kernel[(num_programs,)](
            q4, k4, v4, out4, lse, cu_q, cu_k,
            *q4.stride(), *k4.stride(), *v4.stride(), *out4.stride(), *_lse_strides(lse),
            batch, num_heads, num_heads // k4.shape[1], max_q, max_k,
            _heads_per_section(k4, max_k, num_heads // k4.shape[1]),
            *_scalars(left, right, softcap, scale), **flags, **config,
        )  # fmt: skip
    if work_out is not out:
        out.copy_(work_out)
    return out, lse


@_attention.register_fake
def _attention_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    q, _, _, cu_q, *_ = inputs
    return torch.empty_like(q), _new_lse(q, cu_q)


@torch.library.custom_op("danaus::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    left: int,
    right: int,
    bottom_right: bool,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # Packed rows that belong to no sequence are visited by no program.
    fresh = torch.empty_like if cu_q is None else torch.zeros_like
    dq, dk, dv = fresh(q), fresh(k), fresh(v)
    work_q, work_k, work_v, work_out, work_grad = _workable(q, k, v, out, grad)
    q4, k4, v4, out4, grad4 = (_as_heads(x, cu_q) for x in (work_q, work_k, work_v, work_out, work_grad))
    work_dq = dq if work_q.dtype is dq.dtype else dq.to(work_q.dtype)
    dq4 = _as_heads(work_dq, cu_q)
    if grad_lse is not None:
        # Strides of the log-sum-exp are shared with what lies beside it.
        grad_lse = grad_lse.contiguous()
    delta = torch.empty_like(lse)
    batch, num_heads, num_kv_heads = _num_sequences(q, cu_q), q4.shape[1], k4.shape[1]
    group = num_heads // num_kv_heads
    flags = _flags(
        (q4, k4, v4, out4, grad4, dq4), left, right, packed=cu_q is not None, bottom_right=bottom_right, softcap=softcap
    )
    scalars = _scalars(left, right, softcap, scale)

    config = config_for("attention_dq", _key(q, right), _dq_default(q))
    num_programs = _num_programs("attention", max_q, config["BLOCK_M"], batch * num_heads)
    if num_programs:
        _dq_kernel[(num_programs,)](
            q4, k4, v4, out4, grad4, lse, grad_lse, delta, dq4, cu_q, cu_k,
            *q4.stride(), *k4.stride(), *v4.stride(), *out4.stride(), *grad4.stride(), *dq4.stride(),
            *_lse_strides(lse), batch, num_heads, group, max_q, max_k, _heads_per_section(k4, max_k, group),
            *scalars, HAS_GRAD_LSE=grad_lse is not None, **flags, **config,
        )  # fmt: skip
    if work_dq is not dq:
        dq.copy_(work_dq)

    config = config_for("attention_dkdv", _key(q, right), _dkdv_default(q))
    owners = batch * num_kv_heads * cdiv(max_k, config["BLOCK_N"])
    num_parts = _num_parts(owners, group, q.device)
    # Sums of several parts stay in fp32 until they are added.
    direct = num_parts == 1 and work_k.dtype is dk.dtype
    parts_shape = (num_parts, *k.shape)
    dk_parts, dv_parts = (
        (dk[None], dv[None])
        if direct
        else (k.new_zeros(parts_shape, dtype=torch.float32), k.new_zeros(parts_shape, dtype=torch.float32))
    )
    dk4, dv4 = _as_heads(dk_parts[0], cu_q), _as_heads(dv_parts[0], cu_q)
    num_programs = _num_programs("attention", max_k, config["BLOCK_N"], batch * num_kv_heads * num_parts)
    if num_programs:
        # A program reads the queries of several heads.
        section = max(1, _heads_per_section(q4, max_q, 1) // (group // num_parts))
        _dkdv_kernel[(num_programs,)](
            q4, k4, v4, grad4, lse, delta, dk4, dv4, cu_q, cu_k,
            *q4.stride(), *k4.stride(), *v4.stride(), *grad4.stride(), *dk4.stride(), *dv4.stride(),
            *_lse_strides(lse), dk_parts.stride(0), batch, num_kv_heads, group, group // num_parts, max_q, max_k,
            section, *scalars, **{**flags, "PRECISION": DKDV_PRECISION}, **config,
        )  # fmt: skip
    if not direct:
        dk.copy_(dk_parts.sum(0))
        dv.copy_(dv_parts.sum(0))
    return dq, dk, dv


@_attention_backward.register_fake
def _attention_backward_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, q, k, v, *_ = inputs
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, *options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)
    ctx.options = options
    # A caller who leaves the log-sum-exp alone pays nothing for its gradient.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if grad is not None or grad_lse is not None:
        grad = torch.zeros_like(out) if grad is None else grad
        grads = _attention_backward(grad, grad_lse, q, k, v, out, lse, cu_q, cu_k, *ctx.options)
    return *grads, None, None, *(None for _ in ctx.options)


_attention.register_autograd(_differentiate, setup_context=_save)


def _new_lse(q: Tensor, cu_q: Tensor | None) -> Tensor:
    if cu_q is None:
        return q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)


def _lse_strides(lse: Tensor) -> tuple[int, int]:
    """Return strides of (sequence, head): packed sequences lie in one row per head."""
    return (lse.stride(0), lse.stride(1)) if lse.ndim == 3 else (0, lse.stride(0))


def _as_heads(x: Tensor, cu: Tensor | None) -> Tensor:
    """View a tensor as ``[B, heads, rows, E]``; packed sequences all get the same rows, and the kernel their edges."""
    return x if cu is None else x.transpose(0, 1).expand(cu.numel() - 1, -1, -1, -1)


def _workable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Widen bf16 where kernels are interpreted: the interpreter would compute with its bit patterns."""
    if tensors[0].dtype is torch.bfloat16 and is_interpreting() and tensors[0].device.type == "cpu":
        return tuple(x.float() for x in tensors)
    return tensors


def _num_sequences(q: Tensor, cu_q: Tensor | None) -> int:
    return q.shape[0] if cu_q is None else cu_q.numel() - 1


def _num_programs(op: str, num_rows: int, block: int, num_heads: int) -> int:
    number = cdiv(num_rows, block) * num_heads
    if number > LAUNCH_MAX:
        raise ValueError(f"{op}: {num_heads} heads of {num_rows} rows are {number} programs, at most {LAUNCH_MAX}")
    return number


def _heads_per_section(x: Tensor, num_rows: int, heads_each: int) -> int:
    """Return how many heads run side by side, so that two tensors like ``x`` stay in the cache.

    Args:
        x: What is read again and again, ``[B, heads, rows, E]``.
        num_rows: Its longest sequence.
        heads_each: How many heads read one of its heads.
    """
    head_bytes = 2 * num_rows * x.shape[-1] * x.element_size()
    # No more than there are: the kernels multiply it by the number of blocks, in 32 bits.
    return min(max(1, _SECTION_BYTES // max(head_bytes, 1)), x.shape[0] * x.shape[1]) * heads_each


def _num_parts(owners: int, group: int, device: torch.device) -> int:
    """Return into how many parts the sum over a group's heads is cut, so that every multiprocessor has a program."""
    for parts in range(1, group + 1):
        if group % parts == 0 and owners * parts >= num_sms(device):
            return parts
    return group


def _scalars(left: int, right: int, softcap: float, scale: float) -> tuple[int, int, float, float]:
    return left, right, scale, softcap


def _flags(
    tensors: Sequence[Tensor], left: int, right: int, *, packed: bool, bottom_right: bool, softcap: float
) -> dict[str, bool | int | str]:
    q = tensors[0]
    return {
        "WIDTH": q.shape[-1],
        "BLOCK_D": _block_d(q),
        "PACKED": packed,
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "BOTTOM_RIGHT": bottom_right,
        "HAS_SOFTCAP": softcap > 0,
        "PRECISION": PRECISION,
        "LONG": any(_MAX_TILE * max(x.stride()[2:]) >= 2**31 for x in tensors),
    }


def _block_d(q: Tensor) -> int:
    return max(16, next_power_of_2(q.shape[-1]))


def _key(q: Tensor, right: int) -> str:
    bits = 8 * q.element_size()
    return f"d{_block_d(q)},{bits} bit,{'causal' if right >= 0 else 'full'}"


def _forward_default(q: Tensor) -> dict[str, int]:
    """128 queries per program: with 64, reading keys would take more than the second-level cache gives.

    Two warp groups keep the accumulator at 64 registers a thread for E = 128; one is enough for 64, and then several
    programs share a multiprocessor, one computing its softmax while the other multiplies. fp32 is for exactness, its
    tiles are what the registers hold.
    """
    if q.element_size() == 4:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    if _block_d(q) <= 64:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    if _block_d(q) == 128:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def _dq_default(q: Tensor) -> dict[str, int]:
    """As in the forward, with a second resident tile (the gradient) and two scores per key in registers."""
    if q.element_size() == 4:
        return {"BLOCK_M": 32 if _block_d(q) <= 128 else 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if _block_d(q) <= 128:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}


def _dkdv_default(q: Tensor) -> dict[str, int]:
    """Two accumulators of BLOCK_N by E fill the registers: 128 a thread for E = 128 and two warp groups.

    What spills, spills outside of the loop over tiles that are seen in full, as the machine code shows; only Triton 3.6
    at E = 128 puts 46 loads from local memory among that loop's 492 instructions. 32 queries a tile would avoid them,
    but then the matrix units wait for shared memory, by the arithmetic about as long: the tuner may decide.
    """
    if q.element_size() == 4:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    if _block_d(q) <= 128:
        return {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
