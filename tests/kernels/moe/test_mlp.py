"""Whole experts against a loop over them: values, gradients, drops, and what a layer made of the parts does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from danaus.kernels.moe import mlp, moe_mlp, moe_mlp_reference, route, sort_by_expert
from danaus.kernels.tuning import using

from ..agree import DTYPES, assert_agrees
from ..truth import Canaries, strided

X, D, F = 3, 16, 24


def experts_of(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    shapes = ((X, F, D), (X, F, D), (X, D, F))
    return tuple((torch.randn(s, device=device) / s[-1] ** 0.5).to(dtype).requires_grad_() for s in shapes)


def inputs(tokens: int, k: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Return x, weights, chosen experts and the experts' matrices."""
    x = torch.randn(tokens, D, device=device, dtype=dtype, requires_grad=True)
    weights = torch.rand(tokens, k, device=device, requires_grad=True)
    chosen = torch.stack([torch.randperm(X, device=device)[:k] for _ in range(tokens)]) if tokens else None
    if chosen is None:
        chosen = torch.zeros(0, k, device=device, dtype=torch.int64)
    return x, weights, chosen, *experts_of(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "k", "capacity"), [(0, 2, None), (1, 1, None), (13, 2, 4)])
def test_it_equals_the_loop(
    tokens: int, k: int, capacity: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    assert_agrees(
        partial(moe_mlp, capacity=capacity),
        partial(moe_mlp_reference, capacity=capacity),
        inputs(tokens, k, device, dtype),
    )


@pytest.mark.parametrize("capacity", [None, 4])
def test_torchs_own_is_the_same(capacity: int | None, device: torch.device) -> None:
    assert_agrees(
        partial(moe_mlp, capacity=capacity, impl="torch"),
        partial(moe_mlp_reference, capacity=capacity),
        inputs(13, 2, device, torch.float16),
    )


@pytest.mark.parametrize("impl", ["reference", "triton", "torch"])
def test_dropped_tokens_pass_by_the_residual(impl: Any, device: torch.device) -> None:
    x, weights, _, *experts = inputs(6, 1, device, torch.float16)
    chosen = torch.zeros(6, 1, device=device, dtype=torch.int64)

    y = x + moe_mlp(x, weights, chosen, *experts, capacity=2, impl=impl)
    (grad,) = torch.autograd.grad(y.sum(), x)

    assert torch.equal(y[2:], x[2:])
    assert not torch.equal(y[:2], x[:2])
    assert torch.equal(grad[2:], torch.ones_like(grad[2:]))


def test_ranks_that_share_the_experts_add_up(device: torch.device) -> None:
    x, weights, chosen, *experts = inputs(7, 2, device)

    whole = moe_mlp(x, weights, chosen, *experts)
    parts = [
        moe_mlp(x, weights, chosen - first, *(w[first : first + size] for w in experts))
        for first, size in ((0, 1), (1, 2))
    ]

    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_frozen_experts_get_no_gradient(device: torch.device) -> None:
    x, weights, chosen, *experts = inputs(5, 2, device)
    frozen = [w.detach() for w in experts]

    assert_agrees(moe_mlp, moe_mlp_reference, (x, weights, chosen, *frozen))


def test_any_layout_will_do(device: torch.device) -> None:
    x, weights, chosen, gate, up, down = inputs(5, 2, device)
    turned = down.detach().mT.contiguous().mT.requires_grad_()

    assert_agrees(
        moe_mlp,
        moe_mlp_reference,
        (strided(x), strided(weights), chosen.t().contiguous().t(), strided(gate), up, turned),
    )


def test_a_layer_learns_as_the_reference_does(device: torch.device) -> None:
    x = torch.randn(5, D, device=device)
    start = [torch.randn(X, D, device=device), *experts_of(device, torch.float32)]

    def losses(impl: Any) -> list[float]:
        router, *experts = (w.detach().clone().requires_grad_() for w in start)
        found: list[float] = []
        for _ in range(2):
            weights, chosen = route(x @ router.t(), 2, impl=impl)
            y = x + moe_mlp(x, weights, chosen, *experts, impl=impl)
            loss = (y - x.flip(0)).square().mean()
            for w, grad in zip((router, *experts), torch.autograd.grad(loss, (router, *experts)), strict=True):
                w.data -= 0.5 * grad
            found.append(loss.item())
        return found

    ours = losses("triton")

    assert ours == pytest.approx(losses("reference"), rel=1e-5)
    assert ours[-1] < ours[0]


def test_the_same_bits_every_time(device: torch.device) -> None:
    x, weights, chosen, *experts = inputs(4, 2, device)

    def results() -> tuple[torch.Tensor, ...]:
        y = moe_mlp(x, weights, chosen, *experts)
        return (y, *torch.autograd.grad(y, (x, weights, *experts), torch.ones_like(y)))

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


def test_it_writes_only_its_results(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = Canaries()
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: canaries.around(make(*shape, **options)))
    x, weights, chosen, *experts = inputs(5, 2, device)

    y = moe_mlp(x, weights, chosen, *experts, capacity=2)
    torch.autograd.grad(y, (x, weights, *experts), y.detach())

    canaries.check()


def test_the_references_gradient_is_its_derivative() -> None:
    x, weights, chosen, *experts = inputs(3, 2, torch.device("cpu"))
    wide = [t.detach().double()[..., :3].requires_grad_() for t in (x, *experts)]
    wide[1:3] = [w.detach()[:, :2].requires_grad_() for w in wide[1:3]]
    wide[3] = wide[3].detach()[:, :3, :2].requires_grad_()

    def run(x: torch.Tensor, weights: torch.Tensor, *experts: torch.Tensor) -> torch.Tensor:
        return moe_mlp_reference(x, weights, chosen, *experts, capacity=2)

    assert torch.autograd.gradcheck(run, (wide[0], weights.detach().double().requires_grad_(), *wide[1:]))


@pytest.mark.timeout(60)
def test_torch_may_trace_it(device: torch.device) -> None:
    x, weights, chosen, *experts = inputs(2, 1, device)
    order = sort_by_expert(chosen, X)

    with using("grouped_mm", {"BLOCK_M": 16}), using("grouped_mm_weight_grad", {"BLOCK_M": 16}):
        torch.library.opcheck(mlp._mlp_op, (x, weights, *order, *experts))


def test_it_says_what_it_takes(device: torch.device) -> None:
    x, weights, chosen, gate, up, down = inputs(3, 2, device)

    with pytest.raises(ValueError, match=r"got \[3, 16\], \[3, 2\] and \[3, 1\]"):
        moe_mlp(x, weights, chosen[:, :1], gate, up, down)
    with pytest.raises(ValueError, match=r"w_down \[X, D, F\] with D = 16, got \[3, 24, 16\]"):
        moe_mlp(x, weights, chosen, gate, up, down.mT)
    with pytest.raises(ValueError, match="cast to one dtype"):
        moe_mlp(x.half(), weights, chosen, gate, up, down)


@pytest.mark.gpu
def test_nothing_waits_for_the_host(device: torch.device) -> None:
    x, weights, chosen, *experts = inputs(200, 2, device, torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        y = moe_mlp(x, weights, chosen, *experts, capacity=100)
        return (y, *torch.autograd.grad(y, (x, weights, *experts), torch.ones_like(y)))

    # Compiles.
    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
def test_a_cuda_graph_may_hold_it(device: torch.device) -> None:
    x, weights, chosen, *experts = (t.detach() for t in inputs(200, 2, device, torch.bfloat16))
    moe_mlp(x, weights, chosen, *experts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moe_mlp(x, weights, chosen, *experts)

    chosen.copy_((chosen + 1) % X)
    graph.replay()

    assert torch.equal(y, moe_mlp(x, weights, chosen, *experts))
