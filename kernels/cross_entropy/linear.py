"""Cross entropy of ``x @ weight.T`` in memory that does not grow with the vocabulary.

Shapes:  N = rows (tokens), D = features, V = vocabulary.
Math:    see ``terms.py``. Forward: each program computes tiles of logits in registers and folds them into a running
         log-sum-exp of its rows over one share of the vocabulary; a small kernel joins the shares. Backward: for a
         chunk of columns at a time the logits are computed again and leave the registers as their gradient G; then
         dx += G @ weight[chunk] in fp32, and dweight[chunk] = G^T @ x, each once, by torch (cuBLAS).
Cost:    2 N V D operations forward, 6 N V D backward (2 of them the recomputed logits). Memory beside the gradients:
         G_BYTES for a chunk, dx in fp32, and 16 bytes per row and share. Logits are fp32, G has x's dtype. No atomics:
         the same bits in every run.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ..launch import Impl, cdiv, check_device, next_power_of_2, num_sms
from ..rows import check_floats
from ..tuning import config_for
from . import _triton as kernels
from .terms import Reduction, Terms, check_targets, losses_reference, reduce

G_BYTES = 256 << 20
"""Size of a chunk of logit gradients: large enough for full matrix multiplications, small beside the model."""

WAVES = 4
"""Programs of the forward for each multiprocessor; more even out the end, fewer keep the joined sums few."""

MAX_SHARES = 64

# 128 x 256 tiles of fp32 sums in 8 warps are what fills Hopper's matrix units; 64 features a step, three in flight.
_HALF = {"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_D": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3}
# tanh takes registers that the sums of the wide tile leave none of.
_HALF_SOFTCAP = {**_HALF, "BLOCK_V": 128}
# fp32 is multiplied in full precision, without matrix units: tiles that fit the registers.
_FULL = {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "GROUP": 16, "num_warps": 4, "num_stages": 2}


def linear_cross_entropy_reference(
    x_ND: torch.Tensor,
    w_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Define the result: plain torch with all logits in memory, any device and float dtype, differentiable."""
    terms = Terms(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )
    return reduce(losses_reference(functional.linear(x_ND, w_VD), targets_N, terms), targets_N, terms)


def tile_config(dtype: torch.dtype, *, softcap: bool) -> dict[str, int]:
    """Return the default tile for inputs of ``dtype``."""
    if dtype is torch.float32:
        return dict(_FULL)
    return dict(_HALF_SOFTCAP if softcap else _HALF)


def _config(op: str, x: torch.Tensor, *, softcap: bool) -> dict[str, Any]:
    num_features = x.shape[1]
    key = f"D{num_features},{x.dtype.itemsize * 8}{',softcap' if softcap else ''}"
    config: dict[str, Any] = config_for(op, key, tile_config(x.dtype, softcap=softcap))
    # Small inputs take small tiles: the matrix units' smallest side is 16.
    config["BLOCK_N"] = min(config["BLOCK_N"], max(16, next_power_of_2(x.shape[0])))
    config["BLOCK_D"] = min(config["BLOCK_D"], max(16, next_power_of_2(num_features)))
    config["EVEN_D"] = num_features % config["BLOCK_D"] == 0
    config["PRECISION"] = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return config


