"""Routing against its reference: choices to the bit, the rest by the rule; the losses by their formulas."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from danaus.kernels.moe import expert_capacity, load_balancing_loss, route, route_reference, router_z_loss, routing

from ..agree import DTYPES, assert_agrees
from ..truth import Canaries, misaligned, strided

MODES: list[dict[str, Any]] = [
    {"softmax": "before", "normalize": False},
    {"softmax": "before", "normalize": True},
    {"softmax": "after", "normalize": False},
]


def logits_of(num_tokens: int, num_experts: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_tokens, num_experts, device=device, dtype=dtype, requires_grad=True)


def weights_only(function: Any, logits: torch.Tensor, **options: Any) -> torch.Tensor:
    return function(logits, **options)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4, 2), (1, 1, 1), (5, 7, 3), (17, 64, 6), (3, 12, 12)])
@pytest.mark.parametrize("mode", MODES)
def test_it_equals_the_reference(
    mode: dict[str, Any], shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    tokens, experts, k = shape
    logits = logits_of(tokens, experts, device, dtype)

    assert torch.equal(route(logits, k, **mode)[1], route_reference(logits, k, **mode)[1])
    assert_agrees(
        partial(weights_only, route, k=k, **mode), partial(weights_only, route_reference, k=k, **mode), (logits,)
    )


@pytest.mark.parametrize("layout", [strided, misaligned, lambda x: x.detach().t().clone().t().requires_grad_()])
def test_any_layout_of_the_rows_will_do(layout: Any, device: torch.device) -> None:
    logits = layout(logits_of(5, 37, device, torch.float32))

    for mode in MODES:
        assert_agrees(
            partial(weights_only, route, k=2, **mode), partial(weights_only, route_reference, k=2, **mode), (logits,)
        )


def test_of_equal_experts_the_lowest_comes_first(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 1.0]], device=device)

    _, experts = route(logits, 3)

    assert experts.tolist() == [[0, 1, 2], [1, 2, 0]]


def test_masked_experts_weigh_nothing(device: torch.device) -> None:
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf"), 2.0]], device=device, requires_grad=True)

    for mode in MODES:
        weights, experts = route(logits, 3, **mode)
        (grad,) = torch.autograd.grad(weights[0, 0], logits)

        assert experts.tolist() == [[3, 1, 0]]
        assert weights[0, 2].item() == 0.0
        assert grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_whatever_the_logits_are_an_expert_is_one(device: torch.device) -> None:
    logits = torch.full((3, 5), float("nan"), device=device)

    _, experts = route(logits, 2)

    assert ((experts >= 0) & (experts < 5)).all()


def test_torchs_own_is_the_same(device: torch.device) -> None:
    logits = logits_of(9, 12, device, torch.float32)

    for mode in MODES:
        weights, experts = route(logits, 4, impl="torch", **mode)
        expected_weights, expected_experts = route_reference(logits, 4, **mode)

        torch.testing.assert_close(weights, expected_weights)
        assert torch.equal(experts, expected_experts)


def test_it_writes_only_its_results(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = Canaries()
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: canaries.around(make(*shape, **options)))
    logits = logits_of(5, 7, device, torch.float32)

    for mode in MODES:
        weights, _ = route(logits, 3, **mode)
        torch.autograd.grad(weights, logits, torch.ones_like(weights))

    canaries.check()


def test_the_references_gradient_is_its_derivative() -> None:
    logits = logits_of(3, 5, torch.device("cpu"), torch.float64)
    experts = route_reference(logits, 2)[1]

    for mode in MODES:
        assert torch.autograd.gradcheck(partial(weights_only, route_reference, k=2, **mode), (logits,))
    assert torch.autograd.gradcheck(lambda x: load_balancing_loss(x, experts), (logits,))
    assert torch.autograd.gradcheck(router_z_loss, (logits,))


@pytest.mark.timeout(60)
def test_torch_may_trace_it(device: torch.device) -> None:
    logits = logits_of(3, 5, device, torch.float32)

    torch.library.opcheck(routing._route_op, (logits, 2, True))


def test_an_even_load_costs_alpha_and_a_collapse_costs_all_experts() -> None:
    even = torch.zeros(8, 4)
    choices = torch.arange(8).view(8, 1) % 4
    collapsed = torch.tensor([50.0, 0.0, 0.0, 0.0]).expand(8, 4)

    assert load_balancing_loss(even, choices, alpha=0.5).item() == pytest.approx(0.5)
    assert load_balancing_loss(collapsed, torch.zeros_like(choices), alpha=0.5).item() == pytest.approx(2.0)


def test_the_balancing_loss_is_the_switch_transformers() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64)
    _, experts = route_reference(logits, 1)

    share = [(experts == i).double().mean() for i in range(3)]
    probability = logits.softmax(-1).mean(0)
    expected = 0.01 * 3 * sum(f * p for f, p in zip(share, probability, strict=True))

    torch.testing.assert_close(load_balancing_loss(logits, experts, alpha=0.01), expected)


def test_the_z_loss_is_the_mean_square_of_the_log_partition() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    log2 = torch.tensor(2.0, dtype=torch.float64).log()

    torch.testing.assert_close(router_z_loss(logits, 2.0), log2**2 + (log2 + 1) ** 2)


def test_no_tokens_cost_nothing() -> None:
    logits = torch.zeros(0, 4)

    assert load_balancing_loss(logits, torch.zeros(0, 2, dtype=torch.int64)).item() == 0.0
    assert router_z_loss(logits).item() == 0.0


def test_capacity_is_a_multiple_of_the_even_share() -> None:
    assert expert_capacity(100, 8, 2, 1.0) == 25
    assert expert_capacity(100, 8, 2, 1.25) == 32
    assert expert_capacity(1, 8, 1, 1.0) == 1
    with pytest.raises(ValueError, match="leaves no room"):
        expert_capacity(100, 8, 2, 0.0)


def test_it_says_what_it_takes(device: torch.device) -> None:
    logits = torch.zeros(3, 4, device=device)

    with pytest.raises(ValueError, match=r"1 <= k <= X, got \[3, 4\] and k=5"):
        route(logits, 5)
    with pytest.raises(ValueError, match=r"softmax='between' is not there"):
        route(logits, 2, softmax="between")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"logits is torch\.float64"):
        route(logits.double(), 2)
    with pytest.raises(ValueError, match="5000 experts"):
        route(torch.zeros(1, 5000, device=device), 2)
