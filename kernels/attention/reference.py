"""Attention in plain torch, on any device and differentiable: the definition of the result.

Scores are held whole, so memory grows with the square of the length. Products are in the dtype of the inputs, the
softmax is in fp32 (fp64 for fp64 inputs), as a model written in plain torch does it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(
    len_q: int, len_k: int, left: int, right: int, *, bottom_right: bool, device: torch.device
) -> Tensor | None:
    """Return the boolean ``mask[i, j]`` of what query i sees, or None where it sees all.

    Args:
        len_q: Number of queries.
        len_k: Number of keys.
        left: How many keys before its own position a query sees, -1 for all.
        right: How many after it, -1 for all; 0 is causal.
        bottom_right: Whether the last query stands at the last key, instead of the first at the first.
        device: Where the mask lies.
    """
    if left < 0 and right < 0:
        return None
    position = torch.arange(len_q, device=device) + (len_k - len_q if bottom_right else 0)
    distance = torch.arange(len_k, device=device)[None, :] - position[:, None]
    mask = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    return mask


def dense_attention_reference(
    q_BHSE: Tensor,
    k_BKTE: Tensor,
    v_BKTE: Tensor,
    *,
    left: int,
    right: int,
    bottom_right: bool,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp) of sequences of one length."""
    group = q_BHSE.shape[1] // k_BKTE.shape[1]
    k_BHTE, v_BHTE = k_BKTE.repeat_interleave(group, 1), v_BKTE.repeat_interleave(group, 1)
    wide = torch.float64 if q_BHSE.dtype is torch.float64 else torch.float32
    score = (q_BHSE @ k_BHTE.mT).to(wide) * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    mask = attention_mask(
        q_BHSE.shape[2], k_BKTE.shape[2], left, right, bottom_right=bottom_right, device=q_BHSE.device
    )
    if mask is None:
        mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device)
    # A row that sees nothing gets output 0 and log-sum-exp -inf; finite detours keep its gradients at 0.
    sees = mask.any(-1)
    lowest = torch.finfo(wide).min
    score = score.masked_fill(~mask, lowest)
    lse = score.logsumexp(-1) if score.shape[-1] else score.sum(-1)
    lse = lse.masked_fill(~sees, -torch.inf)
    probability = score.softmax(-1).masked_fill(~mask, 0.0)
    return probability.to(v_BHTE.dtype) @ v_BHTE, lse


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *,
    left: int,
    right: int,
    bottom_right: bool,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return (output, log-sum-exp); packed sequences are done one by one.

    Args:
        q: ``[B, H, S, E]``, or ``[T, H, E]`` with ``cu_seqlens``.
        k: ``[B, K, S', E]`` or ``[T', K, E]``.
        v: Shaped as ``k``.
        cu_seqlens_q: Where each packed sequence begins, and the end.
        cu_seqlens_k: The same for keys.
        left: As in :func:`attention_mask`.
        right: As in :func:`attention_mask`.
        bottom_right: As in :func:`attention_mask`.
        softcap: 0 for none.
        scale: Factor of the scores.
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return dense_attention_reference(
            q, k, v, left=left, right=right, bottom_right=bottom_right, softcap=softcap, scale=scale
        )
    edges_q: list[int] = cu_seqlens_q.tolist()
    edges_k: list[int] = cu_seqlens_k.tolist()
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for index in range(len(edges_q) - 1):
        part_q = q[edges_q[index] : edges_q[index + 1]].transpose(0, 1)[None]
        part_k = k[edges_k[index] : edges_k[index + 1]].transpose(0, 1)[None]
        part_v = v[edges_k[index] : edges_k[index + 1]].transpose(0, 1)[None]
        out, lse = dense_attention_reference(
            part_q, part_k, part_v, left=left, right=right, bottom_right=bottom_right, softcap=softcap, scale=scale
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    # Rows behind the last sequence belong to none: they read 0.
    rest = q.shape[0] - edges_q[-1]
    outs.append(q.new_zeros(rest, *q.shape[1:]))
    wide = lses[0].dtype if lses else torch.float32
    lses.append(torch.full((q.shape[1], rest), -torch.inf, dtype=wide, device=q.device))
    return torch.cat(outs), torch.cat(lses, -1)
