"""LayerNorm against its reference: values, gradients, the residual stream, shapes that fit no tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from danaus.kernels import layernorm as module
from danaus.kernels.layernorm import layernorm, layernorm_reference

from ..agree import DTYPES, assert_agrees
from ..truth import Canaries, misaligned, odd_shapes, strided


def inputs(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, weight, bias and residual."""
    shapes = (shape, shape[-1:], shape[-1:], shape)
    x, weight, bias, residual = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
    return x, weight, bias, residual


def added(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, impl: Any = "triton"
) -> Any:
    return layernorm(x, weight, bias, residual=residual, impl=impl)


def added_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> Any:
    return added(x, weight, bias, residual, impl="reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*odd_shapes(), (2, 3, 33)])
def test_it_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias, residual = inputs(shape, device, dtype)

    assert_agrees(layernorm, layernorm_reference, (x, weight), "alone")
    assert_agrees(layernorm, layernorm_reference, (x, weight, bias), "with a bias")
    assert_agrees(added, added_reference, (x, weight, bias, residual), "with a residual")


@pytest.mark.parametrize("layout", [strided, misaligned, lambda x: x.detach().t().clone().t().requires_grad_()])
def test_any_layout_of_the_rows_will_do(layout: Any, device: torch.device) -> None:
    x, weight, bias, residual = inputs((5, 37), device)

    assert_agrees(added, added_reference, (layout(x), weight, bias, layout(residual)))


def test_several_programs_share_the_weights_gradient(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "num_programs", lambda num_rows, rows, device: 3)
    x, weight, _, _ = inputs((17, 1500), device)

    assert_agrees(layernorm, layernorm_reference, (x, weight))


def test_weights_may_be_wider_than_activations(device: torch.device) -> None:
    x = torch.randn(3, 20, device=device, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(20, device=device, requires_grad=True)

    assert_agrees(layernorm, layernorm_reference, (x, weight))


def test_the_gradient_of_a_sum_arrives_without_strides(device: torch.device) -> None:
    x, weight, bias, residual = inputs((4, 9), device)

    _, stream = added(x, weight, bias, residual)
    stream.sum().backward()

    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_it_writes_only_its_results(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = Canaries()
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: canaries.around(make(*shape, **options)))
    x, weight, bias, residual = inputs((5, 37), device)

    y, stream = added(x, weight, bias, residual)
    torch.autograd.grad((y, stream), (x, weight, bias, residual), (y.detach(), stream.detach()))

    canaries.check()


def test_rows_far_from_zero_keep_their_variance(device: torch.device) -> None:
    x, weight, bias, _ = inputs((3, 100), device)

    assert_agrees(layernorm, layernorm_reference, ((x.detach() + 1000).requires_grad_(), weight, bias))


def test_the_same_bits_every_time(device: torch.device) -> None:
    x, weight, _, _ = inputs((9, 65), device)

    def gradients() -> tuple[torch.Tensor, ...]:
        y = layernorm(x, weight)
        return torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_torchs_own_is_the_same(device: torch.device) -> None:
    x, weight, bias, residual = inputs((5, 37), device)

    y, stream = added(x, weight, bias, residual, impl="torch")
    expected, expected_stream = added_reference(x, weight, bias, residual)

    torch.testing.assert_close(y, expected)
    assert torch.equal(stream, expected_stream)


def test_the_references_gradient_is_its_derivative() -> None:
    x, weight, bias, residual = (t.detach().double().requires_grad_() for t in inputs((3, 5), torch.device("cpu")))

    assert torch.autograd.gradcheck(added_reference, (x, weight, bias, residual))


@pytest.mark.timeout(60)
def test_torch_may_trace_it(device: torch.device) -> None:
    x, weight, bias, residual = inputs((3, 17), device)

    torch.library.opcheck(module._layernorm_op, (x, None, weight, None, 1e-5))
    torch.library.opcheck(module._layernorm_op, (x, residual, weight, bias, 1e-5))


def test_it_says_what_it_takes(device: torch.device) -> None:
    x, weight, bias, residual = inputs((3, 8), device)

    with pytest.raises(ValueError, match=r"expected x \[\.\.\., D\] and w \[D\], got \[3, 8\] and \[7\]"):
        layernorm(x, weight[:7])
    with pytest.raises(ValueError, match="make them alike"):
        layernorm(x, weight, bias, residual=residual.half())
    with pytest.raises(ValueError, match="b is"):
        layernorm(x, weight, bias.half())
    with pytest.raises(ValueError, match=r"x is torch.float64, the kernel takes float32, bfloat16, float16"):
        layernorm(x.double(), weight)
    with pytest.raises(ValueError, match="rows of 40000 features"):
        layernorm(x.new_zeros(1, 40_000), x.new_zeros(40_000))
