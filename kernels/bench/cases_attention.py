"""Attention, dense and over pages, at the sizes that the goals name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import attention
from ..paged_attention import paged_attention, quantize_kv
from .case import Case, Tune, backward, call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..tuning import Config

TOKENS = 16384
"""Of all sequences of a dense case together."""
PAGE = 16

# Each beats or loses to the default by what it trades: occupancy, pipelining depth, or traffic from the L2 cache.
FORWARD: Sequence[Config] = (
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2},
)
DQ: Sequence[Config] = (
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
)
DKDV: Sequence[Config] = (
    {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
)
DECODE: Sequence[Config] = (
    {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "PROGRAMS_PER_SM": 6},
    {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 8, "num_stages": 4, "PROGRAMS_PER_SM": 4},
    {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 2, "num_stages": 5, "PROGRAMS_PER_SM": 12},
    {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 5, "PROGRAMS_PER_SM": 3},
)


def cases() -> list[Case]:
    """Return forward and backward by head width and mask, and decode by dtype of the cache and by batch."""
    dense = [
        dense_case(128, 8192, causal=True, good=400, top=550, tune=FORWARD),
        dense_case(128, 8192, causal=False),
        dense_case(64, 8192, causal=True),
        dense_case(256, 8192, causal=True),
        dense_case(128, 2048, causal=True),
        dense_case(128, 8192, causal=True, kv_heads=4),
    ]
    backwards = [
        backward_case(128, 8192, causal=True, good=280, top=400, tune=("attention_dq", DQ)),
        backward_case(128, 8192, causal=True, tune=("attention_dkdv", DKDV)),
        backward_case(64, 8192, causal=True),
        backward_case(256, 8192, causal=True),
        backward_case(128, 8192, causal=True, kv_heads=4),
    ]
    decode = [
        decode_case(32, 4096, good=3.2, top=3.8, tune=DECODE),
        decode_case(128, 4096),
        decode_case(1, 131072),
        decode_case(32, 4096, cache=torch.int8),
        decode_case(32, 4096, cache=torch.float8_e4m3fn),
    ]
    return [*dense, *backwards, *decode]


def dense_case(
    width: int,
    length: int,
    *,
    causal: bool,
    kv_heads: int | None = None,
    good: float | None = None,
    top: float | None = None,
    tune: Sequence[Config] = (),
) -> Case:
    """Return the forward of as many sequences as make up TOKENS, model width 2048."""
    num_heads = 2048 // width
    return Case(
        name="attention",
        shape=_shape(width, length, num_heads, kv_heads, causal=causal),
        make=_dense_inputs(width, length, num_heads, kv_heads or num_heads, grad=False),
        variants=_dense_variants(causal=causal, prepare=call),
        unit="TFLOP/s",
        work=_operations(width, length, num_heads, causal=causal),
        good=good,
        top=top,
        tune=Tune(op="attention_forward", key=_key(width, causal=causal), candidates=tune) if tune else None,
    )


def backward_case(
    width: int,
    length: int,
    *,
    causal: bool,
    kv_heads: int | None = None,
    good: float | None = None,
    top: float | None = None,
    tune: tuple[str, Sequence[Config]] | None = None,
) -> Case:
    """Return the backward; 2.5 times the forward's operations, however many a variant does."""
    num_heads = 2048 // width
    return Case(
        name="attention-backward",
        shape=_shape(width, length, num_heads, kv_heads, causal=causal)
        + (", tunes dk dv" if tune and "dkdv" in tune[0] else ""),
        make=_dense_inputs(width, length, num_heads, kv_heads or num_heads, grad=True),
        variants=_dense_variants(causal=causal, prepare=backward),
        unit="TFLOP/s",
        work=2.5 * _operations(width, length, num_heads, causal=causal),
        good=good,
        top=top,
        tune=Tune(op=tune[0], key=_key(width, causal=causal), candidates=tune[1]) if tune else None,
    )


