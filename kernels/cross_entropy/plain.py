"""Cross entropy of logits that are there already: one pass forward, one backward, no copy in fp32.

Shapes:  N = rows (tokens), V = vocabulary.
Math:    see ``terms.py``.
Cost:    memory bound: forward reads the logits once, backward reads them and writes their gradient once.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ..launch import LAUNCH_MAX, Impl, cdiv, check_device, next_power_of_2
from ..rows import as_rows, check_floats, contiguous_like
from ..tuning import config_for
from . import _triton as kernels
from .terms import Reduction, Terms, check_targets, losses_reference, reduce

# 16 elements a thread; a row of the forward is walked over in such steps.
_CONFIG = {"BLOCK_V": 4096, "num_warps": 8}


def cross_entropy_reference(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Define the result: plain torch, any device and float dtype, differentiable."""
    terms = Terms(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )
    return reduce(losses_reference(logits_NV, targets_N, terms), targets_N, terms)


def _config(op: str, vocab: int) -> dict[str, int]:
    config = config_for(op, f"V{vocab}", _CONFIG)
    return {**config, "BLOCK_V": min(config["BLOCK_V"], next_power_of_2(vocab))}


@torch.library.custom_op("danaus::cross_entropy", mutates_args=())
def _plain_op(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = as_rows(logits)
    num_rows, vocab = logits.shape
    loss_N = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    lse_N = torch.empty_like(loss_N)
    if num_rows:
        kernels.loss_kernel[(num_rows,)](
            logits,
            targets.contiguous(),
            loss_N,
            lse_N,
            vocab,
            logits.stride(0),
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            HAS_SOFTCAP=softcap > 0.0,
            **_config("cross_entropy", vocab),
        )
    return loss_N, lse_N


@_plain_op.register_fake
def _plain_fake(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    del targets, ignore_index, label_smoothing, z_loss, softcap
    loss_N = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    return loss_N, torch.empty_like(loss_N)


@torch.library.custom_op("danaus::cross_entropy_backward", mutates_args=())
def _plain_backward_op(
    dloss: torch.Tensor,
    lse: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> torch.Tensor:
    logits = as_rows(logits)
    num_rows, vocab = logits.shape
    dlogits = contiguous_like(logits)
    if not num_rows:
        return dlogits
    config = _config("cross_entropy_backward", vocab)
    blocks_per_row = cdiv(vocab, config["BLOCK_V"])
    if num_rows * blocks_per_row > LAUNCH_MAX:
        raise ValueError(f"cross_entropy: {num_rows} rows in {blocks_per_row} blocks each are too many for one launch")
    kernels.gradient_kernel[(num_rows * blocks_per_row,)](
        logits,
        targets.contiguous(),
        lse,
        dloss,
        dlogits,
        vocab,
        logits.stride(0),
        dloss.stride(0),
        blocks_per_row,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        HAS_SOFTCAP=softcap > 0.0,
        **config,
    )
    return dlogits


@_plain_backward_op.register_fake
def _plain_backward_fake(
    dloss: torch.Tensor,
    lse: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> torch.Tensor:
    del dloss, lse, targets, ignore_index, label_smoothing, z_loss, softcap
    return contiguous_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(output[1], logits, targets)


def _backward(ctx: Any, dloss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _plain_backward_op(dloss, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


_plain_op.register_autograd(_backward, setup_context=_setup_context)


def cross_entropy(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    impl: Impl = "triton",
) -> torch.Tensor:
    """Return the cross entropy of ``logits_NV``; same result as :func:`cross_entropy_reference`.

    Args:
        logits_NV: ``[N, V]`` fp32, bf16 or fp16; rows may lie apart.
        targets_N: ``[N]`` int64 or int32 class indices. One that is neither in the vocabulary nor ``ignore_index``
            makes its loss NaN (the reference raises on a CPU).
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for the loss of each row.
        ignore_index: Rows with this target have loss and gradient 0.
        label_smoothing: Part of the target spread evenly over the vocabulary, 0 to 1.
        z_loss: Weight of lse**2, added to each row's loss.
        softcap: Logits become ``softcap * tanh(logits / softcap)``.
        impl: Who computes it; "torch" is ``F.cross_entropy``, without z_loss and softcap.

    Returns:
        fp32, a scalar or ``[N]``.

    Raises:
        ValueError: Shapes, dtypes, devices or options do not fit; the message says what would.
    """
    op = "cross_entropy"
    check_device(op, impl, logits_NV, targets_N)
    if logits_NV.ndim != 2 or logits_NV.shape[1] < 1:
        raise ValueError(f"{op}: expected logits [N, V], got {list(logits_NV.shape)}")
    check_targets(op, targets_N, logits_NV.shape[0])
    terms = Terms(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )
    if impl == "reference":
        return reduce(losses_reference(logits_NV, targets_N, terms), targets_N, terms)
    if impl == "torch":
        return _torchs(logits_NV, targets_N, terms)
    check_floats(op, logits=logits_NV)
    loss_N, _ = _plain_op(logits_NV, targets_N, ignore_index, label_smoothing, z_loss, softcap or 0.0)
    return reduce(loss_N, targets_N, terms)


def _torchs(logits: torch.Tensor, targets: torch.Tensor, terms: Terms) -> torch.Tensor:
    if not terms.is_torchs:
        raise ValueError('cross_entropy: impl="torch" has neither z_loss nor softcap, use "triton" or "reference"')
    return functional.cross_entropy(
        logits.float(),
        targets.long(),
        reduction=terms.reduction,
        ignore_index=terms.ignore_index,
        label_smoothing=terms.label_smoothing,
    )