def _num_shares(row_blocks: int, vocab_blocks: int, device: torch.device) -> int:
    """Into how many shares the vocabulary is cut: whole waves of programs, and never more with a larger vocabulary."""
    wanted = max(1, WAVES * num_sms(device) // row_blocks)
    return min(wanted, MAX_SHARES, vocab_blocks)


@torch.library.custom_op("danaus::linear_cross_entropy", mutates_args=())
def _linear_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, targets = _inner_contiguous(x), _inner_contiguous(weight), targets.contiguous()
    (num_rows, num_features), vocab = x.shape, weight.shape[0]
    loss_N = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    lse_N = torch.empty_like(loss_N)
    if not num_rows:
        return loss_N, lse_N
    config = _config("linear_cross_entropy", x, softcap=softcap > 0.0)
    row_blocks = cdiv(num_rows, config["BLOCK_N"])
    num_shares = _num_shares(row_blocks, cdiv(vocab, config["BLOCK_V"]), x.device)
    share = cdiv(cdiv(vocab, num_shares), config["BLOCK_V"]) * config["BLOCK_V"]
    num_shares = cdiv(vocab, share)
    parts_4NS = torch.empty((4, num_rows, num_shares), dtype=torch.float32, device=x.device)
    kernels.linear_lse_kernel[(row_blocks * num_shares,)](
        x,
        weight,
        targets,
        *parts_4NS.unbind(0),
        num_rows,
        vocab,
        num_features,
        x.stride(0),
        weight.stride(0),
        share,
        num_shares,
        softcap,
        HAS_SOFTCAP=softcap > 0.0,
        HAS_SMOOTHING=label_smoothing > 0.0,
        **config,
    )
    block = 32
    kernels.lse_join_kernel[(cdiv(num_rows, block),)](
        *parts_4NS.unbind(0),
        targets,
        loss_N,
        lse_N,
        num_rows,
        vocab,
        num_shares,
        ignore_index,
        label_smoothing,
        z_loss,
        HAS_SMOOTHING=label_smoothing > 0.0,
        BLOCK_N=block,
        SHARES=next_power_of_2(num_shares),
    )
    return loss_N, lse_N


@_linear_op.register_fake
def _linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    del weight, targets, ignore_index, label_smoothing, z_loss, softcap
    loss_N = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return loss_N, torch.empty_like(loss_N)


@torch.library.custom_op("danaus::linear_cross_entropy_backward", mutates_args=())
def _linear_backward_op(
    dloss: torch.Tensor,
    lse: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs_dx: bool,
    needs_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, targets = _inner_contiguous(x), _inner_contiguous(weight), targets.contiguous()
    (num_rows, num_features), vocab = x.shape, weight.shape[0]
    dx_ND = torch.zeros((num_rows if needs_dx else 0, num_features), dtype=torch.float32, device=x.device)
    dw_VD = torch.empty((vocab if needs_dw else 0, num_features), dtype=weight.dtype, device=x.device)
    if not num_rows:
        return dx_ND.to(x.dtype), dw_VD.zero_()
    config = _config("linear_cross_entropy_backward", x, softcap=softcap > 0.0)
    columns = _columns(num_rows, vocab, x.dtype.itemsize, config["BLOCK_V"])
    buffer = torch.empty(num_rows * columns, dtype=x.dtype, device=x.device)
    for first in range(0, vocab, columns):
        end = min(first + columns, vocab)
        g_NC = buffer[: num_rows * (end - first)].view(num_rows, end - first)
        kernels.linear_gradient_kernel[(cdiv(num_rows, config["BLOCK_N"]) * cdiv(end - first, config["BLOCK_V"]),)](
            x,
            weight,
            targets,
            lse,
            dloss,
            g_NC,
            num_rows,
            vocab,
            num_features,
            x.stride(0),
            weight.stride(0),
            dloss.stride(0),
            first,
            end,
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            HAS_SOFTCAP=softcap > 0.0,
            **config,
        )
        if needs_dx:
            _add_product(dx_ND, g_NC, weight[first:end])
        if needs_dw:
            torch.mm(g_NC.t(), x, out=dw_VD[first:end])
    return dx_ND.to(x.dtype), dw_VD


@_linear_backward_op.register_fake
def _linear_backward_fake(
    dloss: torch.Tensor,
    lse: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs_dx: bool,
    needs_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    del dloss, lse, targets, ignore_index, label_smoothing, z_loss, softcap
    dx = torch.empty((x.shape[0] if needs_dx else 0, x.shape[1]), dtype=x.dtype, device=x.device)
    dw = torch.empty((weight.shape[0] if needs_dw else 0, x.shape[1]), dtype=weight.dtype, device=x.device)
    return dx, dw


def _columns(num_rows: int, vocab: int, itemsize: int, block: int) -> int:
    """Return how many columns of G fit G_BYTES, in whole tiles and at least one."""
    fitting = G_BYTES // (num_rows * itemsize) // block * block
    return min(max(fitting, block), vocab)


def _add_product(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add ``a @ b`` to an fp32 tensor; on a GPU without rounding the product to the dtype of its factors."""
    if a.dtype is torch.float32:
        acc.addmm_(a, b)
    elif a.device.type == "cuda":
        acc.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        acc.add_(torch.mm(a.float(), b.float()))


def _inner_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(output[1], x, weight, targets)


def _backward(ctx: Any, dloss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs_dx, needs_dw = ctx.needs_input_grad[:2]
    dx, dw = _linear_backward_op(dloss, *ctx.saved_tensors, *ctx.options, needs_dx, needs_dw)
    return dx if needs_dx else None, dw if needs_dw else None, None, None, None, None, None


_linear_op.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(
    x_ND: torch.Tensor,
    w_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    impl: Impl = "triton",
) -> torch.Tensor:
    """Return the cross entropy of the logits ``x_ND @ w_VD.T`` without holding them.

    Same result as :func:`linear_cross_entropy_reference`.

    Args:
        x_ND: ``[N, D]`` fp32, bf16 or fp16, the hidden states.
        w_VD: ``[V, D]`` of the same dtype, the head. Where it needs no gradient, none is computed.
        targets_N: ``[N]`` int64 or int32 class indices. One that is neither in the vocabulary nor ``ignore_index``
            makes its loss NaN (the reference raises on a CPU).
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for the loss of each row.
        ignore_index: Rows with this target have loss and gradient 0.
        label_smoothing: Part of the target spread evenly over the vocabulary, 0 to 1.
        z_loss: Weight of lse**2, added to each row's loss.
        softcap: Logits become ``softcap * tanh(logits / softcap)``.
        impl: Who computes it; "torch" is ``F.linear_cross_entropy`` (torch 2.13), without z_loss and softcap.

    Returns:
        fp32, a scalar or ``[N]``.

    Raises:
        ValueError: Shapes, dtypes, devices or options do not fit; the message says what would.
    """
    op = "linear_cross_entropy"
    check_device(op, impl, x_ND, w_VD, targets_N)
    if x_ND.ndim != 2 or w_VD.ndim != 2 or x_ND.shape[1] != w_VD.shape[1] or x_ND.dtype != w_VD.dtype:
        raise ValueError(
            f"{op}: expected x [N, D] and w [V, D] of one dtype, got {list(x_ND.shape)} {x_ND.dtype} and "
            f"{list(w_VD.shape)} {w_VD.dtype}"
        )
    check_targets(op, targets_N, x_ND.shape[0])
    terms = Terms(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )
    if impl == "reference":
        return reduce(losses_reference(functional.linear(x_ND, w_VD), targets_N, terms), targets_N, terms)
    if impl == "torch":
        return _torchs(x_ND, w_VD, targets_N, terms)
    check_floats(op, x=x_ND, w=w_VD)
    loss_N, _ = _linear_op(x_ND, w_VD, targets_N, ignore_index, label_smoothing, z_loss, softcap or 0.0)
    return reduce(loss_N, targets_N, terms)


def _torchs(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, terms: Terms) -> torch.Tensor:
    function: Any = getattr(functional, "linear_cross_entropy", None)
    if function is None or not terms.is_torchs:
        lack = "needs torch 2.13" if function is None else "has neither z_loss nor softcap"
        raise ValueError(f'linear_cross_entropy: impl="torch" {lack}, use "triton" or "reference"')
    return function(
        x,
        weight,
        targets.long(),
        reduction=terms.reduction,
        ignore_index=terms.ignore_index,
        label_smoothing=terms.label_smoothing,
    )
