"""The optimizer of a training run and its learning rate: AdamW, linear warm-up, cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule, counted in optimizer steps."""

    peak_lr: float = 3e-3
    """Learning rate at the end of the warm-up."""
    final_lr_ratio: float = 0.1
    """Learning rate at the last step, as a part of ``peak_lr``."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises linearly; the first step already has ``peak_lr / warmup_steps``."""
    total_steps: int = 200
    """Steps after which the learning rate stays at its final value."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices; vectors (norms) are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"OptimizerConfig: warmup_steps {self.warmup_steps} is outside of 0 to total_steps {self.total_steps}"
            )
        if self.max_grad_norm <= 0:
            raise ValueError(
                f"OptimizerConfig: max_grad_norm {self.max_grad_norm} must be above 0; use math.inf for no limit"
            )


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step ``step``, the first of which is 0."""
    if step < config.warmup_steps:
        return config.peak_lr * (step + 1) / config.warmup_steps
    if step >= config.total_steps:
        return config.peak_lr * config.final_lr_ratio
    progress = (step - config.warmup_steps) / (config.total_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.peak_lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over ``model``'s weights with all of its state there, as zeros.

    Having the state before the first step lets a checkpoint be loaded, or a peer's state be received, in place.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
    _materialize(optimizer, weights)
    return optimizer


@torch.no_grad()
def _materialize(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    # a step of learning rate 0 changes no weight, whatever the optimizer
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for weight in weights:
        for value in optimizer.state[weight].values():
            value.zero_()


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = value
