"""A mixture of experts: each token goes through the few feed-forward blocks that a router chooses for it.

Shapes:  N = tokens of all sequences, D = model width, X = experts, C = experts of a token, F = hidden width of one.

No token is dropped. Nothing balances the experts' loads: add a loss of the router's logits where that matters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import fused

if TYPE_CHECKING:
    from .llama import Kernels, LlamaConfig


class Experts(nn.Module):
    """SwiGLU blocks side by side; the results of a token's choices are added by the router's weights."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.kernels: Kernels = config.kernels
        self.per_token = config.experts_per_token
        num, width, hidden = config.num_experts, config.width, config.hidden_width
        self.router = nn.Linear(width, num, bias=False)
        self.gate_proj = nn.Parameter(0.02 * torch.randn(num, hidden, width))
        self.up_proj = nn.Parameter(0.02 * torch.randn(num, hidden, width))
        self.down_proj = nn.Parameter(0.02 * torch.randn(num, width, hidden))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform each token by itself."""
        x_ND = x_BTD.flatten(0, 1)
        logits_NX, matrices = self.router(x_ND), (self.gate_proj, self.up_proj, self.down_proj)
        if self.kernels == "torch":
            out_ND = mixture(x_ND, *choose(logits_NX, self.per_token), matrices)
        else:
            out_ND = fused.mixture(x_ND, logits_NX, self.per_token, matrices, impl=self.kernels)
        return out_ND.view_as(x_BTD)


def choose(logits_NX: Tensor, per_token: int) -> tuple[Tensor, Tensor]:
    """Return the fp32 weights, of sum 1, and the numbers of each token's experts: ``(weights_NC, experts_NC)``."""
    weights_NC, experts_NC = logits_NX.float().softmax(-1).topk(per_token, dim=-1)
    return weights_NC / weights_NC.sum(-1, keepdim=True), experts_NC


def mixture(x_ND: Tensor, weights_NC: Tensor, experts_NC: Tensor, matrices: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Run the experts one after another, each on its tokens; ``matrices``: ``gate_XFD``, ``up_XFD``, ``down_XDF``."""
    out_ND = torch.zeros_like(x_ND)
    for expert, (gate_FD, up_FD, down_DF) in enumerate(zip(*matrices, strict=True)):
        tokens_M, choices_M = torch.where(experts_NC == expert)
        x_MD = x_ND[tokens_M]
        hidden_MF = functional.silu(functional.linear(x_MD, gate_FD)) * functional.linear(x_MD, up_FD)
        y_MD = functional.linear(hidden_MF, down_DF) * weights_NC[tokens_M, choices_M, None]
        out_ND = out_ND.index_add(0, tokens_M, y_MD.to(out_ND.dtype))
    return out_ND
