"""Compares an operation with its reference, results and gradients, by the rule of :mod:`.truth`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from .truth import assert_close_as_torch, max_error, poisoned_outputs, ulp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DTYPES: list[Any] = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
"""Triton's interpreter gets bf16 wrong."""

FP32_ULPS = 4


def assert_agrees(
    ours: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[torch.Tensor], what: str = ""
) -> None:
    """Assert that results and gradients are about as close to the truth as plain torch's.

    Args:
        ours: Takes ``inputs``, returns a tensor or a tuple of them; its buffers are poisoned.
        reference: The same in plain torch, for any dtype.
        inputs: Gradients are compared for those that require one.
        what: Named by the message.
    """
    wide = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    with poisoned_outputs():
        got = results_and_gradients(ours, inputs)
    truth, yardstick = results_and_gradients(reference, wide), results_and_gradients(reference, inputs)
    for kind, grad in (("result", False), ("gradient", True)):
        for index, triple in enumerate(zip(got[kind], truth[kind], yardstick[kind], strict=True)):
            if not _is_within_ulps(*triple[:2]):
                assert_close_as_torch(*triple, grad=grad, what=f"{what} {kind} {index}")


def _is_within_ulps(got: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether an fp32 result is a few roundings off: of three numbers, torch may have got all right by chance."""
    if got.dtype is not torch.float32 or not got.numel():
        return False
    return max_error(got, truth) <= FP32_ULPS * ulp(truth.abs().max().item(), got.dtype)


def results_and_gradients(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor]
) -> dict[str, list[torch.Tensor]]:
    """Call ``function`` and differentiate all of its results, with the same incoming gradients for any dtype."""
    returned = function(*inputs)
    results: list[torch.Tensor] = list(returned) if isinstance(returned, tuple) else [returned]
    leaves = [x for x in inputs if x.requires_grad]
    if not leaves:
        return {"result": results, "gradient": []}
    generator = torch.Generator().manual_seed(1)
    # Through bf16, so that every dtype gets the same numbers.
    grads = [torch.randn(y.shape, generator=generator).bfloat16().to(y.device, y.dtype) for y in results]
    return {"result": results, "gradient": list(torch.autograd.grad(results, leaves, grads))}
