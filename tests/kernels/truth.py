"""What counts as right: errors measured against a wide reference, with plain torch of the same dtype as the yardstick.

Buffers of the tests are poisoned: outputs start as NaN, and canaries stand around what a kernel may touch.
"""

from __future__ import annotations

from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

CANARY_ELEMENTS = 256


def max_error(got: torch.Tensor, ref64: torch.Tensor) -> float:
    """Largest absolute difference; a NaN counts as infinite, equal infinities as no difference."""
    assert got.shape == ref64.shape, f"shape {tuple(got.shape)}, expected {tuple(ref64.shape)}"
    if got.numel() == 0:
        return 0.0
    wide, ref = got.detach().to("cpu", torch.float64), ref64.detach().to("cpu", torch.float64)
    difference = torch.where(wide == ref, torch.zeros_like(wide), (wide - ref).abs())
    return torch.where(difference.isnan(), torch.inf, difference).max().item()


def assert_close_as_torch(
    got: torch.Tensor, ref64: torch.Tensor, torch_same_dtype: torch.Tensor, *, grad: bool = False, what: str = "result"
) -> None:
    """Assert that ``got`` is about as close to the truth as plain torch is at the same dtype.

    Args:
        got: The kernel's result.
        ref64: The reference on the same inputs widened to fp64 (fp32 at least).
        torch_same_dtype: The reference on the inputs as they are.
        grad: Whether it is a gradient: three times torch's error is allowed instead of two.
        what: Named by the message.
    """
    assert got.dtype == torch_same_dtype.dtype, f"{what}: {got.dtype}, expected {torch_same_dtype.dtype}"
    if got.numel() == 0:
        assert got.shape == ref64.shape
        return
    error, yardstick = max_error(got, ref64), max_error(torch_same_dtype, ref64)
    allowed = max((3 if grad else 2) * yardstick, ulp(ref64.detach().abs().max().item(), got.dtype))
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} (torch's own: {yardstick:.3g})"


def ulp(value: float, dtype: torch.dtype) -> float:
    """Distance from ``value`` to the next larger number of ``dtype``."""
    info = torch.finfo(dtype)
    exponent = torch.tensor(max(abs(value), info.smallest_normal), dtype=torch.float64).log2().floor().item()
    return float(info.eps * 2.0**exponent)


def poisoned(shape: Sequence[int], dtype: torch.dtype = torch.float32, device: object = "cpu") -> torch.Tensor:
    """Return a buffer that shows what was not written: NaN, or the largest value of an integer dtype."""
    filling = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    return torch.full(tuple(shape), filling, dtype=dtype, device=str(device))


@contextmanager
def poisoned_outputs() -> Generator[None]:
    """Within it ``torch.empty``, ``empty_like``, ``empty_strided`` and ``Tensor.new_empty`` return poisoned buffers."""

    def poisoning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*arguments: object, **options: object) -> torch.Tensor:
            made = make(*arguments, **options)
            if made.dtype is torch.bool or made.is_complex() or made.device.type == "meta":
                return made
            filling = float("nan") if made.dtype.is_floating_point else torch.iinfo(made.dtype).max
            return made.fill_(filling)

        return empty

    with (
        patch.object(torch, "empty", poisoning(torch.empty)),
        patch.object(torch, "empty_like", poisoning(torch.empty_like)),
        patch.object(torch, "empty_strided", poisoning(torch.empty_strided)),
        patch.object(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty)),
    ):
        yield


def odd_shapes() -> list[tuple[int, int]]:
    """Rows and columns that no block size divides, with the empty and the smallest ones."""
    return [(0, 8), (1, 1), (1, 3), (3, 17), (5, 64), (7, 129)]


def strided(x: torch.Tensor) -> torch.Tensor:
    """Return an equal tensor whose rows lie apart and whose last dim is contiguous; requires_grad is kept."""
    shape = (*x.shape[:-1], x.shape[-1] + 5)
    wide = poisoned(shape, x.dtype, x.device)
    view = wide[..., : x.shape[-1]]
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """Return an equal contiguous tensor that starts one element behind an aligned address."""
    buffer = poisoned((x.numel() + 1,), x.dtype, x.device)
    view = buffer[1:].view(x.shape)
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


class Canaries:
    """Hands out buffers with known values in front and behind, which :meth:`check` expects to find again."""

    def __init__(self) -> None:
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def around(self, x: torch.Tensor) -> torch.Tensor:
        """Return a contiguous tensor equal to ``x`` in the middle of a guarded buffer."""
        whole = poisoned((x.numel() + 2 * CANARY_ELEMENTS,), x.dtype, x.device)
        view = whole[CANARY_ELEMENTS : CANARY_ELEMENTS + prod(x.shape)].view(x.shape)
        view.copy_(x.detach())
        before = whole.clone()
        before[CANARY_ELEMENTS : CANARY_ELEMENTS + x.numel()] = 0
        self._buffers.append((whole, before))
        return view

    def check(self) -> None:
        """Assert that nothing was written outside of what was handed out."""
        for whole, before in self._buffers:
            now = whole.clone()
            now[CANARY_ELEMENTS : now.numel() - CANARY_ELEMENTS] = 0
            before[CANARY_ELEMENTS : now.numel() - CANARY_ELEMENTS] = 0
            assert torch.equal(now.view(torch.uint8), before.view(torch.uint8)), "a canary was overwritten"
