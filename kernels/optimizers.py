"""The optimizers around the fused steps: what a training loop calls."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from .adam8bit import adam8bit_, new_state
from .adamw import adamw_

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .launch import Impl

MIN_8BIT_SIZE = 4096
"""Smaller tensors (norms, biases) keep fp32 states: they cost nothing and are the most sensitive."""


class AdamW(torch.optim.Optimizer):
    """AdamW whose step is one launch; its state has the names of ``torch.optim.AdamW``'s and can be loaded from it.

    Parameters may be DTensors (FSDP2): each rank updates its own shard. ``grad_scale``, where set, is multiplied with
    every gradient of the next step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        impl: Impl = "triton",
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamW: lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={betas}: out of range")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._impl: Impl = impl
        self.grad_scale: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; return what ``closure`` does, called with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for step, tensors in self._by_step(group["params"]).items():
                adamw_(
                    *(list(column) for column in zip(*tensors, strict=True)),
                    step=step,
                    lr=float(group["lr"]),
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    grad_scale=self.grad_scale,
                    impl=self._impl,
                )
        return loss

    def _by_step(self, params: list[torch.Tensor]) -> dict[int, list[tuple[torch.Tensor, ...]]]:
        """Count this step for each parameter with a gradient; usually all of them are at the same."""
        found: defaultdict[int, list[tuple[torch.Tensor, ...]]] = defaultdict(list)
        for p in params:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["step"] += 1
            local = (local_part(t) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
            found[int(state["step"].item())].append(tuple(local))
        return found


def local_part(x: Any) -> torch.Tensor:
    """Return the shard of a DTensor that lies here, any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


class AdamW8bit(AdamW):
    """AdamW whose moments take 2.03 bytes a parameter; tensors below MIN_8BIT_SIZE keep them in fp32.

    Parameters may be DTensors (FSDP2): each rank quantizes its own shard, so a checkpoint of the codes belongs to that
    sharding.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = MIN_8BIT_SIZE,
        impl: Impl = "triton",
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, impl=impl)
        self._min_8bit_size = min_8bit_size

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what ``closure`` does, called with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            large = [p for p in params if local_part(p).numel() >= self._min_8bit_size]
            small = [p for p in params if local_part(p).numel() < self._min_8bit_size]
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            for step, rows in self._by_step(small).items():
                columns = [list(column) for column in zip(*rows, strict=True)]
                adamw_(*columns, step=step, **options, impl=self._impl)
            for step, rows in self._by_step_8bit(large).items():
                columns = [list(column) for column in zip(*rows, strict=True)]
                adam8bit_(*columns, step=step, **options, impl=self._impl)
        return loss

    def _by_step_8bit(self, params: list[Any]) -> dict[int, list[tuple[Any, ...]]]:
        found: defaultdict[int, list[tuple[Any, ...]]] = defaultdict(list)
        for p in params:
            state, local = self.state[p], local_part(p)
            if not state:
                state["step"] = torch.tensor(0.0)
                for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                    state[f"{name}_codes"], state[f"{name}_scales"] = new_state(local, signed=signed)
            state["step"] += 1
            moments = ((state[f"{name}_codes"], state[f"{name}_scales"]) for name in ("exp_avg", "exp_avg_sq"))
            found[int(state["step"].item())].append((local, local_part(p.grad), *moments))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned; codes and scales as they are, where torch would give them p's dtype."""
        super().load_state_dict(state_dict)
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name.endswith(("_codes", "_scales")):
                    self.state[p][name] = value.to(local_part(p).device, copy=True)
