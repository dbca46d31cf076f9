"""Draws the next token of each sequence from its logits: temperature, top-k, top-p, min-p, without sorting.

Shapes:  B = sequences, V = vocabulary.
Math:    gap = (max(logits) - logits) / temperature, so that p is proportional to exp(-gap). Kept are the tokens whose
         gap is at most the smallest of three: the k-th smallest gap; of those, the gap up to which the probabilities
         first sum to top_p; -log(min_p). Tokens tied with the last one are kept too. Each of the first two is found by
         bisection over the bits of the gap, which order like the (non-negative) numbers themselves.
         Among the kept, the token with the smallest gap + log(E) is drawn, E exponentially distributed: that has the
         probability exp(-gap) / sum of them. E comes from Philox with (seed, position, token) as counter: a sequence
         draws the same whatever else is in the batch, and the reference draws the same token as the kernel.
Cost:    one program a row; it reads the row 2 times, and up to 31 times more for each of top-k and top-p, mostly from
         the L2 cache. Nothing but the tokens is written.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import torch

from ..launch import Impl, cdiv, check_device, next_power_of_2
from ..rows import as_rows, check_floats
from ..tuning import config_for
from ._triton import sampling_kernel
from .reference import MAX_VOCAB, Option, Options, counters, sample_reference

# One row a program, 8 elements a thread and step; the work of a row is all reading.
_CONFIG = {"ROWS": 1, "BLOCK": 4096, "num_warps": 16}


@torch.library.custom_op("danaus::sample", mutates_args=())
def _sample_op(
    logits: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    noise: torch.Tensor,
    sharpness: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    max_gap: torch.Tensor,
) -> torch.Tensor:
    logits = as_rows(logits)
    num_rows, vocab = logits.shape
    tokens_B = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return tokens_B
    config = config_for("sampling", f"V{vocab}", _CONFIG)
    config["BLOCK"] = min(config["BLOCK"], next_power_of_2(vocab))
    sampling_kernel[(cdiv(num_rows, config["ROWS"]),)](
        logits,
        tokens_B,
        seed.contiguous(),
        position.contiguous(),
        noise,
        sharpness,
        top_k,
        top_p,
        max_gap,
        num_rows,
        vocab,
        logits.stride(0),
        HAS_TOP_K=top_k is not None,
        HAS_TOP_P=top_p is not None,
        **config,
    )
    return tokens_B


@_sample_op.register_fake
def _sample_fake(
    logits: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    noise: torch.Tensor,
    sharpness: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    max_gap: torch.Tensor,
) -> torch.Tensor:
    del seed, position, noise, sharpness, top_k, top_p, max_gap
    return torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)


@torch.no_grad()
def sample(
    logits_BV: torch.Tensor,
    *,
    seed: torch.Tensor | int,
    position: torch.Tensor | int = 0,
    temperature: Option = 1.0,
    top_k: Option = None,
    top_p: Option = None,
    min_p: Option = None,
    impl: Impl = "triton",
) -> torch.Tensor:
    """Draw a token for each row of ``logits_BV``; the same one as :func:`sample_reference`, but for rounding.

    Each option is a number or one value per row on the device of the logits (whose values are not checked).

    Args:
        logits_BV: ``[B, V]`` fp32, bf16 or fp16, V up to 2**24; rows may lie apart.
        seed: int64 ``[B]``, one for each sequence; of a single number, row i takes ``seed + i``.
        position: How many tokens the sequence has drawn before: another one draws anew.
        temperature: 0 takes the likeliest token, the first of several.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        top_p: Keep the fewest tokens whose probabilities, after top-k, sum to this; 1 keeps all.
        min_p: Keep tokens at least this part as likely as the likeliest; 0 keeps all.
        impl: Who draws. torch has no such function of its own.

    Returns:
        int64 ``[B]``; -1 for a row without a finite logit.

    Raises:
        ValueError: Shapes, dtypes, devices or options do not fit; the message says what would.
    """
    given = [t for t in (seed, position, temperature, top_k, top_p, min_p) if isinstance(t, torch.Tensor)]
    check_device("sample", impl, logits_BV, *given, choices=("reference", "triton"))
    if logits_BV.ndim != 2 or not 1 <= logits_BV.shape[1] <= MAX_VOCAB:
        raise ValueError(f"sample: expected logits [B, V], V from 1 to {MAX_VOCAB}, got {list(logits_BV.shape)}")
    if impl == "reference":
        return sample_reference(
            logits_BV,
            seed=seed,
            position=position,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
    check_floats("sample", logits=logits_BV)
    options = Options(logits_BV, temperature, top_k, top_p, min_p)
    return _sample_op(
        logits_BV,
        *counters(logits_BV, seed, position),
        options.noise_B,
        options.sharpness_B,
        options.top_k_B if options.has_top_k else None,
        options.top_p_B if options.has_top_p else None,
        options.max_gap_B,
    )
