"""Attention over a paged cache in plain torch: the definition of the result, and how a cache is quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.reference import dense_attention_reference


def quantize_kv(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (values, fp32 scales) with ``x ~ values * scales[..., None]``: one scale per token and head.

    Args:
        x: ``[..., E]`` keys or values.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``; both are symmetric around 0.
    """
    top = 127.0 if dtype is torch.int8 else torch.finfo(dtype).max
    scales = x.float().abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny * top) / top
    values = (x.float() / scales[..., None]).clamp(-top, top)
    return (values.round() if dtype is torch.int8 else values).to(dtype), scales


def paged_attention_reference(
    q_THE: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *,
    left: int,
    softcap: float,
    scale: float,
) -> Tensor:
    """Gather each sequence's pages, widen them, attend; one sequence after the other.

    Args:
        q_THE: New tokens of all sequences.
        k_cache: ``[P, page, K, E]``.
        v_cache: As ``k_cache``.
        block_table: ``[B, M]``: a sequence's pages in order.
        seq_lens: ``[B]``: tokens of each sequence, the new ones included.
        query_starts: ``[B + 1]``: where its new tokens begin in ``q``; None for one each.
        k_scale: ``[P, page, K]`` or what broadcasts to it.
        v_scale: The same for values.
        left: How many keys before its own position a token sees, -1 for all.
        softcap: 0 for none.
        scale: Factor of the scores.
    """
    out_THE = torch.zeros_like(q_THE)
    page_size = k_cache.shape[1]
    starts: list[int] = list(range(len(seq_lens) + 1)) if query_starts is None else query_starts.tolist()
    lengths: list[int] = seq_lens.tolist()
    for index, length in enumerate(lengths):
        first, end = starts[index], starts[index + 1]
        pages = block_table[index, : -(-length // page_size)].long()
        k_SKE = _gather(k_cache, k_scale, pages, q_THE.dtype)[:length]
        v_SKE = _gather(v_cache, v_scale, pages, q_THE.dtype)[:length]
        out_1HTE, _ = dense_attention_reference(
            q_THE[first:end].transpose(0, 1)[None],
            k_SKE.transpose(0, 1)[None],
            v_SKE.transpose(0, 1)[None],
            left=left,
            right=0,
            bottom_right=True,
            softcap=softcap,
            scale=scale,
        )
        out_THE[first:end] = out_1HTE[0].transpose(0, 1)
    return out_THE


def _gather(cache: Tensor, scales: Tensor | None, pages: Tensor, dtype: torch.dtype) -> Tensor:
    rows = cache[pages].flatten(0, 1)
    if scales is None:
        return rows.to(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return (rows.to(wide) * scales.expand(cache.shape[:3])[pages].flatten(0, 1)[..., None].to(wide)).to(dtype)
