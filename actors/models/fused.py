"""The decoder's operations as ``danaus.kernels`` computes them, by reference or by Triton.

Shapes:  B = sequences, T = new tokens, S = tokens attended to, D = model width, H = query heads, K = key/value heads,
         E = head width, F = hidden width of the feed-forward block, V = vocabulary;
         in a mixture N = tokens, X = experts.

The kernels are imported when they are first used: a model of plain torch needs none of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Impl = Literal["reference", "triton"]


def rms_norm(x: Tensor, w_D: Tensor, eps: float, *, impl: Impl) -> Tensor:
    """Normalise ``x[..., D]``; returns its dtype."""
    from ...kernels.rmsnorm import rmsnorm

    return rmsnorm(x, w_D, eps, impl=impl)


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor, *, impl: Impl) -> Tensor:
    """Turn element i of every head against element i + E/2 by its position's angle."""
    from ...kernels.rope import rope

    return rope(x_BHTE, cos_TE, sin_TE, impl=impl)


def attend(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, *, impl: Impl) -> Tensor:
    """Attend causally from the last T of S tokens."""
    from ...kernels.attention import attention

    return attention(q_BHTE, k_BKSE, v_BKSE, causal=True, align="bottom_right", impl=impl)


def swiglu(gate_BTF: Tensor, up_BTF: Tensor, *, impl: Impl) -> Tensor:
    """Return ``silu(gate) * up``."""
    from ...kernels.activations import swiglu as kernel

    return kernel(gate_BTF, up_BTF, impl=impl)


def mixture(
    x_ND: Tensor, logits_NX: Tensor, per_token: int, matrices: tuple[Tensor, Tensor, Tensor], *, impl: Impl
) -> Tensor:
    """Send each token through the SwiGLUs of its ``per_token`` likeliest experts, whose weights add up to 1.

    ``matrices`` are ``gate_XFD``, ``up_XFD`` and ``down_XDF``.
    """
    from ...kernels.moe import moe_mlp, route

    weights_NC, experts_NC = route(logits_NX, per_token, impl=impl)
    x_ND, gate_XFD, up_XFD, down_XDF = autocasted(x_ND, *matrices)
    return moe_mlp(x_ND, weights_NC, experts_NC, gate_XFD, up_XFD, down_XDF, impl=impl)


def sum_of_losses(x_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, *, impl: Impl) -> Tensor:
    """Return the fp32 sum of the cross-entropies of ``x @ head.T``, whose logits are never held all at once."""
    from ...kernels.cross_entropy import linear_cross_entropy

    x_BTD, head_VD = autocasted(x_BTD, head_VD)
    return linear_cross_entropy(x_BTD.flatten(0, 1), head_VD, targets_BT.flatten(), reduction="sum", impl=impl)


def autocasted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in autocast's dtype where that is on: it knows torch's own products only."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