def decode_case(
    batch: int,
    length: int,
    *,
    cache: torch.dtype = torch.bfloat16,
    good: float | None = None,
    top: float | None = None,
    tune: Sequence[Config] = (),
) -> Case:
    """Return one new token for each of ``batch`` sequences, 32 heads in groups of 4, E = 128, pages of 16."""
    num_kv_heads, group, width = 8, 4, 128
    size_bytes = 2 * batch * length * num_kv_heads * width * cache.itemsize
    quantized = cache is not torch.bfloat16
    variants = {"reference": call(_paged, impl="reference"), "triton": call(_paged)}
    if not quantized:
        # Against a cache that is contiguous already: better than torch can have it with pages.
        variants["torch"] = _prepare_contiguous
    name = str(cache).removeprefix("torch.")
    return Case(
        name="paged-decode",
        shape=f"B {batch}, KV {length}, H 32/8, E 128, page {PAGE}, {name}",
        make=_paged_inputs(batch, length, num_kv_heads, group, width, cache),
        variants=variants,
        unit="TB/s",
        work=float(size_bytes),
        good=good,
        top=top,
        tune=Tune(op="paged_attention", key=f"d{width},{8 * cache.itemsize} bit,decode", candidates=tune)
        if tune
        else None,
    )


def _shape(width: int, length: int, num_heads: int, kv_heads: int | None, *, causal: bool) -> str:
    heads = f"H {num_heads}" + (f"/{kv_heads}" if kv_heads else "")
    return f"B {TOKENS // length}, {heads}, S {length}, E {width}, {'causal' if causal else 'full'}, bf16"


def _key(width: int, *, causal: bool) -> str:
    return f"d{width},16 bit,{'causal' if causal else 'full'}"


def _operations(width: int, length: int, num_heads: int, *, causal: bool) -> float:
    return 4.0 * (TOKENS // length) * num_heads * length * length * width / (2 if causal else 1)


def _dense_inputs(
    width: int, length: int, num_heads: int, kv_heads: int, *, grad: bool
) -> Callable[[torch.device, bool], tuple[Tensor, ...]]:
    def make(device: torch.device, small: bool) -> tuple[Tensor, ...]:
        group = num_heads // kv_heads
        heads = (group, 1) if small else (num_heads, kv_heads)
        batch, rows = (1, 40) if small else (TOKENS // length, length)
        dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
        seed = torch.Generator(device).manual_seed(0)
        return tuple(
            torch.randn(batch, number, rows, width, device=device, dtype=torch.float32, generator=seed)
            .to(dtype)
            .requires_grad_(grad)
            for number in (heads[0], heads[1], heads[1])
        )

    return make


def _dense_variants(*, causal: bool, prepare: Callable[..., Any]) -> dict[str, Any]:
    return {
        "reference": prepare(attention, causal=causal, impl="reference"),
        "triton": prepare(attention, causal=causal),
        "torch": prepare(_sdpa, causal=causal, backend=SDPBackend.CUDNN_ATTENTION),
        "torch flash": prepare(_sdpa, causal=causal, backend=SDPBackend.FLASH_ATTENTION),
    }


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, backend: SDPBackend) -> Tensor:
    """Call torch's own with one backend; a CPU has its own and takes no wish."""
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cpu":
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def _paged_inputs(
    batch: int, length: int, num_kv_heads: int, group: int, width: int, cache: torch.dtype
) -> Callable[[torch.device, bool], tuple[Tensor | None, ...]]:
    def make(device: torch.device, small: bool) -> tuple[Tensor | None, ...]:
        num_sequences, rows, heads = (2, 48, 1) if small else (batch, length, num_kv_heads)
        dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
        seed = torch.Generator(device).manual_seed(0)
        pages_each = rows // PAGE
        shape = (num_sequences * pages_each, PAGE, heads, width)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=torch.float32, generator=seed).to(dtype)

        q, k, v = normal(num_sequences, heads * group, width), normal(*shape), normal(*shape)
        # Pages lie in no order, as they do after an hour of serving.
        pages = torch.randperm(shape[0], device=device, generator=seed).to(torch.int32)
        lengths = torch.full((num_sequences,), rows, device=device, dtype=torch.int32)
        k_scale = v_scale = None
        if cache is not torch.bfloat16:
            (k, k_scale), (v, v_scale) = quantize_kv(k, cache), quantize_kv(v, cache)
        return q, k, v, pages.view(num_sequences, pages_each), lengths, k_scale, v_scale

    return make


def _paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    **options: Any,
) -> Tensor:
    return paged_attention(q, k, v, table, lengths, k_scale=k_scale, v_scale=v_scale, **options)


def _prepare_contiguous(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *_: Tensor | None) -> Callable[[], Tensor]:
    """Gather the pages beforehand and time torch's attention over the result; all sequences have one length."""
    dense_k, dense_v = (x[table.long()].flatten(1, 2).transpose(1, 2).contiguous() for x in (k, v))
    return lambda: functional.scaled_dot_product_attention(
        q[:, :, None], dense_k, dense_v, enable_gqa=dense_k.shape[1] != q.shape[1]
    )[:, :, 0]
