"""Tokens to rows and back against plain indexing: values, gradients, what was dropped, what nobody uses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from danaus.kernels.moe import (
    Order,
    permutation,
    permute,
    permute_reference,
    sort_by_expert_reference,
    unpermute,
    unpermute_reference,
)
from danaus.kernels.tuning import using

from ..agree import DTYPES, assert_agrees
from ..truth import Canaries, misaligned, strided


def order_of(tokens: int, k: int, device: torch.device, capacity: int | None = None) -> Order:
    return sort_by_expert_reference(torch.randint(-1, 4, (tokens, k), device=device), 4, capacity=capacity)


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 1), (7, 3, 17), (9, 2, 64)])
@pytest.mark.parametrize("capacity", [None, 2])
def test_it_equals_the_reference(
    capacity: int | None, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    tokens, k, width = shape
    order = order_of(tokens, k, device, capacity)
    x = normal(tokens, width, device=device, dtype=dtype)
    ys = normal(order.source.numel(), width, device=device, dtype=dtype)
    weights = normal(tokens, k, device=device)

    assert_agrees(partial(permute, order=order), partial(permute_reference, order=order), (x,), "permute")
    for inputs in ((ys,), (ys, weights)):
        assert_agrees(lambda y, *w: unpermute(y, order, *w), lambda y, *w: unpermute_reference(y, order, *w), inputs)


@pytest.mark.parametrize("layout", [strided, misaligned, lambda x: x.detach().t().clone().t().requires_grad_()])
def test_any_layout_of_the_rows_will_do(layout: Any, device: torch.device) -> None:
    order = order_of(5, 2, device)
    x, ys, weights = (layout(normal(n, d, device=device)) for n, d in ((5, 9), (10, 9), (5, 2)))

    assert_agrees(partial(permute, order=order), partial(permute_reference, order=order), (x,))
    assert_agrees(lambda y, w: unpermute(y, order, w), lambda y, w: unpermute_reference(y, order, w), (ys, weights))


def test_rows_may_be_wider_than_a_block(device: torch.device) -> None:
    order = order_of(4, 2, device, 2)
    x, ys, weights = (normal(*shape, device=device) for shape in ((4, 70), (order.source.numel(), 70), (4, 2)))

    with using("moe_permute", {"BLOCK": 32}), using("moe_unpermute", {"BLOCK": 32}):
        assert_agrees(partial(permute, order=order), partial(permute_reference, order=order), (x,))
        with using("moe_weight_grad", {"BLOCK": 32}):
            assert_agrees(
                lambda y, w: unpermute(y, order, w), lambda y, w: unpermute_reference(y, order, w), (ys, weights)
            )


def test_there_and_back_is_the_token_times_its_choices(device: torch.device) -> None:
    order = sort_by_expert_reference(torch.randint(0, 4, (6, 3), device=device), 4)
    x = normal(6, 5, device=device)

    torch.testing.assert_close(unpermute(permute(x, order), order), 3 * x)


@pytest.mark.parametrize("impl", ["reference", "triton", "torch"])
def test_what_nobody_uses_reaches_nobody(impl: Any, device: torch.device) -> None:
    order = sort_by_expert_reference(torch.tensor([[0, -1], [-1, -1]], device=device), 2)
    x = normal(2, 5, device=device)
    ys = torch.full((4, 5), float("nan"), device=device)
    ys[0] = 1.0
    weights = torch.tensor([[0.5, float("nan")], [1.0, 1.0]], device=device)
    if impl != "triton":
        weights = weights.nan_to_num()

    xs = permute(x, order, impl=impl)
    y = unpermute(ys, order, weights, impl=impl)

    assert torch.equal(xs[0], x[0])
    assert not xs[1:].any()
    assert y.tolist() == [[0.5] * 5, [0.0] * 5]


def test_the_same_bits_every_time(device: torch.device) -> None:
    order = order_of(8, 4, device)
    ys, weights = normal(32, 33, device=device), normal(8, 4, device=device)

    def gradients() -> tuple[torch.Tensor, ...]:
        y = unpermute(ys, order, weights)
        return (y, *torch.autograd.grad(y, (ys, weights), torch.ones_like(y)))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_it_writes_only_its_results(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    order = order_of(5, 2, device, 2)
    canaries = Canaries()
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: canaries.around(make(*shape, **options)))
    x, weights = normal(5, 9, device=device), normal(5, 2, device=device)

    y = unpermute(permute(x, order), order, weights)
    torch.autograd.grad(y, (x, weights), torch.ones_like(y))

    canaries.check()


def test_the_references_gradient_is_its_derivative() -> None:
    cpu = torch.device("cpu")
    order = order_of(3, 2, cpu, 1)
    x, ys, weights = (
        normal(*shape, device=cpu, dtype=torch.float64) for shape in ((3, 2), (order.source.numel(), 2), (3, 2))
    )

    assert torch.autograd.gradcheck(partial(permute_reference, order=order), (x,))
    assert torch.autograd.gradcheck(lambda y, w: unpermute_reference(y, order, w), (ys, weights))


@pytest.mark.timeout(60)
def test_torch_may_trace_it(device: torch.device) -> None:
    order = order_of(3, 2, device)
    x, ys, weights = normal(3, 5, device=device), normal(6, 5, device=device), normal(3, 2, device=device)

    torch.library.opcheck(permutation._permute_op, (x, order.source, order.place))
    torch.library.opcheck(permutation._unpermute_op, (ys, order.source, order.place, weights))
    torch.library.opcheck(permutation._unpermute_op, (ys, order.source, order.place, None))


def test_it_says_what_it_takes(device: torch.device) -> None:
    order = order_of(3, 2, device)

    with pytest.raises(ValueError, match=r"T = 3 as in the order, got \[4, 5\]"):
        permute(torch.zeros(4, 5, device=device), order)
    with pytest.raises(ValueError, match=r"M = 6 as in the order, got \[4, 5\]"):
        unpermute(torch.zeros(4, 5, device=device), order)
    with pytest.raises(ValueError, match="make them alike"):
        unpermute(torch.zeros(6, 5, device=device), order, torch.zeros(3, 1, device=device))
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        permute(torch.zeros(3, 5, device=device).double(), order)
