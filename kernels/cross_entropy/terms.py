"""What both forms of the loss share: its options, its definition in torch, its reduction.

Math:  z = logits, or softcap * tanh(logits / softcap);  lse = log(sum exp z);  t = target;  s = label smoothing.
       loss = lse - (1 - s) z[t] - s mean(z) + z_loss * lse**2
       dz = softmax(z) (1 + 2 z_loss lse) - (1 - s) onehot(t) - s / V;  dlogits = dz (1 - (z / softcap)**2)
       A row whose target is ``ignore_index`` has loss and gradient 0 and does not count in the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """The options of the loss, checked."""

    reduction: Reduction
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None

    def __post_init__(self) -> None:
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction={self.reduction!r} is not there, it is one of {get_args(Reduction)}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing} is outside of [0, 1]")
        if self.z_loss < 0.0:
            raise ValueError(f"z_loss={self.z_loss} is negative; it is the weight of lse**2")
        if self.softcap is not None and self.softcap <= 0.0:
            raise ValueError(f"softcap={self.softcap} has to be positive; None leaves it out")

    @property
    def is_torchs(self) -> bool:
        """Whether ``torch.nn.functional`` knows all that is asked for."""
        return self.z_loss == 0.0 and self.softcap is None


def losses_reference(logits_NV: torch.Tensor, targets_N: torch.Tensor, terms: Terms) -> torch.Tensor:
    """Define the loss of each row, in fp32 (fp64 for fp64 logits)."""
    z_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if terms.softcap is not None:
        z_NV = terms.softcap * torch.tanh(z_NV / terms.softcap)
    lse_N = torch.logsumexp(z_NV, -1)
    ignored_N = targets_N == terms.ignore_index
    z_target_N = z_NV.gather(1, targets_N.long().masked_fill(ignored_N, 0)[:, None]).squeeze(1)
    smoothing = terms.label_smoothing
    loss_N = lse_N - (1.0 - smoothing) * z_target_N + terms.z_loss * lse_N.square()
    if smoothing:
        loss_N = loss_N - smoothing * z_NV.mean(-1)
    return loss_N.masked_fill(ignored_N, 0.0)


def reduce(loss_N: torch.Tensor, targets_N: torch.Tensor, terms: Terms) -> torch.Tensor:
    """Return the losses themselves, their sum, or their mean over the rows that are not ignored (NaN for none)."""
    if terms.reduction == "none":
        return loss_N
    if terms.reduction == "sum":
        return loss_N.sum()
    return loss_N.sum() / (targets_N != terms.ignore_index).sum()


def check_targets(op: str, targets: torch.Tensor, num_rows: int) -> None:
    """Refuse targets that are not one class index per row; their values are not looked at."""
    if targets.shape != (num_rows,) or targets.dtype not in {torch.int64, torch.int32}:
        raise ValueError(
            f"{op}: expected int64 or int32 targets [{num_rows}], got {list(targets.shape)} {targets.dtype}"
        )
